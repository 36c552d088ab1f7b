"""What the threads of the wizard report to its pages: facts, in the past tense."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from textual.message import Message

from engine.errors import UserError
from engine.events import Recorded
from engine.runs import Request, RunFolder, Status
from engine.runs.history import RunFacts
from engine.runs.lock import Contents

if TYPE_CHECKING:
    from engine.runs.comparison import ConfigDifferences


@dataclass
class EventsRead(Message):
    """A run wrote events, or has another status."""

    events: Sequence[Recorded]
    status: Status | None
    """None while what was written before is still being read."""


@dataclass
class RunUnreadable(Message):
    """The folder of a run cannot be read any more."""

    error: UserError


@dataclass
class RunAsked(Message):
    """A command was written for a run; its answer will carry `identity`."""

    identity: str
    command: Request


@dataclass
class WorkRefused(Message):
    """What a page asked a thread for could not be done."""

    error: UserError


class RunResumed(Message):
    """A run goes on: its pause was lifted, or its trainer has begun again."""


@dataclass
class RunsSeen(Message):
    """Every run that is known, as it was a moment ago."""

    runs: Sequence[RunFacts]


@dataclass
class RemovalMeasured(Message):
    """What taking a run away would take."""

    run: RunFolder
    contents: Contents


@dataclass
class RunRemoved(Message):
    """A run is gone; its config lies at `kept`, if it had one."""

    run: RunFolder
    kept: Path | None


@dataclass
class RunsCompared(Message):
    """The configs of two runs were read, or could not be."""

    differences: "ConfigDifferences | UserError"


class RowsCounted(Message):
    """The plan has the rows of its config now, or the reason why it has not."""


@dataclass
class PlanMeasured(Message):
    """A plan was measured on this computer; its figures are kept, and the estimate has them."""

    sentence: str

"""What the threads of the wizard report to its pages: facts, in the past tense."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from textual.message import Message

from engine.errors import UserError
from engine.events import Recorded
from engine.runs import Request, RunFolder, Status
from engine.runs.facts import RunFacts
from engine.runs.removal import Contents

if TYPE_CHECKING:
    from engine.runs.comparison import ConfigDifferences


class EventsRead(Message):
    """A run wrote events, or has another status."""

    def __init__(self, events: Sequence[Recorded], status: Status | None) -> None:
        super().__init__()
        self.events = events
        self.status = status
        """None while what was written before is still being read."""


class RunUnreadable(Message):
    """The folder of a run cannot be read any more."""

    def __init__(self, error: UserError) -> None:
        super().__init__()
        self.error = error


class RunAsked(Message):
    """A command was written for a run; its answer will carry `identity`."""

    def __init__(self, identity: str, command: Request) -> None:
        super().__init__()
        self.identity = identity
        self.command = command


class WorkRefused(Message):
    """What a page asked a thread for could not be done."""

    def __init__(self, error: UserError) -> None:
        super().__init__()
        self.error = error


class RunResumed(Message):
    """A run goes on: its pause was lifted, or its trainer has begun again."""


class RunsSeen(Message):
    """Every run that is known, as it was a moment ago."""

    def __init__(self, runs: Sequence[RunFacts]) -> None:
        super().__init__()
        self.runs = runs


class RemovalMeasured(Message):
    """What taking a run away would take."""

    def __init__(self, run: RunFolder, contents: Contents) -> None:
        super().__init__()
        self.run = run
        self.contents = contents


class RunRemoved(Message):
    """A run is gone; its config lies at `kept`, if it had one."""

    def __init__(self, run: RunFolder, kept: Path | None) -> None:
        super().__init__()
        self.run = run
        self.kept = kept


class RunsCompared(Message):
    """The configs of two runs were read, or could not be."""

    def __init__(self, differences: "ConfigDifferences | UserError") -> None:
        super().__init__()
        self.differences = differences


class RowsCounted(Message):
    """The plan has the rows of its config now, or the reason why it has not."""


class PlanMeasured(Message):
    """A plan was measured on this computer; its figures are kept, and the estimate has them."""

    def __init__(self, sentence: str) -> None:
        super().__init__()
        self.sentence = sentence

"""What commands share: options, how lines are printed, what shows a run, whoever calls them."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol, TextIO

from cyclopts import Parameter

from engine.child import TRAINER
from engine.events import Recorded, format_line
from engine.report import Line
from engine.report.run import SpacedLines
from engine.runs import RunFolder
from engine.visible import fold, visible

AsJson = Annotated[bool, Parameter("--json", help="Print one JSON document.")]
AsEvents = Annotated[bool, Parameter("--events", help="Print the run's events as JSON lines.")]
Assume = Annotated[
    str | None,
    Parameter("--assume", help="Plan for GPUs that are not here, such as 'H100 x2' or '24 GB'."),
]
ConfigPath = Annotated[Path, Parameter(help="YAML file with Axolotl's keys.")]
Ascii = Annotated[bool, Parameter("--ascii", help="Draw with ASCII alone.")]
RunName = Annotated[str, Parameter(help="Name of the run, or its folder.")]
RunsFolder = Annotated[
    Path | None,
    Parameter(
        "--runs", help="Folder that holds runs/, instead of $WINDTUNNEL_RUNS or the default."
    ),
]


class Watch(Protocol):
    """Something that shows the events of a run as they come."""

    def show(self, recorded: Recorded) -> None:
        """Take in one event."""
        return

    def close(self) -> None:
        """The run has ended, or nobody watches any more."""
        return


class PlainWatch:
    """Lines on stderr, steps and phases thinned out in time; for pipes and logs."""

    def __init__(
        self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._out = out or sys.stderr
        self._lines = SpacedLines(clock)

    def show(self, recorded: Recorded) -> None:
        if line := self._lines.line(recorded.event):
            print(visible(str(line), one_line=True), file=self._out, flush=True)

    def close(self) -> None:
        self._out.flush()


class NoWatch(Watch):
    """Shows nothing: another process shows the same."""


class EventLines:
    """Events as they are in events.jsonl, on stdout."""

    def show(self, recorded: Recorded) -> None:
        sys.stdout.buffer.write(format_line(recorded))
        sys.stdout.buffer.flush()

    def close(self) -> None:
        sys.stdout.buffer.flush()


@dataclass(frozen=True, slots=True)
class NewRequest:
    """How the questions are asked, and where their config goes."""

    out: Path | None = None
    plain: bool = False
    ascii_only: bool = False
    assumed: str | None = None
    """The GPUs to plan for."""


@dataclass(frozen=True, slots=True)
class Host:
    """Whoever calls the commands: what shows a run there, who is asked, which process computes."""

    make_watch: Callable[[], Watch] = PlainWatch
    """What shows a run in the foreground."""
    open_run: Callable[[RunFolder, bool], int] | None = None
    """Shows a run on a screen, in ASCII or not, until the person leaves; gives the exit status."""
    ask_new: Callable[[NewRequest], int] | None = None
    """Asks the questions of `new`; gives the exit status."""
    more_help: str = ""
    """Printed below the list of commands."""
    trainer: str = TRAINER
    """The module of the process with torch."""


HOST = Host()
CommandHost = Annotated[Host, Parameter(parse=False)]


def print_lines(lines: Iterable[Line | str]) -> None:
    """Each whole on stdout, what strangers wrote made visible."""
    columns = terminal_columns()
    for line in lines:
        text = line.whole if isinstance(line, Line) else line
        print("\n".join(fold(visible(text, one_line=True), columns)))


def terminal_columns() -> int | None:
    """Width of the terminal; None where stdout is none, so that a script gets whole lines."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def underlines() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")

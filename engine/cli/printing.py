"""What several commands take, and how they print: whole for a script, folded for a person."""

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from engine.report import Line
from engine.visible import fold, visible

AsJson = Annotated[bool, Parameter("--json", help="Print one JSON document.")]
AsEvents = Annotated[bool, Parameter("--events", help="Print the run's events as JSON lines.")]
Assume = Annotated[
    str | None, Parameter(help="Plan for GPUs that are not here, such as 'H100 x2' or '24 GB'.")
]
RunName = Annotated[str, Parameter(help="Name of the run, or its folder.")]
RunsFolder = Annotated[
    Path | None,
    Parameter(
        "--runs", help="Folder that holds runs/, instead of $WINDTUNNEL_RUNS or the default."
    ),
]


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
    """Whether letters may be underlined."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")

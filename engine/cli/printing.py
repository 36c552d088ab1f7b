"""How a command prints lines: whole for a script, folded at the terminal's width for a person."""

import os
import shutil
import sys
from collections.abc import Iterable

from engine.report import Line
from engine.visible import fold, visible


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

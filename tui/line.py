"""A line of the report as the screen draws it: its mark in colour, strangers' text made visible."""

from collections.abc import Mapping
from typing import Final

from textual.content import Content

from engine.report import Line, Mark
from engine.visible import visible

MARK_STYLES: Final[Mapping[Mark, str]] = {
    "✓": "$success",
    "▶": "$success",
    "!": "$warning",
    "?": "$warning",
    "✗": "$error",
    "·": "$muted",
    "◌": "$muted",
    "❚❚": "$accent",
    "": "",
}


def marked(mark: Mark, text: str) -> Content:
    """The mark in its colour, then the text."""
    return Content.assemble((mark, MARK_STYLES[mark]), " ", visible(text, one_line=True))


def line_content(line: Line, *, detail: bool = False) -> Content:
    """A line as plain text has it, in the colour of its mark; with `detail` behind it."""
    text = line.whole if detail else str(line)
    return Content.styled(visible(text, one_line=True), MARK_STYLES[line.mark])

"""A line of the report as the screen draws it, in colour; and every glyph of ours in ASCII.

One filter behind everything that is drawn, so that no widget needs a second set of marks. A glyph
is replaced by one character of the same width: nothing moves.
"""

from collections.abc import Mapping
from typing import Final

from rich.segment import Segment
from textual.color import Color
from textual.content import Content
from textual.filter import LineFilter

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


_MARKS: Final = {
    **dict(zip("✓✗·●○◌▶❚❯▸◆▦↓↑→←…‹›±×−", "+x.o..>|>>o#v^><.<>~x-", strict=True)),
    **dict(zip("█▓▒░╱╳", "#=-./x", strict=True)),
    **dict(zip("▁▂▃▄▅▆▇", "__..--=", strict=True)),
    **dict(zip("•–—⟨⟩⟦⟧⏎␊␉␡", "*--<>[]$$^^", strict=True)),  # `$` for a line's end is cat's mark
    **{chr(0x2400 + code): "^" for code in range(32) if code not in (9, 10)},
    **dict.fromkeys("─━┄┅┈┉╌╍═▔", "-"),
    **dict.fromkeys("│┃┆┇┊┋╎╏║▏▎▍▌▋▊▉▐▕", "|"),
}
_CORNERS: Final = "┌┐└┘├┤┬┴┼┏┓┗┛┣┫┳┻╋╭╮╰╯┍┑┕┙┝┥╒╕╘╛╔╗╚╝"
_BRAILLE: Final = 0x2800
_UPPER: Final = 0x01 | 0x02 | 0x08 | 0x10
"""Dots of the two upper rows of a braille cell."""


def _braille(bits: int) -> str:
    """The place of the dots is what counts in a curve: above, below, or both."""
    if not bits:
        return " "
    above, below = bits & _UPPER, bits & ~_UPPER
    return ":" if above and below else "'" if above else "."


_TABLE: Final = str.maketrans(
    _MARKS
    | dict.fromkeys(_CORNERS, "+")
    | {chr(_BRAILLE + bits): _braille(bits) for bits in range(256)}
)


def to_ascii(text: str) -> str:
    """`text` with the marks of the interface replaced; letters of a language stay as they are."""
    return text.translate(_TABLE)


class AsciiFilter(LineFilter):
    """Translates what is drawn, line by line."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [
            segment if segment.text.isascii() else segment._replace(text=to_ascii(segment.text))
            for segment in segments
        ]

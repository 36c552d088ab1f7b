"""Text that a dataset, a path or a server chose, made safe and readable on a terminal.

Control bytes, C1 codes, bidirectional overrides and invisible characters become marks that a
person can see. The joiners U+200C and U+200D stay, because Persian, Indic scripts and emoji need
them and no terminal acts on them. Lines are folded here too, because a terminal breaks words.
"""

import re
import unicodedata

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_LINE_BREAKS = {"\n": "␊", "\t": "␉"}
# One character, or one of our own escape sequences, which take no room.
_ATOM = re.compile("\x1b\\[\\d+m|.", re.DOTALL)


def _mark(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 32:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def visible(text: str, *, one_line: bool = False) -> str:
    """`text` with every character that a terminal would act on, or hide, replaced by a mark.

    Line feeds and tabs stay as they are, unless `one_line` turns them into marks too.
    """
    shown = _UNSAFE.sub(_mark, text)
    if one_line:
        for character, mark in _LINE_BREAKS.items():
            shown = shown.replace(character, mark)
    return shown


def first_line(error: BaseException) -> str:
    """What an error says first, else its name, without the last full stop."""
    found = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return visible(found, one_line=True).rstrip(".")


def fold(text: str, columns: int | None) -> list[str]:
    """`text`, one line, as lines of at most `columns` cells, broken after a space where one is.

    A space that a full line would push into the next is left out. With None it is one line.
    """
    if columns is None:
        return [text]
    lines, line, cells = [], "", 0
    for match in _ATOM.finditer(text):
        atom = match[0]
        taken = _cells(atom)
        if atom == " " and cells == columns:
            lines.append(line)
            line, cells = "", 0
            continue
        while cells + taken > columns and line:
            kept = line.rfind(" ") + 1 or len(line)
            lines.append(line[:kept])
            line = line[kept:]
            cells = sum(map(_cells, _ATOM.findall(line)))
        line += atom
        cells += taken
    return [*lines, line] if line or not lines else lines


def _cells(atom: str) -> int:
    """Terminal columns of one atom: 2 for wide East Asian letters, 0 for combining marks."""
    if " " <= atom <= "~":
        return 1
    if len(atom) > 1 or unicodedata.category(atom) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(atom) in ("W", "F") else 1

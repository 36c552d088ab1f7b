"""Text that a dataset, a path or a server chose, made safe to print on a terminal.

It stands beside `errors` at the bottom so that everything that prints can use the same escape:
control bytes, C1 codes, bidirectional overrides and invisible characters become marks that a
person can see. The joiners U+200C and U+200D stay, because Persian, Indic scripts and emoji need
them and no terminal acts on them.
"""

import re

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_LINE_BREAKS = {"\n": "␊", "\t": "␉"}


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

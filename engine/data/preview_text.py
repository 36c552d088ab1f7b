"""A previewed row as text for a terminal of any ability.

What is learned is said by a word, a count and a mark around it, never by colour; control tokens
are known by their id, so that a text which spells one out does not look like one.
"""

from itertools import groupby
from typing import NamedTuple

from engine.chat.render import LabelRule
from engine.data.requests import PreviewRow, kind_word
from engine.visible import fold, visible

_UNDERLINE = ("\x1b[4m", "\x1b[24m")
_BRACKETS = ("‹", "›")
# Our own marks inside a dataset's text are spelt out, or text could pass as a control token.
_OURS = {ord(mark): f"⟨U+{ord(mark):04X}⟩" for mark in "⟦⟧‹›"}
_INDENT = 26
_NARROWEST = 20


class _Token(NamedTuple):
    kind: str
    learned: bool
    text: str


def legend(*, underline: bool, columns: int | None = None) -> str:
    """What the marks of `row_text` mean."""
    mark = "underlined" if underline else "‹…›"
    text = f"+ {mark}: learned   -: only read   ⟦…⟧: control token   n/m: learned of all"
    return "\n".join(fold(text, columns))


def row_text(
    row: PreviewRow,
    rule: LabelRule,
    *,
    underline: bool,
    columns: int | None = None,
) -> str:
    """A row as one paragraph: a line for each run of tokens of one kind, then counts.

    Lines are folded at `columns` cells; with None they are as long as their text.
    """
    place = f"row {row.number}, line {row.line} of {visible(row.file, one_line=True)}"
    if row.problem is not None:
        sentences = f"{row.problem.what} {row.problem.why} {row.problem.fix}"
        return "\n".join(fold(f"✗ {place}: {visible(sentences, one_line=True)}", columns))
    tokens = _tokens(row, rule)
    learned = sum(token.learned for token in tokens)
    paragraphs = [
        f"{place}: {len(tokens)} tokens, {learned} learned",
        *(f"· {visible(note, one_line=True)}" for note in row.notes),
        _count_line(tokens),
    ]
    head, *tail = (line for paragraph in paragraphs for line in fold(paragraph, columns))
    marks = _UNDERLINE if underline else _BRACKETS
    room = None if columns is None else max(columns - _INDENT, _NARROWEST)
    runs = [
        _run_text(kind, list(run), marks, room)
        for kind, run in groupby(tokens, key=lambda token: token.kind)
    ]
    return "\n".join([head, *runs, *tail])


def _tokens(row: PreviewRow, rule: LabelRule) -> list[_Token]:
    return [
        _Token(
            kind_word(kind),
            carries,
            f"⟦{piece.removeprefix('[').removesuffix(']')}⟧"
            if piece and token_id < row.first_text_id
            else piece.translate(_OURS),
        )
        for token_id, piece, kind, carries in zip(
            row.ids, row.pieces, row.kinds, row.learned(rule), strict=True
        )
    ]


def _run_text(kind: str, run: list[_Token], marks: tuple[str, str], room: int | None) -> str:
    start, end = marks
    learned = sum(token.learned for token in run)
    text = ""
    for carries, tokens in groupby(run, key=lambda token: token.learned):
        piece = "".join(token.text for token in tokens)
        text += f"{start}{piece}{end}" if carries else piece
    # Pieces show a line feed as a mark; the text breaks there too, to stay readable.
    broken = text.replace("␊", "␊\n").split("\n")
    lines = [line for paragraph in broken for line in fold(paragraph, room)]
    if marks == _UNDERLINE:
        lines = _without_underlined_indent(lines)
    head = f"{'+' if learned else '-'} {kind:<11} {f'{learned}/{len(run)}':>10}  "
    return head + ("\n" + " " * _INDENT).join(lines)


def _without_underlined_indent(lines: list[str]) -> list[str]:
    """Closes an underline at the end of each line and opens it again on the next."""
    start, end = _UNDERLINE
    closed, opened = [], False
    for line in lines:
        whole = start + line if opened else line
        opened = whole.rfind(start) > whole.rfind(end)
        closed.append(whole + end if opened else whole)
    return closed


def _count_line(tokens: list[_Token]) -> str:
    counts: dict[str, list[int]] = {}
    for token in tokens:
        count = counts.setdefault(token.kind, [0, 0])
        count[0] += token.learned
        count[1] += 1
    return "learned by kind: " + ", ".join(
        f"{kind} {learned}/{total}" for kind, (learned, total) in counts.items()
    )

"""One row as a person or a program inspects it: its tokens, or why it cannot be used.

As text for a terminal of any ability, what is learned is said by a word, a count and a mark around
it, never by colour; control tokens are known by their id, so that a text which spells one out does
not look like one.
"""

from dataclasses import asdict
from itertools import groupby
from typing import Any, NamedTuple

from engine.chat.conversation import describe
from engine.chat.images import read_size
from engine.chat.render import IGNORED_LABEL, WITHHELD, Kind, LabelRule
from engine.chat.tokenizer import ChatTokenizer
from engine.data.requests import ImageGrid, PreviewRow, kind_word
from engine.data.rows import RenderedRow
from engine.visible import fold, visible

_UNDERLINE = ("\x1b[4m", "\x1b[24m")
_BRACKETS = ("‹", "›")
# Our own marks inside a dataset's text are spelt out, or text could pass as a control token.
_OURS = {ord(mark): f"⟨U+{ord(mark):04X}⟩" for mark in "⟦⟧‹›"}
_INDENT = 26
_NARROWEST = 20


def preview_row(row: RenderedRow, tokenizer: ChatTokenizer) -> PreviewRow:
    """A row with the text of each token.

    An image is drawn as a whole by the last of its tokens, as a character over several tokens is;
    the others show nothing.
    """
    place, first = (row.number, row.line, row.file), tokenizer.first_text_id
    if row.problem is not None:
        return PreviewRow(*place, row.bad_row(row.problem), (), (), (), (), (), (), first)
    assert row.rendered is not None
    assert row.conversation is not None
    rendered = row.rendered
    ids, kinds = rendered.input_ids.tolist(), rendered.kinds.tolist()
    images = [ImageGrid(i.rows, i.columns, *read_size(i.content)) for i in rendered.images]
    pieces = list(tokenizer.pieces(ids))
    places = [at for at, kind in enumerate(kinds) if kind & ~WITHHELD == Kind.IMAGE]
    start = 0
    for image in images:
        end = start + image.rows * (image.columns + 1)
        for at in places[start:end]:
            pieces[at] = ""
        size = f"{image.width}x{image.height}"
        pieces[places[end - 1]] = f"[image {size}: {image.columns} x {image.rows} tokens]"
        start = end
    notes = [note.text for note in row.conversation.notes]
    notes += [
        f"Not read: {name}, {describe(value)}." for name, value in row.conversation.unread.items()
    ]
    sources = rendered.sources.tolist()
    return PreviewRow(*place, None, ids, pieces, kinds, sources, notes, images, first)


def preview_entry(row: PreviewRow, rule: LabelRule) -> dict[str, Any]:
    """The JSON of `windtunnel preview`: `row, line, ok, error, input_ids, labels, kinds, sources`,
    and `file`, `notes`, `images`.

    Rows and lines count from 1, `labels` hold -100 where nothing is learned, `sources` -1 for
    tokens of no message. A bad row has empty lists and `error {what, why, fix, message}`.
    """
    learned = zip(row.ids, row.learned(rule), strict=True)
    bad = row.problem
    return {
        "row": row.number,
        "line": row.line,
        "file": row.file,
        "ok": bad is None,
        "error": bad and {key: getattr(bad, key) for key in ("what", "why", "fix", "message")},
        "input_ids": row.ids,
        "labels": [token if carries else IGNORED_LABEL for token, carries in learned],
        "kinds": [kind_word(kind) for kind in row.kinds],
        "sources": row.sources,
        "notes": row.notes,
        "images": [asdict(image) for image in row.images],
    }


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

"""A previewed row as text for a terminal of any ability.

What is learned is said by a word, a count and a mark around it, never by colour; control tokens
are told by their id, so that a text which spells one out does not look like one.
"""

from itertools import groupby
from typing import Any, NamedTuple

from engine.chat.tokenizer import ChatTokenizer
from engine.visible import visible

_UNDERLINE = ("\x1b[4m", "\x1b[24m")
_BRACKETS = ("‹", "›")
# Our own marks inside a dataset's text are spelt out, or text could pass as a control token.
_OURS = {ord(mark): f"⟨U+{ord(mark):04X}⟩" for mark in "⟦⟧‹›"}
_INDENT = 26


class _Token(NamedTuple):
    kind: str
    learned: bool
    text: str


def legend(*, underline: bool) -> str:
    """One line that explains the marks of `row_text`."""
    mark = "underlined" if underline else "‹…›"
    return f"+ and {mark}: learned   -: only read   ⟦…⟧: control token   n/m: n of m tokens learned"


def row_text(entry: dict[str, Any], tokenizer: ChatTokenizer, *, underline: bool) -> str:
    """A preview entry as one paragraph: a line for each run of tokens of one kind, then counts."""
    place = f"row {entry['row']}, line {entry['line']} of {visible(entry['file'], one_line=True)}"
    if entry["error"] is not None:
        error = entry["error"]
        told = " ".join((error["what"], error["why"], error["fix"]))
        return f"✗ {place}: {visible(told, one_line=True)}"
    tokens = _tokens(entry, tokenizer)
    learned = sum(token.learned for token in tokens)
    lines = [f"{place}: {len(tokens)} tokens, {learned} learned"]
    lines += [
        _run_line(kind, list(run), *(_UNDERLINE if underline else _BRACKETS))
        for kind, run in groupby(tokens, key=lambda token: token.kind)
    ]
    lines += [f"· {visible(note, one_line=True)}" for note in entry["notes"]]
    return "\n".join([*lines, _count_line(tokens)])


def _tokens(entry: dict[str, Any], tokenizer: ChatTokenizer) -> list[_Token]:
    ids = entry["input_ids"]
    return [
        _Token(
            kind,
            label != -100,
            f"⟦{piece.removeprefix('[').removesuffix(']')}⟧"
            if tokenizer.is_control(token_id)
            else piece.translate(_OURS),
        )
        for token_id, piece, kind, label in zip(
            ids, tokenizer.pieces(ids), entry["kinds"], entry["labels"], strict=True
        )
    ]


def _run_line(kind: str, run: list[_Token], start: str, end: str) -> str:
    learned = sum(token.learned for token in run)
    parts: list[str] = []
    for carries, tokens in groupby(run, key=lambda token: token.learned):
        text = "".join(token.text for token in tokens)
        parts += [start, text, end] if carries else [text]
    # Pieces show a line feed as a mark; the text breaks there too, to stay readable.
    text = "".join(parts).replace("␊", "␊\n" + " " * _INDENT)
    return f"{'+' if learned else '-'} {kind:<11} {f'{learned}/{len(run)}':>10}  {text}"


def _count_line(tokens: list[_Token]) -> str:
    counts: dict[str, list[int]] = {}
    for token in tokens:
        count = counts.setdefault(token.kind, [0, 0])
        count[0] += token.learned
        count[1] += 1
    return "learned by kind: " + ", ".join(
        f"{kind} {learned}/{total}" for kind, (learned, total) in counts.items()
    )

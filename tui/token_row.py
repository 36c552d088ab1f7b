"""One row of tokens cut into blocks and lines, and searched; nothing here draws.

A block is what one gutter label stands for: a run of one message's tokens of one role. Lines
depend on the pieces and the width alone, so that a change of labels moves nothing.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from rich.cells import cell_len, chop_cells

from engine.data.requests import PreviewRow, kind_word

ROLES: Final = {
    "system": "system",
    "tools": "tools",
    "settings": "setting",
    "user": "user",
    "image": "image",
    "tool_result": "result",
    "text": "answer",
    "think": "think",
    "call": "call",
}
"""The engine's word of a kind -> the word at the left."""

LABEL_CELLS: Final = len("-100")


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens `start` to `end` (exclusive) under one word of the gutter."""

    role: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A previewed row: lists of one length, and the blocks that they form."""

    ids: Sequence[int]
    pieces: Sequence[str]
    kinds: Sequence[str]
    sources: Sequence[int]
    first_text_id: int
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def is_control(self, index: int) -> bool:
        """Whether the token is one that no text can become."""
        return self.ids[index] < self.first_text_id

    def is_inside_image(self, index: int) -> bool:
        """Whether the token is one of an image that its last token is drawn for."""
        return self.kinds[index] == "image" and not self.pieces[index]

    def image_tokens(self, index: int) -> int:
        """How many tokens the image has whose last token this is; 0 for any other token."""
        if self.kinds[index] != "image" or self.is_inside_image(index):
            return 0
        start = index
        while start and self.is_inside_image(start - 1):
            start -= 1
        return index + 1 - start

    def find(self, wanted: str, after: int) -> int | None:
        """The first token behind `after`, else from the start, that holds text or has `id:N`."""
        if wanted.startswith("id:"):
            hits = [i for i, token in enumerate(self.ids) if str(token) == wanted[3:].strip()]
            hits = [hit for hit in hits if not self.is_inside_image(hit)]
        else:
            hits = list(self._find_text(wanted.casefold()))
        return next((hit for hit in hits if hit > after), hits[0] if hits else None)

    def _find_text(self, wanted: str) -> Iterator[int]:
        folded = [piece.casefold() for piece in self.pieces]
        starts = [0, *accumulate(map(len, folded))]
        text = "".join(folded)
        at = text.find(wanted) if wanted else -1
        while at >= 0:
            yield bisect_right(starts, at) - 1
            at = text.find(wanted, at + 1)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a block: (text, token) from left to right; `place` counts lines in the block."""

    block: int
    place: int
    fragments: list[tuple[str, int]]


def read_row(row: PreviewRow) -> TokenRow:
    """A row of the worker's preview."""
    kinds, sources = [kind_word(kind) for kind in row.kinds], row.sources
    blocks: list[Block] = []
    start, before = 0, None
    for index, kind in enumerate(kinds):
        # <s> opens the block that follows it, </s> closes the one before it.
        if kind == "eos" or (kind == "bos" and index + 1 < len(kinds)):
            continue
        here = (ROLES.get(kind, kind), sources[index])
        if before is not None and here != before:
            blocks.append(Block(before[0], start, index))
            start = index
        before = here
    if kinds:
        blocks.append(Block(before[0] if before else kinds[0], start, len(kinds)))
    return TokenRow(row.ids, row.pieces, kinds, sources, row.first_text_id, tuple(blocks))


def _cells(text: str) -> int:
    # Three times as fast on the text that most rows are made of.
    return len(text) if text.isascii() else cell_len(text)


def lay_out(row: TokenRow, width: int, *, edges: str = "", labels: bool = False) -> list[Line]:
    """The row's lines of at most `width` cells.

    A block starts a line; words and control tokens are not split unless they are longer than a
    line. `edges` is drawn behind every token; with `labels` each token is as wide as its label,
    which stands below it.
    """
    lines: list[Line] = []
    for number, block in enumerate(row.blocks):
        lines.append(Line(number, 0, []))
        used = 0
        for word in _words(row, block, edges, labels):
            cells = sum(_cells(text) for text, _ in word)
            if used and used + cells > width:
                lines.append(Line(number, lines[-1].place + 1, []))
                used = 0
                first, index = word[0]
                if not edges and not labels and first.strip():
                    word[0] = (first.lstrip(" "), index)
            for text, index in word:
                for part in _chop(text, width, used):
                    if used + _cells(part) > width:
                        lines.append(Line(number, lines[-1].place + 1, []))
                        used = 0
                    lines[-1].fragments.append((part, index))
                    used += _cells(part)
            if word[-1][0].rstrip(edges or None).endswith("␊") and word[-1][1] + 1 < block.end:
                lines.append(Line(number, lines[-1].place + 1, []))
                used = 0
    return lines


def _chop(text: str, width: int, used: int) -> list[str]:
    """`text` whole where it fits into a line, else in parts, the first for the rest of this one."""
    if _cells(text) <= width - used:
        return [text]
    room = width - used
    head = chop_cells(text, room)[0] if room > 0 and _cells(text) > width else ""
    return [part for part in (head, *chop_cells(text[len(head) :], width)) if part]


def _words(
    row: TokenRow, block: Block, edges: str, labels: bool
) -> Iterator[list[tuple[str, int]]]:
    """Runs of tokens that stay on one line, each token with the text to draw for it."""
    word: list[tuple[str, int]] = []
    for index in range(block.start, block.end):
        piece = row.pieces[index]
        text = piece + edges
        if labels:
            needed = max(_cells(text), len(str(row.ids[index])), LABEL_CELLS) + 1
            text += " " * (needed - _cells(text))
        alone = labels or row.is_control(index) or piece.startswith(" ")
        if word and (alone or row.is_control(index - 1) or row.pieces[index - 1].endswith("␊")):
            yield word
            word = []
        word.append((text, index))
    if word:
        yield word

"""A conversation as the trainer reads it: each token, and whether it is learned.

Meaning is carried by words, shape and underline first: a role and a count at the left, `┃` where
tokens are learned and `┊` where they are only read, underlined or dim text. Colour repeats it.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Final

from rich.cells import cell_len, chop_cells
from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.events import Click
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from engine.chat.render import IGNORED_LABEL
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


_ROLE_CELLS: Final = 8
_GUTTER_CELLS: Final = _ROLE_CELLS + 2


class TokenView(ScrollView, can_focus=True):
    """Shows one row. Posts Moved when the cursor stands on another token."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *("tokens--think", "tokens--answer", "tokens--call", "tokens--other", "tokens--read"),
        *("tokens--control", "tokens--role", "tokens--count", "tokens--learned-bar", "tokens--bar"),
    }
    DEFAULT_CSS = """
    TokenView {
        height: 1fr; overflow-x: hidden; scrollbar-gutter: stable;
        scrollbar-size-vertical: 1; scrollbar-size-horizontal: 0;
        scrollbar-color: $frame; scrollbar-background: $background;
    }
    TokenView > .tokens--think { color: $think; text-style: underline; }
    TokenView > .tokens--answer { color: $answer; text-style: underline; }
    TokenView > .tokens--call { color: $call; text-style: underline; }
    TokenView > .tokens--other { color: $lit; text-style: underline; }
    TokenView > .tokens--read { color: $read; text-style: dim; }
    TokenView > .tokens--control { background: $panel; text-style: bold; }
    TokenView > .tokens--role { color: $muted; }
    TokenView > .tokens--count { color: $muted; }
    TokenView > .tokens--bar { color: $faint; }
    TokenView > .tokens--learned-bar { color: $primary; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,l", "move(1)", "next token", show=False),
        Binding("left,h", "move(-1)", "token before", show=False),
        Binding("down,j", "line(1)", "next line", show=False),
        Binding("up,k", "line(-1)", "line before", show=False),
        Binding("pagedown", "line(10)", "ten lines down", show=False),
        Binding("pageup", "line(-10)", "ten lines up", show=False),
        Binding("home", "move(-1000000)", "first token", show=False),
        Binding("end", "move(1000000)", "last token", show=False),
        Binding("m", "labels", "labels under the tokens", show=False),
        Binding("b", "edges", "edges of the tokens", show=False),
    ]

    cursor: reactive[int] = reactive(0)
    """Index of the token under the cursor."""
    labels: reactive[bool] = reactive(False)
    edges: reactive[bool] = reactive(False)

    class Moved(Message):
        """The cursor stands on another token, or the row was laid out anew."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 (Textual's name)
        super().__init__(id=id)
        self.row: TokenRow | None = None
        self._learned: Sequence[bool] = ()
        self._block_learned: list[int] = []
        self._lines: list[Line] = []
        self._line_of: list[int] = []

    def show_row(self, row: TokenRow | None, learned: Sequence[bool], cursor: int = 0) -> None:
        """Another row (None: nothing), with one flag a token."""
        self.row = row
        self.relabel(learned)
        self._lay_out()
        self.set_reactive(TokenView.cursor, cursor)
        self.scroll_to(y=0, animate=False, force=True)
        self._follow()

    def relabel(self, learned: Sequence[bool]) -> None:
        """Other labels for the tokens that are shown: only styles and counts change."""
        self._learned = learned
        blocks = self.row.blocks if self.row else ()
        self._block_learned = [sum(learned[block.start : block.end]) for block in blocks]
        self.refresh()

    def is_learned(self, index: int) -> bool:
        return self._learned[index]

    @property
    def lines_below(self) -> int:
        """Lines that are not in view yet."""
        height = self.scrollable_content_region.height
        return max(0, self.virtual_size.height - height - int(self.scroll_offset.y))

    @property
    def _rows_a_line(self) -> int:
        return 2 if self.labels else 1

    def on_resize(self) -> None:
        self._lay_out()
        self._follow()

    watch_labels = watch_edges = on_resize

    def watch_cursor(self) -> None:
        self._follow()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        self.post_message(self.Moved())

    def action_labels(self) -> None:
        self.labels = not self.labels

    def action_edges(self) -> None:
        self.edges = not self.edges

    def action_move(self, tokens: int) -> None:
        if self.row:
            last = len(self.row) - 1
            target = max(0, min(last, self.cursor + tokens))
            while 0 < target < last and self.row.is_inside_image(target):
                target += 1 if tokens > 0 else -1
            self.cursor = target

    def action_line(self, lines: int) -> None:
        if not self._line_of:
            return
        here = self._line_of[self.cursor]
        column = self._column(here)
        target = max(0, min(len(self._lines) - 1, here + lines))
        if target != here:
            self.cursor = self._token_at(target, column)

    def on_click(self, event: Click) -> None:
        line = (event.y + int(self.scroll_offset.y)) // self._rows_a_line
        if 0 <= line < len(self._lines):
            self.cursor = self._token_at(line, event.x - _GUTTER_CELLS)

    def _lay_out(self) -> None:
        width = self.scrollable_content_region.width - _GUTTER_CELLS
        self._lines, self._line_of = [], []
        if self.row and width > 0:
            edges = "│" if self.edges else ""
            self._lines = lay_out(self.row, width, edges=edges, labels=self.labels)
            self._line_of = self._find_lines(len(self.row))
        self.virtual_size = Size(1, len(self._lines) * self._rows_a_line)
        self.refresh()

    def _find_lines(self, tokens: int) -> list[int]:
        found = [-1] * tokens
        for number, line in enumerate(self._lines):
            for _, index in line.fragments:
                if found[index] < 0:
                    found[index] = number
        return found

    def _follow(self) -> None:
        """Keeps the cursor's line in view, and says that it moved."""
        if self._line_of:
            top = self._line_of[self.cursor] * self._rows_a_line
            self.scroll_to_region(Region(0, top, 1, self._rows_a_line), animate=False, force=True)
        self.refresh()
        self.post_message(self.Moved())

    def _column(self, line: int) -> int:
        column = 0
        for text, index in self._lines[line].fragments:
            if index == self.cursor:
                break
            column += cell_len(text)
        return column

    def _token_at(self, line: int, column: int) -> int:
        reach = 0
        for text, index in self._lines[line].fragments:
            reach += cell_len(text)
            if reach > column:
                return index
        return self._lines[line].fragments[-1][1]

    def render_line(self, y: int) -> Strip:
        number, below = divmod(y + int(self.scroll_offset.y), self._rows_a_line)
        width = self.size.width
        if not self.row or number >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        line = self._lines[number]
        drawn = self._gutter(line, line.place * self._rows_a_line + below)
        drawn += self._label_row(line) if below else self._token_row(line)
        return Strip(drawn).adjust_cell_length(width).apply_style(self.rich_style)

    def _token_row(self, line: Line) -> list[Segment]:
        shown = self._cursor_shown()
        reverse = Style(reverse=True, dim=False)
        return [
            Segment(text, self._style(index) + reverse if index == shown else self._style(index))
            for text, index in line.fragments
        ]

    def _label_row(self, line: Line) -> list[Segment]:
        assert self.row is not None
        drawn, before = [], -1
        style = self.get_component_rich_style("tokens--count", partial=True)
        for text, index in line.fragments:
            label = self.row.ids[index] if self._learned[index] else IGNORED_LABEL
            word = str(label) if index != before else ""
            drawn.append(Segment(f"{word:<{cell_len(text)}}", style))
            before = index
        return drawn

    def _gutter(self, line: Line, place: int) -> list[Segment]:
        assert self.row is not None
        block, learned = self.row.blocks[line.block], self._block_learned[line.block]
        tokens = block.end - block.start
        word, style = "", Style()
        if place == 0:
            word = block.role
            style = self.get_component_rich_style("tokens--role", partial=True)
            style += Style(bold=learned > 0)
        elif place == 1:
            word = f"{learned}/{tokens}" if learned else str(tokens)
            style = self.get_component_rich_style("tokens--count", partial=True)
        if learned:
            mark, bar = "┃", "tokens--learned-bar"
        else:
            # `┊` and `┃` become one mark in ASCII, which must still tell them apart.
            mark, bar = (":" if self.app.has_class("-ascii") else "┊"), "tokens--bar"
        return [
            Segment(f"{word:<{_ROLE_CELLS}}", style),
            Segment(f"{mark} ", self.get_component_rich_style(bar, partial=True)),
        ]

    def _style(self, index: int) -> Style:
        assert self.row is not None
        kind = self.row.kinds[index]
        if not self._learned[index]:
            name = "read"
        elif kind in ("think", "call"):
            name = kind
        else:
            name = "answer" if kind in ("text", "eos") else "other"
        style = self.get_component_rich_style(f"tokens--{name}", partial=True)
        if self.row.is_control(index):
            style += self.get_component_rich_style("tokens--control", partial=True)
            style += Style(dim=False)
        return style

    def _cursor_shown(self) -> int:
        """The token that carries the cursor: parts of one character are drawn by the last part."""
        if not self.row or not self.has_focus:
            return -1
        index = self.cursor
        while not self.row.pieces[index] and index + 1 < len(self.row):
            index += 1
        return index

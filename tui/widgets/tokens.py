"""A conversation as the trainer reads it: each token, and whether it is learned.

Meaning is carried by words, shape and underline first: a role and a count at the left, `┃` where
tokens are learned and `┊` where they are only read, underlined or dim text. Colour repeats it.
"""

from collections.abc import Sequence
from typing import ClassVar, Final

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.events import Click, Resize
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from engine.chat.render import IGNORED_LABEL
from tui.token_row import Line, TokenRow, lay_out

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

    def on_resize(self, _: Resize) -> None:
        self._lay_out()
        self._follow()

    def watch_labels(self) -> None:
        self._lay_out()
        self._follow()

    def watch_edges(self) -> None:
        self._lay_out()
        self._follow()

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
        """The line on which each token starts."""
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

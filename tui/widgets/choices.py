"""A list of lines with a cursor `❯`: what a page offers, one choice a line.

Textual's own OptionList marks the cursor by colour alone; here it is a glyph in a column of its
own, so that it is seen without colour, and vim keys move it.
"""

from collections.abc import Sequence
from typing import ClassVar

from textual.app import RenderResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget


class Choices(Widget, can_focus=True):
    """Lines of text, one of them under the cursor. Posts Moved and Chosen.

    Put it into a Pane: the pane scrolls where there are more lines than rows.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "move(1)", "next", show=False),
        Binding("up,k", "move(-1)", "previous", show=False),
        Binding("home,g", "move(-1000000)", "first", show=False),
        Binding("end,G", "move(1000000)", "last", show=False),
        Binding("enter", "choose", "take it", show=False),
    ]

    cursor: reactive[int] = reactive(0)
    """Index of the line under the cursor."""

    class Moved(Message):
        """The cursor stands on another line."""

        def __init__(self, choices: "Choices") -> None:
            super().__init__()
            self.choices = choices

        @property
        def control(self) -> "Choices":
            return self.choices

    class Chosen(Moved):
        """Enter was pressed, or the line was clicked."""

    def __init__(
        self,
        lines: Sequence[Content] = (),
        *,
        id: str | None = None,  # noqa: A002 (Textual's name)
    ) -> None:
        super().__init__(id=id)
        self._lines: Sequence[Content] = lines

    def show_lines(self, lines: Sequence[Content]) -> None:
        """Other lines; the cursor stays where it is, or goes to the last line."""
        self._lines = lines
        self.cursor = max(0, min(self.cursor, len(lines) - 1))
        self.refresh(layout=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        # Not by rendering: that asks for a size, which asks for this height.
        return len(self._lines)

    def render(self) -> RenderResult:
        width = self.size.width
        shown = []
        for place, line in enumerate(self._lines):
            here = place == self.cursor
            cursor = Content.styled("❯ ", "bold $primary") if here else Content("  ")
            row = Content.assemble(cursor, line).truncate(width, ellipsis=True)
            shown.append(row.stylize("$lit") if here else row)
        return Content("\n").join(shown)

    def watch_cursor(self) -> None:
        if self.is_attached:
            line = Region(self.virtual_region.x, self.virtual_region.y + self.cursor, 1, 1)
            if isinstance(self.parent, Widget):
                self.parent.scroll_to_region(line, animate=False)
        self.post_message(self.Moved(self))

    def action_move(self, lines: int) -> None:
        self.cursor = max(0, min(len(self._lines) - 1, self.cursor + lines))

    def action_choose(self) -> None:
        if self._lines:
            self.post_message(self.Chosen(self))

    def on_click(self, event: Click) -> None:
        if event.y < len(self._lines):
            self.cursor = event.y
            self.action_choose()

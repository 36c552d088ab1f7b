"""The field for a path or a hub id: tab completes what is on the disk, Escape leaves it."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Input

from engine.wizard.offers import complete_path
from tui.page import Key, Page


class PathField(Input):
    """Posts Offered with the names that a text may become."""

    DEFAULT_CSS = """
    PathField { height: 1; border: none; padding: 0 1 0 2; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "complete", "complete the path", show=False, priority=True),
        Binding("escape,up,down", "leave", "leave the field", show=False),
    ]

    KEYS: ClassVar[tuple[Key, ...]] = (
        Key("enter", "read it"),
        Key("tab", "complete"),
        Key("esc", "leave the field"),
    )

    @dataclass
    class Offered(Message):
        """Several names go on like this."""

        names: list[str]

    class Left(Message):
        """The field gave up the focus."""

    def on_focus(self) -> None:
        self._show_keys(self.KEYS)

    def on_blur(self) -> None:
        self._show_keys(None)

    def _show_keys(self, keys: tuple[Key, ...] | None) -> None:
        page = self.screen
        if isinstance(page, Page):
            page.show_keys(page.KEYS if keys is None else keys)

    def action_complete(self) -> None:
        completed, names = complete_path(self.value, Path.cwd())
        if not names:
            self.screen.focus_next()
            return
        self.value = completed
        self.cursor_position = len(completed)
        self.post_message(self.Offered(names))

    def action_leave(self) -> None:
        self.post_message(self.Left())

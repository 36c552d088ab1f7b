"""A one-line field inside a pane: letters are text in it, Escape and the arrows leave it."""

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Input


class Field(Input):
    """Posts Left when it gives up the focus; its text stays."""

    DEFAULT_CSS = """
    Field { height: 1; border: none; padding: 0 1 0 2; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,up,down", "leave", "leave the field", show=False),
    ]

    class Left(Message):
        """The field gives up the focus."""

        def __init__(self, field: "Field") -> None:
            super().__init__()
            self.field = field

    def __init__(self, hint: str, *, id: str | None = None) -> None:  # noqa: A002 (Textual's name)
        super().__init__(placeholder=hint, compact=True, id=id)

    def action_leave(self) -> None:
        self.post_message(self.Left(self))

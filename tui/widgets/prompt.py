"""A one-line question that stands in a row of the page only while it is asked."""

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input


class Prompt(Input):
    """Hidden until `ask`; Enter posts Answered, Escape asks no more. The focus goes back.

    `row` is what stands in its row else: one takes the place of the other, so that nothing moves.
    """

    DEFAULT_CSS = """
    Prompt { display: none; height: 1; border: none; padding: 0 1; background: $surface; }
    Prompt.-asking { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "ask no more", show=False),
        Binding("tab,shift+tab", "close", show=False),
    ]

    class Answered(Message):
        """`text` was given for the question `name`."""

        def __init__(self, name: str, text: str) -> None:
            super().__init__()
            self.name = name
            self.text = text

    def __init__(self, row: Widget) -> None:
        super().__init__(compact=True)
        self._row = row
        self._question = ""
        self._below: Widget | None = None

    def ask(self, name: str, hint: str) -> None:
        """`hint` stands in the empty field."""
        self._question = name
        self.value = ""
        self.placeholder = hint
        self.add_class("-asking")
        self._row.display = False
        self._below = self.screen.focused
        self.focus()

    def action_close(self) -> None:
        self.remove_class("-asking")
        self._row.display = True
        self.screen.set_focus(self._below)

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        self.action_close()
        if self.value.strip():
            self.post_message(self.Answered(self._question, self.value.strip()))

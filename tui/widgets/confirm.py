"""One question about what cannot be taken back: Enter does it, Escape does not."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import Static

from engine.visible import visible
from tui.widgets.pane import Pane


class Confirm(ModalScreen[bool]):
    """Gives True for Enter and False for Escape: `app.push_screen(Confirm(...), callback)`.

    `question` says what follows; `yes` names what Enter does and `no` what Escape does.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "answer(True)", "do it", show=False),
        Binding("escape", "answer(False)", "do not", show=False),
    ]

    def __init__(self, title: str, question: str, *, yes: str, no: str) -> None:
        super().__init__()
        self._title = title
        self._question = question
        self._note = f"enter {yes}, esc {no}"

    def compose(self) -> ComposeResult:
        title = visible(self._title, one_line=True)
        with Pane(title=title, subtitle=self._note, can_focus=True):
            yield Static(visible(self._question), markup=False)

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)

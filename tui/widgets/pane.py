"""The bordered parts of a page: text, help, a problem, and the questions inside it.

Focus is a heavy border as well as a colour, for eyes without hues.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual.app import ComposeResult, RenderResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.geometry import Size
from textual.message import Message
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input, Static

from engine.errors import UserError
from engine.visible import visible
from tui.widgets.choices import Choices


class Pane(Vertical):
    """A border with a title above and a note below; heavy while the focus is in it, else round.

    Titles are text, never markup. `can_focus` is for a pane whose content takes no focus itself.
    """

    def __init__(
        self,
        *children: Widget,
        title: str | Content = "",
        subtitle: str | Content = "",
        can_focus: bool = False,
        id: str | None = None,  # noqa: A002 (Textual's name)
        classes: str | None = None,
    ) -> None:
        super().__init__(*children, id=id, classes=classes)
        self.can_focus = can_focus
        self.show_title(title)
        self.show_subtitle(subtitle)

    def show_title(self, text: str | Content) -> None:
        """Text on the upper border; the empty text takes it away."""
        self.border_title = _content(text)

    def show_subtitle(self, text: str | Content) -> None:
        self.border_subtitle = _content(text)


def _content(text: str | Content) -> Content | None:
    # A title is one line: Textual drops what follows a line feed.
    return (Content(text) if isinstance(text, str) else text) if text else None


class Field(Input):
    """One line: letters are text in it, Escape and the arrows leave it.

    Posts Left when it gives up the focus; its text stays.
    """

    DEFAULT_CSS = """
    Field { height: 1; border: none; padding: 0 1 0 2; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,up,down", "leave", "leave the field", show=False),
    ]

    class Left(Message):
        """The field gives up the focus."""

    def __init__(self, hint: str, *, id: str | None = None) -> None:  # noqa: A002 (Textual's name)
        super().__init__(placeholder=hint, compact=True, id=id)

    def action_leave(self) -> None:
        self.post_message(self.Left())


class Prompt(Input):
    """One line, hidden until `ask`; Enter posts Answered, Escape asks no more. The focus goes back.

    `row` is what stands in its row else: one takes the place of the other, and nothing moves.
    """

    DEFAULT_CSS = """
    Prompt { display: none; height: 1; border: none; padding: 0 1; background: $surface; }
    Prompt.-asking { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "ask no more", show=False),
        Binding("tab,shift+tab", "close", show=False),
    ]

    @dataclass
    class Answered(Message):
        """`text` was given for the question `name`."""

        name: str
        text: str

    def __init__(self, row: Widget | None = None) -> None:
        super().__init__(compact=True)
        self._row = row
        self._question = ""
        self._below: Widget | None = None

    def ask(self, name: str, hint: str, value: str = "") -> None:
        """`hint` stands in the empty field."""
        self._question = name
        self.value = value
        self.placeholder = hint
        self.add_class("-asking")
        if self._row:
            self._row.display = False
        self._below = self.screen.focused
        self.focus()

    def action_close(self) -> None:
        self.remove_class("-asking")
        if self._row:
            self._row.display = True
        self.screen.set_focus(self._below)

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        self.action_close()
        if self.value.strip():
            self.post_message(self.Answered(self._question, self.value.strip()))


class Confirm(ModalScreen[bool]):
    """Enter does it, Escape does not: `app.push_screen(Confirm(...), callback)` gets True or False.

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


@dataclass(frozen=True, slots=True)
class HelpText:
    """What F1 shows for one thing."""

    title: str
    lines: Sequence[tuple[str, str]] | str
    """Pairs of a word and what it means, or a text."""
    command: tuple[str, ...] = ()
    """Words after `windtunnel` that print the same, where a command does."""


class Drawn(Widget):
    """Shows what a function draws for the widget's size."""

    def __init__(self, waiting: str = "", *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._draw: Callable[[Size], Content] = lambda _: Content.styled(waiting, "$muted")

    def show(self, draw: Callable[[Size], Content]) -> None:
        self._draw = draw
        self.refresh()

    def render(self) -> RenderResult:
        return self._draw(self.size)


class TextPane(Pane):
    """A pane of text that scrolls with the arrows and vim keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "scroll_down", show=False),
        Binding("up,k", "scroll_up", show=False),
        Binding("g", "scroll_home", show=False),
        Binding("G", "scroll_end", show=False),
    ]

    def __init__(
        self,
        title: str,
        text: Content = Content(""),  # noqa: B008 (never changed)
        *,
        subtitle: str = "",
        id: str | None = None,  # noqa: A002 (Textual's name)
    ) -> None:
        static = Static(text, markup=False)
        super().__init__(
            static, title=title, subtitle=subtitle, can_focus=True, id=id, classes="text"
        )


class HelpPanel(Vertical):
    """What one thing means, and every key that works here."""

    def __init__(self, text: HelpText, keys: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._text = text
        self._keys = keys

    def compose(self) -> ComposeResult:
        note = f"the same text: windtunnel {' '.join(self._text.command)}"
        yield TextPane(
            visible(self._text.title, one_line=True),
            _help_content(self._text.lines),
            subtitle=note if self._text.command else "",
        )
        yield TextPane("keys here", columns(self._keys, "bold $accent"))


class ProblemPanel(Vertical):
    """What happened, why, what was kept and what to do; then what can be chosen.

    Choosing calls `close` and then the chosen function.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "copy", "copy this as text", show=False),
        Binding("enter", "close", "close", show=False),
    ]

    def __init__(
        self,
        error: UserError,
        *,
        kept: str,
        actions: Sequence[tuple[str, Callable[[], None]]],
        close: Callable[[], None],
    ) -> None:
        super().__init__()
        parts = (("what", error.what), ("why", error.why), ("kept", kept), ("fix", error.fix))
        self._lines = [(name, visible(text)) for name, text in parts if text]
        self._actions = actions
        self._close = close

    def compose(self) -> ComposeResult:
        with Pane(title="what happened", subtitle="y copies this", can_focus=not self._actions):
            yield Static(columns(self._lines, "bold $error"), markup=False)
            if self._actions:
                yield Choices([Content(visible(name, one_line=True)) for name, _ in self._actions])

    def on_choices_chosen(self, message: Choices.Chosen) -> None:
        message.stop()
        _, act = self._actions[message.choices.cursor]
        self._close()
        act()

    def action_close(self) -> None:
        self._close()

    def action_copy(self) -> None:
        self.app.copy_to_clipboard("\n".join(f"{name}: {text}" for name, text in self._lines))


def columns(lines: Sequence[tuple[str, str]], style: str) -> Content:
    """Pairs below each other, the first words in a column of their own width."""
    width = max((len(word) for word, _ in lines), default=0) + 2
    return Content("\n").join(
        Content.assemble((f"{word:<{width}}", style), text.replace("\n", "\n" + " " * width))
        for word, text in lines
    )


def sentences(error: UserError, kept: str = "") -> Content:
    """What, why, what was kept and the fix, each behind its word."""
    parts = (("what", error.what), ("why", error.why), ("kept", kept), ("fix", error.fix))
    return columns([(word, visible(text)) for word, text in parts if text], "bold $error")


def _help_content(lines: Sequence[tuple[str, str]] | str) -> Content:
    if isinstance(lines, str):
        return Content(visible(lines))
    return columns([(visible(word), visible(text)) for word, text in lines], "$muted")

"""The panels that stand in place of a page's body: help for one thing, and a problem."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from engine.errors import UserError
from engine.visible import visible
from tui.widgets.choices import Choices
from tui.widgets.pane import Pane


@dataclass(frozen=True, slots=True)
class HelpText:
    """What F1 shows for one thing."""

    title: str
    lines: Sequence[tuple[str, str]] | str
    """Pairs of a word and what it means, or a text."""
    command: tuple[str, ...] = ()
    """Words after `windtunnel` that print the same, where a command does."""


class TextPane(Pane):
    """A pane of text that scrolls with the arrows and vim keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "scroll_down", show=False),
        Binding("up,k", "scroll_up", show=False),
        Binding("g", "scroll_home", show=False),
        Binding("G", "scroll_end", show=False),
    ]

    def __init__(self, title: str, text: Content, *, subtitle: str = "") -> None:
        super().__init__(
            Static(text, markup=False),
            title=title,
            subtitle=subtitle,
            can_focus=True,
            classes="text",
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


def _help_content(lines: Sequence[tuple[str, str]] | str) -> Content:
    if isinstance(lines, str):
        return Content(visible(lines))
    return columns([(visible(word), visible(text)) for word, text in lines], "$muted")

"""The frame that every page shares: two rows above, the command and the keys below, a body between.

A page fills the body and says what its verdict, command and keys are; how they are drawn, what
replaces the body (a problem, help) and what too small a terminal shows is decided here once.
"""

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

from textual.app import ComposeResult, RenderResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.screen import Screen
from textual.widget import Widget

from engine.errors import UserError
from engine.report import Mark
from engine.visible import visible
from tui.line import MARK_STYLES
from tui.widgets.choices import Choices
from tui.widgets.pane import Confirm, Drawn, Field, HelpPanel, HelpText, Pane, ProblemPanel


@dataclass(frozen=True, slots=True)
class Key:
    """One hint of the bottom row."""

    key: str
    """As it is printed: enter, space, F1, n/p."""
    label: str
    priority: int = 0
    """Where there is no room, hints of a lower priority go first."""


HELP_KEY: Final = Key("F1", "help")
_KEPT: Final = frozenset({"enter", "esc", "escape", "f1"})
_GAP: Final = "   "


def fit_keys(keys: Sequence[Key], width: int) -> list[Key]:
    """The hints that fit into `width` cells, in their order.

    Hints are left out whole, those of a low priority first, among equals those nearest the middle
    of the row, unless they are short enough; enter, escape and F1 always stay.
    """
    middle = (len(keys) - 1) / 2
    places = range(len(keys))
    shown = {place for place in places if keys[place].key.lower() in _KEPT}
    for place in sorted(places, key=lambda at: (-keys[at].priority, -abs(at - middle), at)):
        tried = [keys[at] for at in sorted(shown | {place})]
        if _width(tried) <= width:
            shown.add(place)
    return [keys[place] for place in sorted(shown)]


def _width(keys: Sequence[Key]) -> int:
    return sum(len(key.key) + 1 + len(key.label) for key in keys) + len(_GAP) * (len(keys) - 1)


class KeyRow(Widget):
    """The page's keys; F1 is added to every page."""

    keys: reactive[Sequence[Key]] = reactive(())

    def render(self) -> RenderResult:
        keys = list(self.keys)
        if not any(key.key == HELP_KEY.key for key in keys):
            keys.append(HELP_KEY)
        parts = [
            Content.assemble((key.key, "bold $accent"), f" {key.label}")
            for key in fit_keys(keys, self.size.width)
        ]
        return Content(_GAP).join(parts)


class CommandLine(Widget):
    """`$ windtunnel ...`: the equivalent of what the page is about to do."""

    command: reactive[str] = reactive("")
    """As it can be pasted into a shell; empty where nothing is equivalent."""

    def render(self) -> RenderResult:
        if not self.command:
            return Content()
        return Content.assemble(("$ ", "$primary"), visible(self.command, one_line=True))


STEPS: Final = ("Machine", "Model", "Data", "Preview", "Plan", "Review")


def verdict(mark: Mark, word: str, text: str) -> Content:
    """The mark and the word in bold, in the colour of the mark, then the sentence."""
    judges = MARK_STYLES[mark] in ("$success", "$warning", "$error")
    style = f"bold {MARK_STYLES[mark] if judges else '$lit'}"
    head = " ".join(each for each in (mark, word) if each)
    return Content.assemble((head, style), ("  " if head and text else "", ""), (text, ""))


class StepBar(Widget):
    """A tick for a step that is done, a filled dot for here, a ring for later.

    On a page that is no step the verdict stands in their place. `title` (the device) is shown at
    the right end where there is room for it.
    """

    title: reactive[str] = reactive("")
    verdict: reactive[Content] = reactive(Content())

    def __init__(self, step: str) -> None:
        super().__init__()
        self._step = step

    def render(self) -> RenderResult:
        line = Content.assemble(("windtunnel", "bold $primary"), "  ", self._place())
        if line.cell_length > self.size.width and self._step:
            line = self._place()
        title = Content.styled(self.title, "$muted")
        spare = self.size.width - line.cell_length - title.cell_length
        return Content.assemble(line, " " * spare, title) if spare >= 2 else line

    def _place(self) -> Content:
        if not self._step:
            return self.verdict
        here = STEPS.index(self._step)
        parts = []
        for index, name in enumerate(STEPS):
            if index == here:
                parts.append(Content.styled(f"● {name}", "bold $lit"))
            else:
                mark, style = ("✓", "$muted") if index < here else ("○", "$faint")
                parts.append(Content.styled(f"{mark} {name}", style))
        return Content("  ").join(parts)


class Verdict(Drawn):
    """The second row of a step: its name, then the verdict."""


if TYPE_CHECKING:
    from engine.wizard.question import Confirm as Asked
    from tui.app import WindtunnelApp

__all__ = ["STEPS", "HelpText", "Key", "Page"]

MIN_COLUMNS: Final = 60
MIN_ROWS: Final = 18
WIDE_COLUMNS: Final = 100
TALL_ROWS: Final = 30

AnyWidget = TypeVar("AnyWidget", bound=Widget)

_WHILE_COVERED: Final = frozenset({"back", "help"})


class RowsCounted(Message):
    """The plan has the rows of its config now, or the reason why it has not."""


class TooSmall(Widget):
    """All that is shown of a page in a terminal that cannot hold it."""

    def render(self) -> RenderResult:
        width, height = self.app.size
        needs = f"needs {MIN_COLUMNS} columns and {MIN_ROWS} rows, has {width}x{height}"
        return Content(f"{needs}; --plain works at any size")


class Page(Screen[None]):
    """One screen of the wizard. A subclass composes its panes in `compose_body`.

    Classes for the stylesheet: `-narrow` or `-wide` (from 100 columns), `-short` or `-tall` (from
    30 rows).
    """

    STEP: ClassVar[str] = ""
    """One of STEPS; empty on Train and Runs, whose verdict stands in the first row."""
    KEYS: ClassVar[tuple[Key, ...]] = ()

    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012
        (0, "-too-small"),
        (MIN_COLUMNS, "-narrow"),
        (WIDE_COLUMNS, "-wide"),
    ]
    VERTICAL_BREAKPOINTS = [  # noqa: RUF012
        (0, "-too-low"),
        (MIN_ROWS, "-short"),
        (TALL_ROWS, "-tall"),
    ]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "accept", "go on", show=False),
        Binding("escape", "back", "back", show=False),
        Binding("tab", "app.focus_next", "next pane", show=False),
        Binding("shift+tab", "app.focus_previous", "previous pane", show=False),
        Binding("f1", "help", "help with what has the focus", show=False),
        Binding("y", "copy_command", "copy the command", show=False),
    ]

    app: "WindtunnelApp"

    def __init__(self) -> None:
        super().__init__()
        self._panel: Widget | None = None
        self._focus_below: Widget | None = None
        self._keys_below: Sequence[Key] = ()

    def compose(self) -> ComposeResult:
        yield StepBar(self.STEP)
        if self.STEP:
            yield Verdict(f"{self.STEP}  ")
        with Vertical(id="body"):
            yield from self.compose_body()
        yield CommandLine()
        keys = KeyRow()
        keys.keys = self.KEYS
        yield keys
        yield TooSmall()

    def compose_body(self) -> ComposeResult:
        yield from ()

    def part(self, kind: type[AnyWidget]) -> AnyWidget:
        """The first widget of this kind in the body, whatever covers it. A panel may hold one too,
        and a search of the whole page finds that one first."""
        return self.query_one("#body").query_one(kind)

    def say(self, mark: Mark, word: str, text: str = "", short: str = "") -> None:
        """The page's answer: one of `✓ ! ✗ · ▶ ?`, the verdict's word, and one sentence.

        A step says `short` where the row has no room for `text`.
        """
        content = verdict(mark, word, visible(text, one_line=True))
        if self.STEP:
            name = (f"{self.STEP}  ", "$muted")
            whole = Content.assemble(name, content)
            cut = Content.assemble(name, verdict(mark, word, visible(short, one_line=True)))
            self.query_one(Verdict).show(
                lambda size: cut if short and whole.cell_length > size.width else whole
            )
        else:
            self.query_one(StepBar).verdict = content

    def show_command(self, words: Sequence[str]) -> None:
        """The equivalent command, its words after `windtunnel`; none where there is no such."""
        command = shlex.join(["windtunnel", *words]) if words else ""
        self.query_one(CommandLine).command = command

    def show_keys(self, keys: Sequence[Key]) -> None:
        """Other hints than KEYS."""
        if self._panel:
            self._keys_below = keys
        else:
            self.query_one(KeyRow).keys = keys

    def show_title(self, text: str) -> None:
        """The right end of the first row: the device."""
        self.query_one(StepBar).title = visible(text, one_line=True)

    @property
    def parting(self) -> str:
        """A line to print when the app ends while this page has something to say."""
        return ""

    @property
    def is_covered(self) -> bool:
        return self._panel is not None

    def cover(self, panel: Widget, keys: Sequence[Key]) -> None:
        """Put a panel in place of the body until Escape; what the body holds stays as it is."""
        if self._panel:
            self._panel.remove()
        else:
            self._focus_below = self.focused
            self._keys_below = self.query_one(KeyRow).keys
            self.add_class("-covered")
        self._panel = panel
        self.query_one(KeyRow).keys = keys
        self.mount(panel, before=self.query_one(CommandLine))
        panel.add_class("cover")
        self.call_after_refresh(self._focus_cover, panel)

    def uncover(self) -> None:
        if not self._panel:
            return
        self._panel.remove()
        self._panel = None
        self.remove_class("-covered")
        self.query_one(KeyRow).keys = self._keys_below
        if self._focus_below and self._focus_below.is_attached:
            self.set_focus(self._focus_below)

    def show_problem(
        self,
        error: UserError,
        *,
        kept: str = "",
        actions: Sequence[tuple[str, Callable[[], None]]] = (),
    ) -> None:
        """What, why, kept and fix in place of the body; Escape closes it and loses nothing.

        `actions` are offered as a list, the first one highlighted: it must be safe to Enter.
        """
        keys = [Key("enter", "do it")] if actions else []
        self.cover(
            ProblemPanel(error, kept=kept, actions=actions, close=self.uncover),
            [*keys, Key("y", "copy this"), Key("esc", "close")],
        )

    @contextmanager
    def showing_refusals(self) -> Iterator[None]:
        """What is refused inside stands in place of the body."""
        try:
            yield
        except UserError as error:
            self.show_problem(error)

    def ask_again(self, asked: "Asked", then: Callable[[], object]) -> None:
        """Ask what a step asks again; `then` is done where the person agrees."""

        def answered(agreed: bool | None) -> None:
            if agreed:
                then()

        self.app.push_screen(Confirm(asked.title, asked.text, yes=asked.yes, no=asked.no), answered)

    def help_for(self, focused: Widget | None) -> HelpText:
        """What F1 shows; a page overrides it for its own fields."""
        title = self.STEP or self.__class__.__name__.removesuffix("Page")
        return HelpText(title, [(key.key, key.label) for key in self.query_one(KeyRow).keys])

    def refresh_from_draft(self) -> None:
        """Called whenever the page is shown again: the draft may have changed meanwhile."""

    def action_accept(self) -> None:
        self.app.next_step()

    def on_choices_chosen(self, message: Choices.Chosen) -> None:
        message.stop()
        self.choose(message.choices)

    def choose(self, choices: Choices) -> None:
        """What Enter does on a line of a list."""
        self.action_accept()

    def action_back(self) -> None:
        """Escape: close what covers the page, else go to the page before."""
        if self._panel:
            self.uncover()
        else:
            self.app.previous_step()

    def action_help(self) -> None:
        if isinstance(self._panel, HelpPanel):
            self.uncover()
            return
        if not self._panel:
            text = self.help_for(self.focused)
            self.cover(HelpPanel(text, self._actions()), [Key("esc", "close")])

    def action_copy_command(self) -> None:
        command = self.query_one(CommandLine).command
        if command:
            self.app.copy(command, "the command")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The page's own actions wait while something covers the body."""
        return not self._panel or action in _WHILE_COVERED

    def on_screen_resume(self) -> None:
        self.refresh_from_draft()

    def _focus_cover(self, panel: Widget) -> None:
        if panel is self._panel and panel.is_attached:
            for each in (panel, *panel.query("*")):
                if each.focusable:
                    self.set_focus(each)
                    return

    def _actions(self) -> list[tuple[str, str]]:
        """Keys and what they do here, what has the focus first."""
        found: dict[str, str] = {}
        for active in self.active_bindings.values():
            binding = active.binding
            if binding.description and active.enabled:
                shown = self.app.get_key_display(binding)
                before = found.get(binding.description)
                found[binding.description] = f"{before}, {shown}" if before else shown
        return [(shown, description) for description, shown in found.items()]


class PathField(Field):
    """For a path or a hub id: tab completes what is on the disk, the pane around shows what goes on
    like the text. Posts Left."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "complete", "complete the path", show=False, priority=True),
    ]
    KEYS: ClassVar[tuple[Key, ...]] = (
        Key("enter", "read it"),
        Key("tab", "complete"),
        Key("esc", "leave the field"),
    )

    class Left(Field.Left):
        """The field gave up the focus."""

    def on_focus(self) -> None:
        if isinstance(self.screen, Page):
            self.screen.show_keys(self.KEYS)

    def on_blur(self) -> None:
        if isinstance(self.screen, Page):
            self.screen.show_keys(self.screen.KEYS)

    def action_complete(self) -> None:
        from engine.wizard.data import complete_path  # the first frame does not wait for it

        completed, names = complete_path(self.value, Path.cwd())
        if not names:
            self.screen.focus_next()
            return
        self.value = completed
        self.cursor_position = len(completed)
        if isinstance(self.parent, Pane):
            shown = "  ".join(visible(name, one_line=True) for name in names)
            self.parent.show_subtitle(shown if len(names) > 1 else "")

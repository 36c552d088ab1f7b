"""The Plan page prints the wizard's fifth step: a value changes, bar, verdict and reasons follow.

The rungs that make a plan fit and other GPUs for it stand in panes beside the settings where there
is room, and over the settings when asked for.
"""

from collections.abc import Sequence
from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from engine.config.schema import explain_key
from engine.errors import UserError
from engine.plan import Alternative, Device, Estimate
from engine.report import VERDICT_MARKS
from engine.units import GIB
from engine.visible import fold, visible
from engine.wizard.machine import named_cards
from engine.wizard.plan import (
    ALL,
    CARDS,
    FIT,
    FITS_ALREADY,
    MEASURE,
    RECOMMENDED,
    Card,
    PlanStep,
    amounts_text,
    faster_sentence,
    list_cards,
    list_rungs,
    plan_command,
    what_to_know,
)
from engine.wizard.question import Work
from tui.line import MARK_STYLES
from tui.page import HelpText, Key, Page
from tui.widgets.choices import Choices, Fields
from tui.widgets.memory_bar import MemoryBar
from tui.widgets.pane import Pane

_BESIDE_CELLS: Final = 42
"""Of a line in a pane beside the settings, its scroll bar not counted."""
_TYPED_NUMBERS: Final = "a digit types a number, left and right step through the usual values"


_INDENT: Final = "    "


def rung_lines(rungs: Sequence[Alternative], columns: int | None = None) -> list[Content]:
    """One line a rung: what changes, what is then needed, and the cost.

    In `columns` the cost stands below, in lines of its own that are broken between words.
    """
    lines = []
    for rung in rungs:
        mark, style = _mark(rung.estimate)
        below = fold(rung.trade, columns and columns - len(_INDENT))
        cost = f"  {rung.trade}" if columns is None else "".join(f"\n{_INDENT}{x}" for x in below)
        lines.append(
            Content.assemble(
                f"{rung.name:<34}{rung.estimate.device_bytes / GIB:>6.1f} ",
                (mark, style),
                (cost, "$muted"),
            )
        )
    return lines


def card_lines(cards: Sequence[Card], here: Device) -> list[Content]:
    """One line a card: what it can give, the verdict, what is left or missing."""
    lines = []
    for card in cards:
        mark, style = _mark(card.needs)
        spare = card.needs.spare_bytes / GIB
        name = f"{card.device.name:<24}"
        lines.append(
            Content.assemble(
                (name, "$lit" if card.device.name == here.name else ""),
                f"{card.device.can_give_bytes / GIB:>6.1f} ",
                (mark, style),
                (f"{spare:>+8.1f}", "$muted"),
            )
        )
    return lines


def _mark(needs: Estimate) -> tuple[str, str]:
    mark = VERDICT_MARKS[needs.verdict]
    return mark, MARK_STYLES[mark]


class PlanPage(Page):
    """Does it fit, with every value and its reason."""

    STEP = "Plan"
    KEYS: ClassVar[tuple[Key, ...]] = (
        Key("enter", "accept", 9),
        Key("←→", "change", 8),
        Key("f", "make it fit", 7),
        Key("g", "other GPUs", 6),
        Key("F", "measure here", 1),
        Key("u", "recommended", 3),
        Key("a", "all settings", 2),
        Key("esc", "back", 9),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f", "make_fit", "make it fit", show=False),
        Binding("F", "measure", "measure it here, on random weights", show=False),
        Binding("g", "other_gpus", "the same plan on other GPUs", show=False),
        Binding("u", "recommended", "the recommended value", show=False),
        Binding("a", "all_settings", "all settings", show=False),
    ]
    CSS = """
    PlanPage #settings { height: 1fr; width: 1fr; }
    PlanPage #beside { display: none; width: 48; height: 100%; }  /* _BESIDE_CELLS and frames */
    PlanPage.-wide #beside { display: block; }
    PlanPage #beside Pane { height: 1fr; }
    PlanPage #beside Static { width: 100%; height: auto; text-wrap: nowrap; }
    PlanPage #reason { height: auto; max-height: 6; padding: 0 2; color: $muted; }
    PlanPage #plan { height: 1fr; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._wrong: tuple[str, str] | None = None

    def compose_body(self) -> ComposeResult:
        yield MemoryBar()
        with Horizontal(id="plan"):
            with Pane(title="settings", id="settings"):
                yield Fields(id="fields")
            with Vertical(id="beside"):
                with Pane(title="make it fit", subtitle="f takes them"):
                    yield Static(id="rungs", markup=False)
                with Pane(title="same plan on other GPUs", subtitle="g chooses one"):
                    yield Static(id="cards", markup=False)
        yield Static(id="reason", markup=False)

    def on_mount(self) -> None:
        self.part(Fields).focus()

    @property
    def _step(self) -> PlanStep:
        return self.app.wizard.plan

    def refresh_from_draft(self) -> None:
        self._wrong = None
        self._show_plan()

    def on_rows_counted(self) -> None:
        self._show_plan()

    def _show_plan(self) -> None:
        self.app.count_rows()
        draft = self.app.draft
        try:
            advice = draft.advice()
        except UserError as error:
            self.say("✗", "no plan", f"{error.what} {error.fix}")
            self.show_problem(error)
            return
        needs, device = advice.estimate, draft.device
        assert device is not None
        line = self._step.verdict()
        self.say(line.mark, line.label, line.text, self._step.verdict(named=False).text)
        known = visible(what_to_know(draft), one_line=True)
        self.query_one("#settings", Pane).show_subtitle(known)
        planned = " (planned)" if device.planned else ""
        self.show_title(f"{named_cards(device)}{planned}")
        self.part(MemoryBar).show_estimate(needs, device)
        self.part(Fields).show_fields(self._step.fields(self._wrong))
        self.show_command(plan_command(draft))
        self._show_beside()
        self._show_reason()

    def _show_beside(self) -> None:
        if not self.has_class("-wide"):
            return
        draft = self.app.draft
        assert draft.device is not None
        rungs = list_rungs(draft)
        if rungs:
            lines = rung_lines(rungs, _BESIDE_CELLS)
        else:  # what the room that is left could be used for
            faster = faster_sentence(draft)
            more = fold(faster, _BESIDE_CELLS) if faster else []
            lines = [*map(Content, (FITS_ALREADY, *more))]
        self.query_one("#rungs", Static).update(Content("\n").join(lines))
        lines = card_lines(list_cards(draft), draft.device)
        self.query_one("#cards", Static).update(Content("\n").join(lines))

    def on_resize(self) -> None:
        self.call_after_refresh(self._show_plan)

    def _show_reason(self) -> None:
        """The whole reason of the value under the cursor, and what the run amounts to."""
        field = self.part(Fields).field
        if field is None:
            return
        amounts = amounts_text(self.app.draft.advice())
        reason = visible(field.reason, one_line=True)
        first = Content.assemble((f"{field.key}  ", "$lit"), reason)
        self.query_one("#reason", Static).update(Content("\n").join([first, Content(amounts)]))

    # --- keys

    def on_fields_moved(self) -> None:
        if self._wrong:
            self._wrong = None
            self._show_plan()
        else:
            self._show_reason()

    def on_fields_changed(self, message: Fields.Changed) -> None:
        try:
            self._step.change(message.key, message.text)
            self._wrong = None
        except UserError as error:
            self._wrong = (message.key, f"{error.what} {error.why}")
        self._show_plan()

    def action_accept(self) -> None:
        if self._wrong:
            words = "the value that was typed is not one; correct it, or u for the recommended"
            self.app.notify(words, severity="warning", markup=False)
            return
        self.app.next_step()

    def action_recommended(self) -> None:
        field = self.part(Fields).field
        if field is not None:
            self._step.change(field.key, RECOMMENDED)
            self._wrong = None
            self._show_plan()

    def action_all_settings(self) -> None:
        with self.showing_refusals():
            self._step.take(ALL, "")
            self._show_plan()

    def action_make_fit(self) -> None:
        with self.showing_refusals():
            self._step.take(FIT, "")
            rungs = self._step.rungs
            if not rungs:
                self._step.back()
                self.app.notify(FITS_ALREADY, timeout=3, markup=False)
                return
            enough = rungs[-1].estimate.verdict != "does not fit"
            note = "enter on a line takes it and all above" if enough else "all are not enough: g"
            title = "what would fit, least change first"
            self._open(title, rung_lines(rungs), note, len(rungs) - 1, "take them")

    def action_other_gpus(self) -> None:
        with self.showing_refusals():
            self._step.take(CARDS, "")
            device, cards = self.app.draft.device, self._step.cards
            assert device is not None
            title = "the same plan on other GPUs: what each can give, and what is left"
            here = next((n for n, card in enumerate(cards) if card.device.name == device.name), 0)
            self._open(title, card_lines(cards, device), "enter plans for it", here, "plan for it")

    def _open(self, title: str, lines: list[Content], note: str, cursor: int, enter: str) -> None:
        choices = Choices(lines)
        choices.set_reactive(Choices.cursor, cursor)
        panel = Pane(choices, title=title, subtitle=note)
        self.cover(panel, [Key("enter", enter), Key("esc", "close")])

    def choose(self, choices: Choices) -> None:
        self._step.take(f"{choices.cursor}", "")
        self.uncover()
        self._show_plan()

    def uncover(self) -> None:
        self._step.back()
        super().uncover()

    def action_measure(self) -> None:
        """Build the real shape with random weights and make a few steps of it, in a process."""
        step = self._step
        if step.measuring:
            return
        try:
            step.take(MEASURE, "")
        except UserError as error:
            self.app.notify(f"{error.what} {error.why}", severity="warning", markup=False)
        else:
            work = step.work()
            assert work is not None
            self.app.notify(work.waiting, timeout=10, markup=False)
            self.run_worker(self._measure(work))

    async def _measure(self, work: Work) -> None:
        found = await self.app.perform(work)
        self._step.receive(work, found)
        if isinstance(found, UserError):
            self.show_problem(found)
        else:
            self.app.notify(visible(f"{found}", one_line=True), timeout=20, markup=False)
            self._show_plan()

    def help_for(self, focused: Widget | None) -> HelpText:
        field = self.part(Fields).field
        if field is None:
            return super().help_for(focused)
        found = explain_key(field.key)[0]
        lines = [("means", found.meaning), ("takes", found.takes), ("default", found.default)]
        lines += [("here", field.reason), ("keys", _TYPED_NUMBERS)]
        return HelpText(field.key, lines, ("explain", field.key))

"""The page on which memory is seen: a value changes, and bar, verdict and reasons follow."""

import asyncio
from pathlib import Path
from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from engine.config import RunConfig
from engine.config.schema import explain_key
from engine.data.sources import with_absolute_paths
from engine.errors import UserError
from engine.report.plan import plan_verdict
from engine.visible import visible
from engine.wizard.draft import set_value
from engine.wizard.plan import (
    MEASURING,
    Card,
    amounts_text,
    list_cards,
    list_fields,
    list_rungs,
    measure_plan,
    plan_command,
    what_to_know,
)
from tui.page import HelpText, Key, Page
from tui.screens.plan.comparisons import card_lines, roomy_lines, rung_lines
from tui.widgets.choices import Choices, Fields
from tui.widgets.memory_bar import MemoryBar
from tui.widgets.pane import Pane

_BESIDE_CELLS: Final = 42
"""Of a line in a pane beside the settings, its scroll bar not counted."""
_TYPED_NUMBERS: Final = "a digit types a number, left and right step through the usual values"


class ChoicePanel(Pane):
    """Lines to choose from, in place of the settings."""

    def __init__(
        self, title: str, lines: list[Content], *, note: str, about: str, cursor: int
    ) -> None:
        choices = Choices(lines)
        choices.set_reactive(Choices.cursor, cursor)
        super().__init__(choices, title=title, subtitle=note)
        self.about = about


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
        self._every = False
        self._wrong: tuple[str, str] | None = None
        self._cards: list[Card] = []
        self._measuring = False

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
        line = plan_verdict(needs, device)
        self.say(line.mark, line.label, line.text)
        self.query_one("#settings", Pane).show_subtitle(
            visible(what_to_know(self.app.draft), one_line=True)
        )
        planned = " (planned)" if device.planned else ""
        self.show_title(f"{device.name}{planned}")
        self.part(MemoryBar).show_estimate(needs, device)
        fields = list_fields(draft, every=self._every, wrong=self._wrong)
        self.part(Fields).show_fields(fields)
        self.show_command(plan_command(draft))
        self._show_beside()
        self._show_reason()

    def _show_beside(self) -> None:
        if not self.has_class("-wide"):
            return
        draft = self.app.draft
        assert draft.device is not None
        rungs = list_rungs(draft)
        lines = rung_lines(rungs, _BESIDE_CELLS) if rungs else roomy_lines(draft, _BESIDE_CELLS)
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
            set_value(self.app.draft, message.key, message.text)
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
            self.app.draft.reset(field.key)
            self._wrong = None
            self._show_plan()

    def action_all_settings(self) -> None:
        self._every = not self._every
        self._show_plan()

    def action_make_fit(self) -> None:
        rungs = list_rungs(self.app.draft)
        if not rungs:
            self.app.notify("it fits as it is", timeout=3, markup=False)
            return
        enough = rungs[-1].estimate.verdict != "does not fit"
        note = "enter on a line takes it and all above" if enough else "all are not enough: g"
        panel = ChoicePanel(
            "what would fit, least change first",
            rung_lines(rungs),
            note=note,
            about="rungs",
            cursor=len(rungs) - 1,
        )
        self.cover(panel, [Key("enter", "take them"), Key("esc", "close")])

    def action_measure(self) -> None:
        """Build the real shape with random weights and make a few steps of it, in a process."""
        device = self.app.draft.device
        assert device is not None
        if device.planned:
            words = f"{device.name} is not here: it can be planned for, and not measured"
            self.app.notify(words, severity="warning", markup=False)
        elif not self._measuring:
            self._measuring = True
            self.app.notify(MEASURING[device.kind], timeout=10, markup=False)
            config = with_absolute_paths(self.app.draft.config(), Path.cwd())
            self.run_worker(self._measure(config))

    async def _measure(self, config: RunConfig) -> None:
        with self.showing_refusals():
            sentence = await asyncio.to_thread(measure_plan, config)
            self.app.notify(visible(sentence, one_line=True), timeout=20, markup=False)
            self.app.draft.look_again()
            self._show_plan()
        self._measuring = False

    def action_other_gpus(self) -> None:
        draft = self.app.draft
        assert draft.device is not None
        self._cards = list_cards(draft)
        lines = card_lines(self._cards, draft.device)
        title = "the same plan on other GPUs: what each can give, and what is left"
        names = [card.device.name for card in self._cards]
        here = names.index(draft.device.name) if draft.device.name in names else 0
        note = "enter plans for it"
        panel = ChoicePanel(title, lines, note=note, about="cards", cursor=here)
        self.cover(panel, [Key("enter", "plan for it"), Key("esc", "close")])

    def on_choices_chosen(self, message: Choices.Chosen) -> None:
        message.prevent_default()  # Page's own handler would go on to the next step
        message.stop()
        panel = message.choices.parent
        assert isinstance(panel, ChoicePanel)
        draft = self.app.draft
        if panel.about == "rungs":
            for key, value in list_rungs(draft)[message.choices.cursor].changes.items():
                draft.change(key, value)
        else:
            draft.device = self._cards[message.choices.cursor].device
        self.uncover()
        self._show_plan()

    def help_for(self, focused: Widget | None) -> HelpText:
        field = self.part(Fields).field
        if field is None:
            return super().help_for(focused)
        found = explain_key(field.key)[0]
        lines = [("means", found.meaning), ("takes", found.takes), ("default", found.default)]
        lines += [("here", field.reason), ("keys", _TYPED_NUMBERS)]
        return HelpText(field.key, lines, ("explain", field.key))

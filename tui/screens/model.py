"""The Model page prints the wizard's second step: the model under the cursor is what the run starts
from.

The models are planned in a thread whenever the page is shown with another device. A folder or hub
id is read only after it was typed; nothing is fetched.
"""

import asyncio
from functools import partial
from typing import ClassVar, Final

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Input, Static

from engine.errors import UserError
from engine.plan import Device
from engine.report.plan import size
from engine.units import GIB
from engine.visible import visible
from engine.wizard.machine import named_cards
from engine.wizard.model import (
    HELP,
    OWN_HELP,
    OWN_LABEL,
    OWN_REASON,
    PLANNING,
    Candidate,
    ModelStep,
)
from tui.line import MARK_STYLES
from tui.page import HelpText, Key, Page, PathField
from tui.screens.machine.prospects import TITLE_CELLS, title_cells
from tui.widgets.choices import Choices
from tui.widgets.pane import Field, Pane, TextPane

_TITLE: Final = (
    f"{'models':<{TITLE_CELLS + 7}}{'needs':>6} with  verdict     reads thinks  download"
)


class ModelPage(Page):
    """The catalog on the chosen device, and why the one under the cursor."""

    STEP = "Model"
    KEYS = (
        Key("enter", "choose", 1),
        Key("/", "filter", 1),
        Key("o", "own model", 1),
        Key("esc", "back"),
    )
    CSS = """
    ModelPage #models { height: auto; max-height: 15; }
    ModelPage #models Input { display: none; }
    ModelPage #models.-typing PathField { display: block; }
    ModelPage #models.-filtering #filter { display: block; }
    ModelPage #why { height: 1fr; min-height: 5; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "filter the list", show=False),
        Binding("o", "own", "a folder or a hub id", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._device: Device | None = None
        self._is_planned = False
        """Whether it is known what fits on the device."""
        self._shown: list[Candidate] = []
        self._goes_on = False

    def compose_body(self) -> ComposeResult:
        with Pane(id="models", title=_TITLE, subtitle="/ filters, o takes your own"):
            yield Choices([Content.styled(PLANNING, "$muted")])
            yield PathField("a folder, or org/name; tab completes")
            yield Field("part of a name", id="filter")
        yield TextPane("why this one", id="why")

    def on_mount(self) -> None:
        self.part(Choices).focus()

    @property
    def _step(self) -> ModelStep:
        return self.app.wizard.model

    # --- the models on the device

    def refresh_from_draft(self) -> None:
        device = self.app.draft.device
        if device is None:
            self._device, self._is_planned = None, False
            self.say("·", "no device", "what fits depends on it: esc goes back to Machine")
            return
        planned = " (planned)" if device.planned else ""
        self.show_title(f"{named_cards(device)}{planned}")
        if self._is_planned and device == self._device and self._step.work() is None:
            self._show()
            self._show_here()
            return
        self._device, self._is_planned = device, False
        self.say("·", "planning", f"working out what fits on {named_cards(device)}")
        self._plan()

    @work(group="plan", exclusive=True)
    async def _plan(self) -> None:
        step, draft = self._step, self.app.draft
        while work := step.work():
            step.receive(work, await self.app.perform(work))
        if draft.device is None:  # taken back on the Machine page
            return
        question = await asyncio.to_thread(step.question)  # reads an own model
        self._is_planned = True
        self._show()
        self._point_at(draft.model or question.choices[question.recommended].key)
        if self._goes_on:
            self._goes_on = False
            self.action_accept()

    def _point_at(self, name: str) -> None:
        names = [candidate.name for candidate in self._shown]
        if name in names:
            self.part(Choices).cursor = names.index(name)
        else:
            self.part(Choices).cursor = len(names)
            self.part(PathField).value = name
            self._read(name)
        self._show_here()

    def _show(self) -> None:
        wanted = self.query_one("#filter", Input).value.strip().lower()
        self._shown = [
            each
            for each in self._step.candidates()
            if wanted in each.name.lower() or wanted in each.title.lower()
        ]
        lines = [_model_line(each, self._step.where_from(each)) for each in self._shown]
        lines.append(Content.assemble(OWN_LABEL, ("  o, then type or paste it", "$muted")))
        self.part(Choices).show_lines(lines)
        nothing = f'nothing matches "{wanted}": esc clears' if wanted and not self._shown else ""
        self.query_one("#models", Pane).show_subtitle(
            visible(nothing, one_line=True) or "/ filters, o takes your own"
        )

    # --- the line under the cursor

    @property
    def _here(self) -> Candidate | None:
        """None on the line for an own model."""
        cursor = self.part(Choices).cursor
        return self._shown[cursor] if cursor < len(self._shown) else None

    def on_choices_moved(self, message: Choices.Moved) -> None:
        message.stop()
        if self._is_planned:
            self._show_here()

    def _show_here(self) -> None:
        assert self._device is not None
        here = self._here
        self.query_one("#models").set_class(here is None, "-typing")
        assumed = ["--assume", named_cards(self._device)] if self._device.planned else []
        self.show_command(["models", *assumed])
        if here is None:
            self.say("·", "own model", "enter, then type a folder or org/name; enter reads it")
            self.query_one("#why Static", Static).update(Content.styled(OWN_REASON, "$muted"))
            return
        line = self._step.verdict(here)
        self.say(line.mark, visible(line.label, one_line=True), line.text)
        self.query_one("#why Static", Static).update(Content(visible(self._step.reason(here))))

    # --- a model of one's own

    def _read(self, name: str) -> None:
        self.say("·", "reading", name)
        self._read_typed(name)

    @work(group="own", exclusive=True)
    async def _read_typed(self, name: str) -> None:
        try:
            await asyncio.to_thread(self._step.read_own, name)
        except UserError as error:
            self._show_here()
            self.show_problem(error, kept=f"{name} is still in the field")
            return
        self._clear_filter()
        self._show()
        self._point_at(name)

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        if message.input.id == "filter":
            self.part(Choices).focus()
        elif name := message.value.strip():
            self._read(name)

    def on_input_changed(self, message: Input.Changed) -> None:
        message.stop()
        if message.input.id == "filter" and self._is_planned:
            here = self._here
            self._show()
            names = [candidate.name for candidate in self._shown]
            self.part(Choices).cursor = names.index(here.name) if here and here.name in names else 0
            self._show_here()

    def on_path_field_left(self) -> None:
        self.part(Choices).focus()

    def on_field_left(self) -> None:
        self._clear_filter()

    def _clear_filter(self) -> None:
        self.query_one("#filter", Input).value = ""
        self.query_one("#models").remove_class("-filtering")
        self.part(Choices).focus()

    # --- keys

    def action_filter(self) -> None:
        if self._is_planned:
            self.query_one("#models").add_class("-filtering")
            self.query_one("#filter").focus()

    def action_own(self) -> None:
        if self._is_planned:
            self.part(Choices).cursor = len(self._shown)
            self.part(PathField).focus()

    def action_back(self) -> None:
        """Escape: close what covers the page, then clear the filter, then go back."""
        if not self.is_covered and self.query_one("#models").has_class("-filtering"):
            self._clear_filter()
        else:
            super().action_back()

    def action_accept(self) -> None:
        """Take the model under the cursor; ask first where it cannot be trained on the device."""
        here = self._here
        if not self._is_planned:
            self._goes_on = self._device is not None
            if self._goes_on:
                self.say("·", "planning", "goes on when it is known what fits")
        elif here is None:
            self.part(PathField).focus()
        elif asked := self._step.confirm(here.name, ""):
            self.ask_again(asked, partial(self._take, here))
        else:
            self._take(here)

    def _take(self, candidate: Candidate) -> None:
        self._step.take(candidate.name, "")
        self.app.next_step()

    def help_for(self, focused: Widget | None) -> HelpText:
        if isinstance(focused, PathField):
            return HelpText("a model of your own", OWN_HELP)
        return HelpText("the model that the run starts from", HELP, ("models",))


def _model_line(candidate: Candidate, where: str) -> Content:
    plan, line = candidate.plan, candidate.verdict()
    style = "$muted" if candidate.is_blind else MARK_STYLES[line.mark]
    reads = "image" if candidate.sees else "text"
    return Content.assemble(
        title_cells(candidate.title).stylize("$muted" if candidate.is_blind else ""),
        f"{size(plan.estimate.total_parameters):>6}",
        f"{plan.estimate.device_bytes / GIB:>6.1f} {plan.config.adapter or 'full':<6}",
        (f"{line.mark} {line.label:<10}", style),
        (f"{reads:<6}{candidate.thinks:<8}{where}", "$muted"),
    )

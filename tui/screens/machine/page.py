"""The Machine page prints the wizard's first step: the device under the cursor is what the run will
compute on.

The page is drawn before anything is asked; a driver that hangs keeps nobody from leaving it.
"""

import asyncio
from typing import TYPE_CHECKING, ClassVar, Final

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from engine.wizard.machine import ASKING, HELP, PLAN, PLAN_ONLY, PLANNED, MachineStep
from engine.wizard.question import Choice, Question, Work
from tui.page import HelpText, Key, Page
from tui.screens.machine import wording
from tui.widgets.choices import Choices
from tui.widgets.pane import Pane, TextPane

if TYPE_CHECKING:
    from engine.plan import Device
    from engine.wizard.model import Survey
    from tui.screens.machine.planned import PlannedPanel

POLL_SECONDS: Final = 2.0
# Whoever holds the down key plans nothing on the way.
_SETTLE_SECONDS: Final = 0.15


class MachinePage(Page):
    """Devices; what the one under the cursor is good for; the rest of the computer."""

    STEP = "Machine"
    KEYS = (
        Key("enter", "use it", 1),
        Key("r", "look again", 1),
        Key("i", "processes"),
        Key("p", "plan for another"),
        Key("ctrl+q", "leave", 1),
    )
    CSS = """
    MachinePage #devices { height: auto; max-height: 8; }
    MachinePage #about { layout: vertical; height: 1fr; }
    MachinePage #good { height: 1fr; min-height: 5; }
    MachinePage #good Static { text-wrap: nowrap; text-overflow: ellipsis; }
    MachinePage #rest { height: auto; max-height: 6; }
    MachinePage.-tall #devices { max-height: 14; }
    MachinePage.-wide #about { layout: horizontal; }
    MachinePage.-wide #good { width: 1fr; }
    MachinePage.-wide #rest { width: 40; height: 100%; max-height: 100%; }
    PlannedPanel #known { height: 1fr; }
    PlannedPanel #why { height: auto; max-height: 7; }
    PlannedPanel #why Static { width: 100%; height: auto; min-height: 3; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "look_again", "look again", show=False),
        Binding("i", "processes", "what runs on the GPUs", show=False),
        Binding("p", "plan_for_another", "plan for another GPU", show=False),
    ]

    def __init__(self, poll_seconds: float = POLL_SECONDS) -> None:
        super().__init__()
        self._poll_seconds = poll_seconds
        self._question: Question | None = None
        """None until the driver has answered."""
        self._surveyed_now = ""
        self._goes_on = False

    def compose_body(self) -> ComposeResult:
        with Pane(id="devices", title="GPUs", subtitle="i shows what runs on them"):
            yield Choices([Content.styled(ASKING, "$muted")], id="choices")
        with Container(id="about"):
            yield TextPane("what it is good for", id="good")
            yield TextPane("the rest", id="rest")

    def on_mount(self) -> None:
        self.query_one("#choices").focus()
        self.show_command(["probe"])
        self.call_after_refresh(self._look)
        self._watch()

    @property
    def _step(self) -> MachineStep:
        return self.app.wizard.machine

    # --- what the driver says

    def _look(self) -> None:
        self.say("·", "looking", ASKING)
        self._ask()

    @work(group="read", exclusive=True)
    async def _ask(self) -> None:
        step = (await self.app.load()).machine
        work = step.look_again()
        self._receive(work, await self.app.perform(work))
        from engine.wizard.flow import live_runs

        for line in await asyncio.to_thread(live_runs):
            self.app.notify(f"{line.text}; F4 lists the runs", timeout=10, markup=False)
        assert step.machine is not None
        # What is wrong is seen before anything goes on unasked.
        if self._goes_on and all(each.severity != "error" for each in step.machine.problems):
            self.action_accept()
        self._goes_on = False

    @work(group="watch")
    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            if self._question is None or not self.is_current:
                continue
            work, before = self._step.watch(), self._step.machine
            found = await self.app.perform(work)
            if self._step.machine is before:
                self._receive(work, found)

    def _receive(self, work: Work, found: object) -> None:
        self._step.receive(work, found)
        if self._question is None:
            self._question = self._step.question()
            self.query_one("#choices", Choices).cursor = self._question.recommended
        self._show()

    # --- what is shown

    @property
    def _choice(self) -> Choice:
        assert self._question is not None
        return self._question.choices[self.query_one("#choices", Choices).cursor]

    def _show(self, key: str = "") -> None:
        """Print what is asked, the cursor on `key`, else on the line where it was."""
        if self._question is None or self.is_covered:
            return
        key = key or self._choice.key
        question = self._question = self._step.question()
        machine = self._step.machine
        assert machine is not None
        choices = self.query_one("#choices", Choices)
        cells = (choices.size.width or self.app.size.width - 4) - 2
        choices.show_lines(wording.choice_lines(question, machine, cells))
        keys = [choice.key for choice in question.choices]
        choices.cursor = keys.index(key) if key in keys else question.recommended
        rest = self.query_one("#rest", Pane)
        rest.query_one(Static).update(wording.rest(machine, self._cells(rest)))
        self._show_choice()

    def _cells(self, pane: Pane) -> int:
        return pane.scrollable_content_region.width or self.app.size.width - 4

    def _show_choice(self) -> None:
        choice = self._choice
        line = self._step.verdict(choice.key)
        self.say(line.mark, line.label, line.text)
        self.query_one("#good", Pane).show_subtitle("")
        if choice.key == PLAN:
            self._show_good("Enter lists GPUs that are not here, and what each of them holds.")
        elif choice.refusal:
            self._show_good("A run cannot use it now; the other lines can be taken.")
        else:
            device = self._step.device(choice.key)
            found = self.app.wizard.model.last(device)
            if found:
                self._show_survey(found)
            else:
                self._show_good("working out what fits…")
            # A poll that finds other figures does not begin it anew: it would never end.
            if not (found and found.holds_for(device)) and self._surveyed_now != choice.key:
                self._surveyed_now = choice.key
                self._survey(choice.key, device)

    def _show_good(self, text: str) -> None:
        self.query_one("#good Static", Static).update(Content.styled(text, "$muted"))

    @work(group="survey", exclusive=True)
    async def _survey(self, key: str, device: "Device") -> None:
        await asyncio.sleep(_SETTLE_SECONDS)
        step = self.app.wizard.model
        work = step.survey(device)
        step.receive(work, await self.app.perform(work))
        self._surveyed_now = ""
        if key == self._choice.key and not self.is_covered:
            self._show_choice()

    def _show_survey(self, found: "Survey") -> None:
        from tui.screens.machine.prospects import headline, prospect_lines

        if self._step.is_plain(self._choice.key):
            self.say("✓", "ready", headline(found))
        self.query_one("#good Static", Static).update(prospect_lines(found))
        on_cpu = found.device.kind == "cpu"
        note = "by memory; a real model takes days on a CPU" if on_cpu else "as recommended"
        self.query_one("#good", Pane).show_subtitle(note)

    def on_choices_moved(self) -> None:
        if self._question is not None and not self.is_covered:
            self._show_choice()

    def on_resize(self) -> None:
        self.call_after_refresh(self._show)

    # --- keys

    def action_accept(self) -> None:
        """Take the device under the cursor, or wait for the driver to name one."""
        if self._question is None:
            self._goes_on = True
            self.say("·", "looking", f"{ASKING} goes on when it answers")
        elif self._choice.key == PLAN:
            self.action_plan_for_another()
        elif self._choice.refusal:
            self._show_choice()
        else:
            self._step.take(self._choice.key, "")
            self.app.next_step()

    def action_look_again(self) -> None:
        if self._question is not None:
            self.app.wizard.model.forget()
        self._surveyed_now = ""
        self._look()

    def action_processes(self) -> None:
        if self._step.machine:
            found = wording.processes(self._step.machine)
            self.cover(TextPane("what runs on the GPUs", found), [Key("esc", "close")])

    def action_plan_for_another(self) -> None:
        from tui.screens.machine.planned import PlannedPanel

        self.say(PLAN_ONLY.mark, PLAN_ONLY.label, PLAN_ONLY.text)
        panel = PlannedPanel(self.app.wizard)
        self.cover(panel, [Key("enter", "plan for it"), Key("esc", "close")])

    def on_planned_panel_pointed(self, message: "PlannedPanel.Pointed") -> None:
        self.show_command(["models", "--assume", message.name] if message.name else ["probe"])

    def on_planned_panel_taken(self) -> None:
        self.uncover()
        self._show(PLANNED)
        self.app.next_step()

    def uncover(self) -> None:
        super().uncover()
        self.show_command(["probe"])
        self._show()

    def refresh_from_draft(self) -> None:
        self._show()

    def help_for(self, focused: Widget | None) -> HelpText:
        return HelpText("the device that the run computes on", HELP, ("probe",))

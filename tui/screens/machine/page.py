"""The Machine page: the device under the cursor is what the run will compute on.

The page is drawn before anything is asked; a driver that hangs keeps nobody from leaving it. What
it shows is what `read` and `poll` answer, in threads.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from engine.wizard.flow import live_runs
from engine.wizard.machine import ASKING, CPU, HELP, PLAN, PLAN_ONLY, named_cards
from tui.page import HelpText, Key, Page
from tui.screens.machine import wording
from tui.screens.machine.wording import Choice
from tui.widgets.choices import Choices
from tui.widgets.pane import Pane, TextPane

if TYPE_CHECKING:
    from engine.hardware import Machine
    from engine.plan import Device
    from engine.wizard.model import Survey
    from tui.screens.machine.planned import PlannedPanel

POLL_SECONDS: Final = 2.0
# Whoever holds the down key plans nothing on the way.
_SETTLE_SECONDS: Final = 0.15


def read_here() -> "Machine":
    """This computer, with the disk that runs are written to."""
    # Imported in the thread that asks: the first frame does not wait for it.
    from engine.hardware import read_machine
    from engine.runs import run_home

    return read_machine(disk=run_home())


def poll_here(machine: "Machine") -> "Machine":
    """The same cards again."""
    from engine.hardware import poll

    return poll(machine)


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

    def __init__(
        self,
        read: "Callable[[], Machine]" = read_here,
        poll: "Callable[[Machine], Machine]" = poll_here,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        super().__init__()
        self._read = read
        self._poll = poll
        self._poll_seconds = poll_seconds
        self._machine: Machine | None = None
        self._choices: list[Choice] = []
        self._surveys: dict[str, Survey] = {}
        self._surveyed_now = ""
        self._goes_on = False

    def compose_body(self) -> ComposeResult:
        with Pane(id="devices", title="GPUs", subtitle="i shows what runs on them"):
            yield Choices([Content.styled(ASKING, "$muted")], id="choices")
        with Container(id="about"):
            yield _text_pane("good", "what it is good for")
            yield _text_pane("rest", "the rest")

    def on_mount(self) -> None:
        self.query_one("#choices").focus()
        self.show_command(["probe"])
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        self._look()
        self._watch()

    # --- what the driver says

    def _look(self) -> None:
        self.say("·", "looking", ASKING)
        self._ask()

    @work(group="read", exclusive=True)
    async def _ask(self) -> None:
        machine = await asyncio.to_thread(self._read)
        # Imported in the thread: the planner takes longer to load than the driver to answer.
        best = PLAN if self._planned else await asyncio.to_thread(_best_key, machine)
        here = self._choice.key if self._machine else best
        self._receive(machine)
        self._point_at(here)
        for line in await asyncio.to_thread(live_runs):
            self.app.notify(f"{line.text}; F4 lists the runs", timeout=10, markup=False)
        if self._goes_on and not wording.blocks(machine):
            self.action_accept()
        self._goes_on = False

    @work(group="watch")
    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            before = self._machine
            if before is None or not self.is_current:
                continue
            silent = any(problem.id == "driver_silent" for problem in before.problems)
            # A driver that has found nothing yet may have been waking its cards.
            waking = silent and not before.gpus
            ask = self._read if waking else partial(self._poll, before)
            now = await asyncio.to_thread(ask)
            if self._machine is before:
                self._receive(now)

    def _receive(self, machine: "Machine") -> None:
        here = self._choice.key if self._machine else ""
        self._machine = machine
        self._choices = wording.list_choices(machine)
        if here:
            self._point_at(here)
        draft = self.app.draft
        if draft.device and any(
            choice.key == draft.device.uuid and choice.refusal for choice in self._choices
        ):
            draft.device = None
        self._show()

    def _point_at(self, key: str) -> None:
        keys = [choice.key for choice in self._choices]
        choices = self.query_one("#choices", Choices)
        place = keys.index(key) if key in keys else keys.index(CPU)
        if choices.cursor != place:
            choices.cursor = place
        else:
            self._show()

    # --- what is shown

    @property
    def _choice(self) -> Choice:
        return self._choices[self.query_one("#choices", Choices).cursor]

    @property
    def _planned(self) -> "Device | None":
        device = self.app.draft.device
        return device if device and device.planned else None

    def _show(self) -> None:
        machine = self._machine
        if machine is None or self.is_covered:
            return
        choices = self.query_one("#choices", Choices)
        name = named_cards(self._planned) if self._planned else ""
        cells = (choices.size.width or self.app.size.width - 4) - 2
        choices.show_lines(wording.choice_lines(self._choices, machine, name, cells))
        rest = self.query_one("#rest", Pane)
        rest.query_one(Static).update(wording.rest(machine, self._cells(rest)))
        self._show_choice(machine)

    def _cells(self, pane: Pane) -> int:
        return pane.scrollable_content_region.width or self.app.size.width - 4

    def _show_choice(self, machine: "Machine") -> None:
        choice = self._choice
        self.say(*wording.verdict(machine, choice))
        self.query_one("#good", Pane).show_subtitle("")
        if choice.key == PLAN:
            self._show_good("Enter lists GPUs that are not here, and what each of them holds.")
        elif choice.refusal:
            self._show_good("A run cannot use it now; the other lines can be taken.")
        elif found := self._surveys.get(choice.key):
            self._show_survey(found)
            self._survey_again_if_moved(choice, machine)
        else:
            self._show_good("working out what fits…")
            self._survey(choice, machine)

    def _show_good(self, text: str) -> None:
        self.query_one("#good Static", Static).update(Content.styled(text, "$muted"))

    def _survey_again_if_moved(self, choice: Choice, machine: "Machine") -> None:
        from tui.screens.machine.prospects import device_of, has_moved

        if has_moved(self._surveys[choice.key].device, device_of(choice, machine)):
            self._survey(choice, machine)

    def _survey(self, choice: Choice, machine: "Machine") -> None:
        # A poll that finds other figures does not begin it anew: it would never end.
        if self._surveyed_now != choice.key:
            self._surveyed_now = choice.key
            self._plan_for(choice, machine)

    @work(group="survey", exclusive=True)
    async def _plan_for(self, choice: Choice, machine: "Machine") -> None:
        await asyncio.sleep(_SETTLE_SECONDS)
        found = await asyncio.to_thread(_look_at, choice, machine)
        self._surveys[choice.key] = found
        self._surveyed_now = ""
        if choice.key == self._choice.key and not self.is_covered:
            self._show_survey(found)

    def _show_survey(self, found: "Survey") -> None:
        from tui.screens.machine.prospects import headline, prospect_lines

        assert self._machine is not None
        if wording.is_plain(self._machine, self._choice):
            self.say("✓", "ready", headline(found))
        self.query_one("#good Static", Static).update(prospect_lines(found))
        on_cpu = found.device.kind == "cpu"
        note = "by memory; a real model takes days on a CPU" if on_cpu else "as recommended"
        self.query_one("#good", Pane).show_subtitle(note)

    def on_choices_moved(self, message: Choices.Moved) -> None:
        if self._machine and not self.is_covered:
            self._show_choice(self._machine)

    def on_resize(self) -> None:
        self.call_after_refresh(self._show)

    # --- keys

    def action_accept(self) -> None:
        """Take the device under the cursor, or wait for the driver to name one."""
        if self._machine is None:
            self._goes_on = True
            self.say("·", "looking", f"{ASKING} goes on when it answers")
        elif self._choice.key == PLAN and self._planned:
            self.app.next_step()  # it was planned for before, or by --assume
        elif self._choice.key == PLAN:
            self.action_plan_for_another()
        elif self._choice.refusal:
            self.say(*wording.verdict(self._machine, self._choice))
        else:
            from tui.screens.machine.prospects import device_of

            self._take(self._machine, device_of(self._choice, self._machine))

    def _take(self, machine: "Machine", device: "Device") -> None:
        self.app.draft.machine, self.app.draft.device = machine, device
        self.app.next_step()

    def action_look_again(self) -> None:
        self._surveys.clear()
        self._surveyed_now = ""
        self._look()

    def action_processes(self) -> None:
        if self._machine:
            found = wording.processes(self._machine)
            self.cover(TextPane("what runs on the GPUs", found), [Key("esc", "close")])

    def action_plan_for_another(self) -> None:
        from tui.screens.machine.planned import PlannedPanel

        self.say(PLAN_ONLY.mark, PLAN_ONLY.label, PLAN_ONLY.text)
        name = self._planned.name if self._planned else ""
        self.cover(PlannedPanel(name), [Key("enter", "plan for it"), Key("esc", "close")])

    def on_planned_panel_pointed(self, message: "PlannedPanel.Pointed") -> None:
        self.show_command(["models", "--assume", message.name] if message.name else ["probe"])

    def on_planned_panel_taken(self, message: "PlannedPanel.Taken") -> None:
        from engine.plan import best_device

        self._point_at(PLAN)
        self.uncover()
        self._take(message.machine, best_device(message.machine))

    def uncover(self) -> None:
        super().uncover()
        self.show_command(["probe"])
        self._show()

    def refresh_from_draft(self) -> None:
        self._show()

    def help_for(self, focused: Widget | None) -> HelpText:
        return HelpText(
            "the device that the run computes on",
            HELP,
            ("probe",),
        )


def _text_pane(name: str, title: str) -> TextPane:
    pane = TextPane(title, Content(""))
    pane.id = name
    return pane


def _best_key(machine: "Machine") -> str:
    from engine.plan import best_device

    return best_device(machine).uuid or CPU


def _look_at(choice: Choice, machine: "Machine") -> "Survey":
    from engine.wizard.model import look_at
    from tui.screens.machine.prospects import device_of

    return look_at(device_of(choice, machine))

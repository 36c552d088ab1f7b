"""The list of GPUs that are not here: what each can give, and the largest model that it holds."""

import asyncio
from dataclasses import dataclass
from typing import Final

from textual import work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, Static

from engine.errors import UserError
from engine.hardware import Gpu, Machine
from engine.plan import best_device
from engine.units import GIB
from engine.visible import visible
from engine.wizard.flow import Wizard, perform
from engine.wizard.machine import PLAN, listed_machines
from engine.wizard.model import Survey
from tui.widgets.choices import Choices
from tui.widgets.pane import Field, Pane, sentences

_NAME_CELLS: Final = 24
_OTHER: Final = "another"
_TITLE: Final = (
    f"{'plan for which GPU':<{_NAME_CELLS + 1}}{'GiB':>7}  {'':<11}{'can give':>8}  largest model"
)


class PlannedPanel(Vertical):
    """Posts Pointed when another GPU is highlighted, and Taken when one is chosen."""

    @dataclass
    class Pointed(Message):
        """`name` is under the cursor; empty where one is still typed."""

        name: str

    class Taken(Message):
        """The draft is for the computer with that GPU in it."""

    def __init__(self, wizard: Wizard) -> None:
        """Begins at the GPU that is planned for, at the first where it is not listed."""
        super().__init__()
        self._wizard = wizard
        self._machines: list[Machine] = []
        self._list = Choices([Content.styled("reading the list…", "$muted")])

    def compose(self) -> ComposeResult:
        with Pane(id="known", title=_TITLE):
            yield self._list
        with Pane(id="why", title="why"):
            yield Static(markup=False)
            yield Field("memory in GB, or a name: 24 GB, H100 x2")

    def on_mount(self) -> None:
        self.query_one(Field).display = False
        self._fill()

    @work
    async def _fill(self) -> None:
        machines = await asyncio.to_thread(listed_machines)
        if self._is_closed():
            return
        self._machines = machines
        self._show()
        names = [machine.gpus[0].short_name for machine in machines]
        device, models = self._wizard.draft.device, self._wizard.model
        self._list.cursor = names.index(device.name) if device and device.name in names else 0
        self._point()
        for each in map(best_device, machines):
            if models.last(each) is None:
                work = models.survey(each)
                models.receive(work, await asyncio.to_thread(perform, work, lambda _done: None))
                if self._is_closed():
                    return
                self._show()

    def _is_closed(self) -> bool:
        return not self._list.is_attached

    def _show(self) -> None:
        lines = [
            _line(machine, self._wizard.model.last(best_device(machine)))
            for machine in self._machines
        ]
        other = Content.assemble(
            f"{_OTHER:<{_NAME_CELLS}}", ("  type its memory in GB, or its name", "$muted")
        )
        self._list.show_lines([*lines, other])

    @property
    def _here(self) -> Machine | None:
        cursor = self._list.cursor
        return self._machines[cursor] if cursor < len(self._machines) else None

    def on_choices_moved(self, message: Choices.Moved) -> None:
        message.stop()
        if self._machines:
            self._point()

    def _point(self) -> None:
        here = self._here
        self.query_one(Field).display = here is None
        self.post_message(self.Pointed(here.gpus[0].short_name if here else ""))
        if here is None:
            shown = "Makers say GB: 24 GB is a card of 24 GiB. Two alike: H100 x2."
        else:
            shown = " ".join(f"{p.what} {p.why} {p.fix}" for p in here.problems)
        self._show_reason(Content(visible(shown)))

    def _show_reason(self, text: Content) -> None:
        self.query_one("#why Static", Static).update(text)

    def on_choices_chosen(self, message: Choices.Chosen) -> None:
        message.stop()
        if self._here:
            self._take(self._here.gpus[0].short_name)
        elif self._machines:
            self.query_one(Field).focus()

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        if text := message.value.strip():
            self._take(text)

    def _take(self, text: str) -> None:
        try:
            self._wizard.machine.take(PLAN, text)
        except UserError as error:
            self._show_reason(sentences(error))
            return
        self.post_message(self.Taken())

    def on_field_left(self) -> None:
        self._list.focus()


def _line(machine: Machine, found: Survey | None) -> Content:
    gpu: Gpu = machine.gpus[0]
    device = best_device(machine)
    name = Content(visible(gpu.short_name)).truncate(_NAME_CELLS, ellipsis=True)
    largest = visible(found.proposed.card.title) if found else "…"
    return Content.assemble(
        name.pad_right(_NAME_CELLS - name.cell_length),
        f"{device.total_bytes / GIB:>7.1f}  {gpu.architecture:<11}",
        f"{device.can_give_bytes / GIB:>8.1f}  ",
        (largest, "$lit"),
    )

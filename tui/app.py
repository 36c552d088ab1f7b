"""The wizard as one Textual app: which page is shown, and the keys that work on every page.

Pages are imported when they are first opened, so that the first frame waits for one page only, and
are kept when they are left, so that going back loses nothing.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Final

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.filter import LineFilter
from textual.screen import Screen
from textual.theme import Theme

from engine.errors import UserError
from tui.page import STEPS, Page, RowsCounted

if TYPE_CHECKING:
    from engine.hardware import Machine
    from engine.runs import RunFolder
    from engine.wizard.draft import Draft
    from engine.wizard.flow import Wizard
    from engine.wizard.question import Work
    from engine.wizard.reading import DataWorker

PAGES: Final[Mapping[str, str]] = {
    "Machine": "tui.screens.machine:MachinePage",
    "Model": "tui.screens.model:ModelPage",
    "Data": "tui.screens.data:DataPage",
    "Preview": "tui.screens.preview:PreviewPage",
    "Plan": "tui.screens.plan:PlanPage",
    "Review": "tui.screens.review:ReviewPage",
    "Train": "tui.screens.train:TrainPage",
    "Runs": "tui.screens.runs:RunsPage",
}
"""Module and class of each page; a step's name is its key."""

THEME: Final = Theme(
    name="windtunnel",
    dark=True,
    primary="#ff8205",
    secondary="#86b8f5",
    accent="#ffb224",
    foreground="#d9dee7",
    background="#0f1217",
    surface="#141920",
    panel="#1c232d",
    success="#7fd8b4",
    warning="#ffd84d",
    error="#ff5a4f",
    variables={
        "lit": "#ffffff",
        "read": "#b4bfce",
        "muted": "#8f9aab",
        "faint": "#5e6a7c",
        "frame": "#364252",
        "think": "#ffbf99",  # lighter than `read`: without hues brightness is all there is
        "answer": "#ffd84d",
        "call": "#7fd8b4",
        "raw": "#8f6f3a",
        "block-cursor-text-style": "none",
    },
)


def read_here() -> "Machine":
    """This computer, with the disk that runs are written to. A driver that is silent is asked again
    by the page, which waits for it no longer than it must."""
    # Imported in the thread that asks: the first frame does not wait for it.
    from engine.hardware import read_machine
    from engine.runs import run_home

    return read_machine(disk=run_home())


class WindtunnelApp(App[int]):
    """The screens over one draft, an empty one unless it is given. `run()` gives the exit status.

    Starts on the step `start`, or on the Train page of `run`. `pages` are further or other pages
    by name; `read` looks at this computer.
    """

    CSS_PATH = "app.tcss"
    TITLE = "windtunnel"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "leave", "leave", show=False, priority=True),
        Binding("f2", "setup", "set up a run", show=False),
        Binding("f3", "train", "the run that trains", show=False),
        Binding("f4", "runs", "all runs", show=False),
    ]

    def __init__(
        self,
        draft: "Draft | None" = None,
        *,
        start: str = "Machine",
        run: "RunFolder | None" = None,
        ascii_only: bool = False,
        pages: Mapping[str, type[Page]] | None = None,
        read: "Callable[[], Machine]" = read_here,
    ) -> None:
        super().__init__()
        if "TEXTUAL_ANIMATIONS" not in os.environ:
            self.animation_level = "none"
        self.register_theme(THEME)  # before the stylesheet is read, which uses its variables
        self.theme = THEME.name
        self._draft = draft
        self._wizard: Wizard | None = None
        self._read = read
        self.parting = ""
        """A line to print once the screen is given back, such as how to return to a run."""
        self._start = start
        self._run = run
        self._step = start if start in STEPS else STEPS[0]
        self._given: Mapping[str, type[Page]] = pages or {}
        self._opened: dict[str, Page] = {}
        self._shown = ""
        self._data_worker: DataWorker | None = None
        self._counting: Work | None = None
        self._ascii: list[LineFilter] = []
        if ascii_only:
            from tui.line import AsciiFilter

            self._ascii = [AsciiFilter()]
            self.add_class("-ascii")

    @property
    def wizard(self) -> "Wizard":
        """The steps that the pages print. Its first use imports all that plans, which takes 0.4 s:
        the first page waits for `load` instead, after its first frame."""
        if self._wizard is None:
            from engine.wizard.draft import Draft
            from engine.wizard.flow import Wizard

            self._wizard = Wizard(self._draft or Draft(), read=self._read)
        return self._wizard

    async def load(self) -> "Wizard":
        """The wizard, its imports done in a thread."""
        await asyncio.to_thread(import_module, "engine.wizard.flow")
        return self.wizard

    @property
    def draft(self) -> "Draft":
        return self.wizard.draft

    async def perform(self, work: "Work") -> object:
        """Do it in a thread: its result, or the UserError that ended it."""
        from engine.wizard.flow import perform

        return await asyncio.to_thread(perform, work, lambda _done: None)

    @property
    def data_worker(self) -> "DataWorker":
        """The process that reads and tokenizes; started at the first use, ended with the app."""
        if self._data_worker is None:
            from engine.wizard.reading import DataWorker

            self._data_worker = DataWorker()
        return self._data_worker

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), *self._ascii]

    def get_default_screen(self) -> Screen[Any]:
        """The first page itself: an empty screen below it would be laid out and drawn first."""
        if self._run:
            return super().get_default_screen()
        page = self._class(self._start)()
        self._keep(self._start, page)
        self._shown = self._start
        self._load_screen_css(page)  # Textual does so for every screen but the default one
        return page

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Every key that works now, findable by what it does."""
        found: dict[str, SystemCommand] = {}
        for active in screen.active_bindings.values():
            name, action = active.binding.description, active.binding.action
            if active.enabled and name and name not in found:
                found[name] = SystemCommand(name, "", partial(self.run_action, action, active.node))
        return found.values()

    def on_mount(self) -> None:
        if self._run:
            self.open_run(self._run)
        elif self._draft is None:
            self.call_after_refresh(self.run_worker, self._prepare)

    async def _close_all(self) -> None:
        # A page is taken apart from its leaves on: a worker that came back meanwhile would find
        # nothing to show its answer on, and end the wizard with a traceback.
        self.workers.cancel_all()
        await super()._close_all()

    async def on_unmount(self) -> None:
        if self._data_worker:
            await self._data_worker.close()

    def count_rows(self) -> None:
        """Have the rows of the draft's config counted where its plan is without them.

        The page that is shown then gets RowsCounted.
        """
        with suppress(UserError):  # the page says itself why there is no plan
            work = self.wizard.plan.counting()
            if work is not None and work != self._counting:
                self._counting = work
                self.run_worker(self._count_rows(work), group="rows", exclusive=True)

    async def _count_rows(self, work: "Work") -> None:
        found: object
        try:
            found = await self.data_worker.ask(work.request)
        except UserError as error:
            found = error
        self._counting = None
        with suppress(UserError):  # the answers have come to contradict each other
            if work == self.wizard.plan.counting():
                self.wizard.plan.receive(work, found)
                if isinstance(self.screen, Page):
                    self.screen.post_message(RowsCounted())

    def open_step(self, name: str) -> None:
        """Show the page of one of STEPS, made when it is first asked for."""
        self._step = name
        self._show(name)

    def next_step(self) -> None:
        """The step after the one that is shown; after the last one nothing."""
        if self._shown in STEPS[:-1]:
            self.open_step(STEPS[STEPS.index(self._shown) + 1])

    def previous_step(self) -> None:
        """The step before; from Train to Runs, and from Runs to where the setup was left."""
        if self._shown in STEPS[1:]:
            self.open_step(STEPS[STEPS.index(self._shown) - 1])
        elif self._shown == "Runs":
            self.open_step(self._step)
        elif self._shown not in STEPS:
            self.open_runs()

    def open_run(self, run: "RunFolder", *, fresh: bool = False) -> None:
        """The Train page of a run; `fresh` where the wizard has just started it."""
        self._run = run
        name = f"Train {run.path}"
        if name not in self._opened:
            page: Any = self._class("Train")
            self._keep(name, page(run, fresh=fresh))
        self._show(name)

    def open_runs(self) -> None:
        self._show("Runs")

    def leave(self, parting: str = "") -> None:
        """End the app with exit status 0; runs go on. `parting` is printed afterwards."""
        self.parting = parting
        self.exit(0)

    def copy(self, text: str, what: str) -> None:
        self.copy_to_clipboard(text)
        self.notify(f"copied {what}", timeout=2, markup=False)

    def action_leave(self) -> None:
        self.leave(next((page.parting for page in self._opened.values() if page.parting), ""))

    def action_setup(self) -> None:
        self.open_step(self._step)

    def action_runs(self) -> None:
        self.open_runs()

    def action_train(self) -> None:
        if self._run:
            self.open_run(self._run)
        else:
            self.open_runs()

    def action_help_quit(self) -> None:
        self.notify("ctrl+q leaves", timeout=2, markup=False)

    async def _prepare(self) -> None:
        """Load what the next pages need while the person looks at the first one."""
        await self.load()
        await self.data_worker.warm()

    def _show(self, name: str) -> None:
        if name not in self._opened:
            self._keep(name, self._class(name)())
        if name == self._shown:
            return
        self._shown = name
        while self.screen.is_modal:  # an open question, which is answered with nothing
            self.pop_screen()
        # The first page lies below whatever page is shown: it is uncovered, the others change.
        if self._opened[name] is self.screen_stack[0]:
            self.pop_screen()
        elif len(self.screen_stack) == 1:
            self.push_screen(name)
        else:
            self.switch_screen(name)

    def _keep(self, name: str, page: Page) -> None:
        self._opened[name] = page
        self.install_screen(page, name)

    def _class(self, name: str) -> type[Page]:
        if name in self._given:
            return self._given[name]
        module, _, word = PAGES[name].partition(":")
        page: type[Page] = getattr(import_module(module), word)
        return page

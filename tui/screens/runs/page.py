"""The Runs page: every run that is known, and what can be done with one."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.content import Content
from textual.message import Message
from textual.widgets import Static
from textual.worker import get_current_worker

from engine.errors import UserError
from engine.launch import resume_run
from engine.runs import RunFolder
from engine.runs.history import RunFacts, RunsReader
from engine.runs.lock import measure, remove
from engine.units import counted, gib
from engine.visible import visible
from tui.follow import (
    RemovalMeasured,
    RunRemoved,
    RunResumed,
    RunsCompared,
    RunsSeen,
    WorkRefused,
)
from tui.page import Key, Page
from tui.screens.runs.comparison import Comparison
from tui.screens.runs.wording import WIDE, Widths, change, details, header, run_line, state, totals
from tui.widgets.chart import Chart, Curve, Scale, Spark
from tui.widgets.choices import Choices
from tui.widgets.pane import Confirm, Pane, columns

LOOK_SECONDS: Final = 2.0
_MARKS: Final = "AB"
_NONE_YET: Final = "no runs yet: F2 sets one up, and Enter on every page trains the sample"


class RunsPage(Page):
    """The list, live; below or beside it the run under the cursor."""

    CSS_PATH = Path(__file__).with_name("runs.tcss")
    KEYS = (
        Key("enter", "attach"),
        Key("space", "mark", 1),
        Key("c", "compare", 2),
        Key("r", "resume", 3),
        Key("delete", "remove"),
        Key("esc", "back"),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "mark", "mark to compare", show=False),
        Binding("c", "compare", "compare the marked two", show=False),
        Binding("r", "resume", "resume", show=False),
        Binding("delete", "remove", "remove", show=False),
        Binding("q", "app.leave", "leave", show=False),
    ]

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._clock = clock
        self._runs: Sequence[RunFacts] = ()
        self._marked: list[RunFolder] = []
        self._resuming: RunFolder | None = None

    def compose_body(self) -> ComposeResult:
        with Horizontal(id="runs"):
            with Pane(title="runs", subtitle="space marks two to compare", id="list"):
                yield Static(id="header", markup=False)
                yield Choices()
            with Pane(id="detail"):
                yield Spark("loss", "bold $primary")
                yield Chart()
                yield Static(id="facts", markup=False)

    def on_mount(self) -> None:
        self.say("", "Runs", "reading the run folders")
        self.show_command(["runs"])
        self.run_worker(self._look, thread=True)

    def on_runs_seen(self, message: RunsSeen) -> None:
        here = self._here
        self._runs = message.runs
        places = [facts.folder for facts in self._runs]
        self._marked = [each for each in self._marked if each in places]
        if here and here.folder in places:
            self.part(Choices).cursor = places.index(here.folder)
        self.say("", "Runs")
        self.show_title(totals(self._runs))
        self._show()

    def on_choices_moved(self, message: Choices.Moved) -> None:
        message.stop()
        self._show()

    def on_removal_measured(self, message: RemovalMeasured) -> None:
        saves, size = message.contents.saves, message.contents.total_bytes
        question = (
            f"{counted(saves, 'save')}, {gib(size)} go. Its config.yml is kept in runs/.trash."
        )
        name = message.run.name
        confirm = Confirm(f"remove {name}", question, yes="removes it", no="keeps it")
        self.app.push_screen(confirm, partial(self._remove_if, message.run))

    def on_run_removed(self, message: RunRemoved) -> None:
        kept = f"; its config is {message.kept}" if message.kept else ""
        self.app.notify(visible(f"removed {message.run.name}{kept}", one_line=True), markup=False)

    def on_run_resumed(self, message: RunResumed) -> None:
        run, self._resuming = self._resuming, None
        if run:
            self.app.open_run(run, fresh=True)

    def on_work_refused(self, message: WorkRefused) -> None:
        self._resuming = None
        self.say("", "Runs")
        self.show_problem(message.error)

    def on_runs_compared(self, message: RunsCompared) -> None:
        for panel in self.query(Comparison):
            panel.show_differences(message.differences)

    def on_resize(self) -> None:
        self._show()

    def action_accept(self) -> None:
        """Attach to the run under the cursor."""
        if self._here and self._here.status:
            self.app.open_run(self._here.folder)

    def action_mark(self) -> None:
        if not self._here:
            return
        folder = self._here.folder
        if folder in self._marked:
            self._marked.remove(folder)
        else:
            self._marked = [*self._marked, folder][-len(_MARKS) :]
        self._show()

    def action_compare(self) -> None:
        """The marked two, or the marked one and the one under the cursor."""
        chosen = list(self._marked)
        if len(chosen) == 1 and self._here and self._here.folder not in chosen:
            chosen.append(self._here.folder)
        if len(chosen) < len(_MARKS):
            self.app.notify("space marks the two runs to compare", markup=False, timeout=3)
            return
        first, second = (self._facts_of(each) for each in chosen)
        self.cover(Comparison(first, second), [Key("tab", "other pane"), Key("esc", "list")])
        self.run_worker(partial(self._compare, first.folder, second.folder), thread=True)

    def action_resume(self) -> None:
        if self._here and not self._resuming:
            self._resuming = self._here.folder
            self.say("", "Runs", f"waiting for {self._resuming.name} to begin")
            self.run_worker(partial(self._resume, self._resuming), thread=True)

    def action_remove(self) -> None:
        if self._here:
            self.run_worker(partial(self._measure, self._here.folder), thread=True)

    @property
    def _here(self) -> RunFacts | None:
        cursor = self.part(Choices).cursor
        return self._runs[cursor] if cursor < len(self._runs) else None

    def _facts_of(self, folder: RunFolder) -> RunFacts:
        return next(facts for facts in self._runs if facts.folder == folder)

    def _show(self) -> None:
        now = self._clock()
        widths = WIDE if self.has_class("-wide") else Widths()
        self.query_one("#header", Static).update(header(widths))
        lines = [run_line(facts, self._mark_of(facts.folder), now, widths) for facts in self._runs]
        if not lines:
            lines = [Content.styled(_NONE_YET, "$muted")]
        self.part(Choices).show_lines(lines)
        self._show_detail(self._here)

    def _show_detail(self, facts: RunFacts | None) -> None:
        pane = self.query_one("#detail", Pane)
        pane.display = facts is not None
        if not facts:
            return
        self.show_command(["watch", facts.folder.name])
        pane.show_title(visible(facts.folder.name, one_line=True))
        pane.show_subtitle(change(facts))
        scale = Scale(float(facts.total_steps or 1))
        self.part(Spark).show(facts.loss, Scale(scale.right, bottom=0), state(facts))
        curves = [
            Curve(facts.loss, "bold $primary"),
            Curve([(float(step), loss) for step, loss in facts.held_out], "bold $lit", "◆"),
        ]
        self.part(Chart).show(curves, scale)
        told = [(word, visible(text)) for word, text in details(facts)]
        self.query_one("#facts", Static).update(columns(told, "$muted"))

    def _mark_of(self, folder: RunFolder) -> str:
        return _MARKS[self._marked.index(folder)] if folder in self._marked else ""

    def _remove_if(self, run: RunFolder, confirmed: bool | None) -> None:
        if confirmed:
            self.run_worker(partial(self._remove, run), thread=True)

    def _look(self) -> None:
        """In a thread: look at every run while the page lives."""
        worker = get_current_worker()
        reader = RunsReader()
        while not worker.is_cancelled:
            runs, more = reader.look()
            self.post_message(RunsSeen(runs))
            deadline = time.monotonic() + (0 if more else LOOK_SECONDS)
            while time.monotonic() < deadline and not worker.is_cancelled:
                time.sleep(0.05)

    def _compare(self, first: RunFolder, second: RunFolder) -> None:
        # pydantic: in the thread, not in the list's first frame
        from engine.runs.comparison import differences

        try:
            self.post_message(RunsCompared(differences(first, second)))
        except UserError as error:
            self.post_message(RunsCompared(error))

    def _resume(self, run: RunFolder) -> None:
        def work() -> RunResumed:
            resume_run(run)
            return RunResumed()

        self._try(work)

    def _measure(self, run: RunFolder) -> None:
        self._try(lambda: RemovalMeasured(run, measure(run)))

    def _remove(self, run: RunFolder) -> None:
        self._try(lambda: RunRemoved(run, remove(run)))

    def _try(self, work: Callable[[], Message]) -> None:
        try:
            self.post_message(work())
        except UserError as error:
            self.post_message(WorkRefused(error))

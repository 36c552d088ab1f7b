"""The Runs page: every run that is known, what can be done with one, and two side by side."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from textual.app import ComposeResult, RenderResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget
from textual.widgets import Static

from engine.errors import UserError
from engine.launch import resume_run
from engine.report.run import figures_text
from engine.runs import RunFolder, run_home
from engine.runs.history import History, Point, finite
from engine.runs.listing import OpenRun, RunFacts, RunsReader
from engine.runs.lock import measure, remove
from engine.units import counted, gib, nats
from engine.visible import visible
from tui.page import Key, Page
from tui.widgets.chart import Chart, Curve, Scale, Spark
from tui.widgets.choices import Choices, Made
from tui.widgets.pane import Confirm, Pane, TextPane, columns

if TYPE_CHECKING:
    from engine.runs.comparison import ConfigDifferences, Figure

_STATES: Final = {
    "running": ("▶", "$success"),
    "paused": ("❚", "$accent"),
    "finished": ("✓", "$muted"),
    "stopped": ("·", "$muted"),
    "failed": ("✗", "$error"),
    "lost": ("✗", "$error"),
    "waiting": ("◌", "$muted"),
    None: ("?", "$warning"),
}
_WEEK_SECONDS: Final = 6 * 86_400.0
_DAY_SECONDS: Final = 86_400.0
_STATE_CELLS: Final = 15
_LEAST_CELLS: Final = 12
_FIGURE_CELLS: Final = 18


_CELLS: Final = (22, 12)
_WIDE_CELLS: Final = (44, 28)
"""Of the columns whose text can be long: name and model."""


def header(cells: tuple[int, int]) -> str:
    return (
        f"      {'name':<{cells[0]}} {'model':<{cells[1]}} {'state':<{_STATE_CELLS}}"
        f"{'held out':>9}  when"
    )


def run_line(facts: RunFacts, mark: str, now: float, cells: tuple[int, int]) -> Content:
    glyph, style = _STATES[facts.status]
    held_out = f"{facts.best[1]:.3f}" if facts.best else "-"
    return Content.assemble(
        (f"{mark:<2}", "bold $accent"),
        (f"{glyph} ", style),
        _cell(facts.folder.name, cells[0]) + " ",
        (_cell(facts.model, cells[1]) + " ", "$muted"),
        (_cell(state(facts), _STATE_CELLS), style),
        f"{held_out:>9}  ",
        (when(facts, now), "$muted"),
    )


def state(facts: RunFacts) -> str:
    of = f"{facts.step}/{facts.total_steps}" if facts.total_steps else f"{facts.step}"
    return {
        "running": f"step {of}" if facts.total_steps else "loading",
        "paused": f"paused {of}",
        "finished": f"done, {facts.step} steps",
        "stopped": f"stopped {of}",
        "failed": f"failed at {facts.step}",
        "lost": f"lost at {facts.step}",
        "waiting": "not started",
        None: "cannot be read",
    }[facts.status]


def when(facts: RunFacts, now: float) -> str:
    """`now`, a time of today, a weekday, or a date."""
    if facts.is_alive:
        return "now"
    if not facts.written_time:
        return ""
    moment = datetime.fromtimestamp(facts.written_time)
    age = now - facts.written_time
    if age < _DAY_SECONDS and moment.date() == datetime.fromtimestamp(now).date():
        return moment.strftime("%H:%M")
    return moment.strftime("%a" if age < _WEEK_SECONDS else "%d %b")


def totals(runs: Sequence[RunFacts], waiting: int) -> str:
    """`4 runs, 1 training`; with those that wait to be read."""
    live = sum(facts.status == "running" for facts in runs)
    shown = counted(len(runs) + waiting, "run")
    return f"{shown}, {live} training" if live else shown


def details(facts: RunFacts, history: History) -> list[tuple[str, str]]:
    if facts.status is None:
        return [("why", facts.problem)]
    lines = []
    if facts.best:
        step, loss = facts.best
        lines.append(("best", f"held-out {nats(loss)} at step {step}"))
    if figures := figures_text(*history.figures):
        lines.append(("figures", figures))
    if history.saved:
        saved = (each.path.rsplit("/", 1)[-1] for each in history.saved[-4:])
        lines.append(("saved", ", ".join(saved)))
    if history.ended and history.ended.what:
        lines.append(("ended", history.ended.what))
    if facts.folder.path.parent != run_home() / "runs":
        lines.append(("where", str(facts.folder.path)))
    return lines


def loss_curve(history: History) -> list[Point]:
    """By step, smoothed where it can be; nan is a gap."""
    return history.loss.smooth.points() or history.loss.raw.points()


def change(history: History) -> str:
    """The loss at the first and at the last step."""
    values = finite(loss_curve(history))
    return f"loss {nats(values[0])} → {nats(values[-1])}" if values else ""


def _cell(text: str, cells: int) -> str:
    shown = visible(text, one_line=True)
    return f"{shown if len(shown) <= cells else shown[: cells - 1] + '…':<{cells}}"


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "-"


class Differences(Widget):
    """Key, value of A, value of B, a line each."""

    def __init__(self, lines: Sequence[tuple[str, str, str]], same: int) -> None:
        super().__init__()
        self._lines, self._same = lines, same

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self._lines) + 1

    def render(self) -> RenderResult:
        width = max(self.size.width, _LEAST_CELLS)
        longest = max((len(key) for key, _, _ in self._lines), default=0)
        key_cells = min(longest, width // 2) + 2
        cells = (width - key_cells) // 2
        rows = [
            Content.assemble(
                (_cell(key, key_cells - 1) + " ", "$muted"),
                _cell(first, cells - 1) + " ",
                _cell(second, cells - 1) + " ",
            )
            for key, first, second in self._lines
        ]
        same = Content.styled(f"{self._same} keys are the same", "$muted")
        return Content("\n").join([*rows, same])


class Comparison(Vertical):
    """A panel over the list: curves, the keys with different values, and which run is better where
    both hold out the same."""

    def __init__(
        self,
        names: Sequence[str],
        histories: Sequence[History],
        figures: "tuple[int, Sequence[Figure]]",
        found: "ConfigDifferences | UserError",
    ) -> None:
        """`figures` as `compare_figures` gives them."""
        super().__init__()
        self._names, self._found = names, found
        self._first, self._second = histories
        self._tokens, self._figures = figures

    def compose(self) -> ComposeResult:
        names = [visible(name, one_line=True) for name in self._names]
        with Pane(title=f"A ━━ {names[0]}   B ┅┅ {names[1]}", subtitle="loss, ◆◇ held out"):
            yield Chart(waiting="neither has told a loss")
        with Horizontal():
            with Pane(title="what differs", can_focus=True):
                if isinstance(self._found, UserError):
                    yield Differences([("config.yml", str(self._found), "")], 0)
                else:
                    yield Differences(self._found.lines, self._found.same)
            title = f"at {self._tokens:,} learned tokens"
            pane = TextPane(title, Content("\n").join(self._figure_lines()))
            pane.border_subtitle = self._verdict()
            yield pane

    def on_mount(self) -> None:
        right = max(self._first.total_steps or 1, self._second.total_steps or 1)
        curves = [
            Curve(loss_curve(self._second), "bold $secondary", dotted=True),
            Curve(loss_curve(self._first), "bold $primary"),
            Curve(self._second.held_out, "bold $secondary", "◇"),
            Curve(self._first.held_out, "bold $lit", "◆"),
        ]
        self.query_one(Chart).show(curves, Scale(float(right)))

    def _figure_lines(self) -> Iterator[Content]:
        yield Content.styled(f"{'':<{_FIGURE_CELLS}}{'A':>9}{'B':>9}", "$muted")
        for each in self._figures:
            numbers = "".join(
                f"{_number(value, each.digits):>9}" for value in (each.first, each.second)
            )
            name = each.name.removesuffix(" at the same tokens")
            yield Content.assemble((_cell(name, _FIGURE_CELLS), "$muted"), numbers)

    def _verdict(self) -> str:
        if isinstance(self._found, UserError):
            return ""
        if self._found.held_out:
            return f"held out on {self._found.held_out_on}"
        a, b = self._figures[1].first, self._figures[1].second
        if not math.isfinite(a - b) or a == b:
            return ""
        return f"{'A' if a < b else 'B'} is better by {abs(a - b):.3f} held out"


def _read_both(first: RunFolder, second: RunFolder) -> Comparison:
    # pydantic: in a thread, not in the list's first frame
    from engine.runs.comparison import compare_figures, differences, read_curves

    found: ConfigDifferences | UserError
    try:
        found = differences(first, second)
    except UserError as error:
        found = error
    runs = (first, second)
    histories = [OpenRun(run).read_all() for run in runs]
    figures = compare_figures(*(read_curves(run) for run in runs))
    return Comparison([run.name for run in runs], histories, figures, found)


LOOK_SECONDS: Final = 2.0
_LOOKING_SHARE: Final = 0.05
"""Of the time at most, however many runs there are."""
_OPEN_AT_MOST: Final = 8
"""Runs whose curves are kept for the cursor to come back."""
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
        self._waiting = 0
        self._due = asyncio.Event()
        """The run under the cursor is another, or may have gone on."""
        self._marked: list[RunFolder] = []
        self._resuming = False

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
        self.run_worker(self._look())
        self.run_worker(self._follow_cursor())

    def show_runs(self, runs: Sequence[RunFacts], waiting: int = 0) -> None:
        """Other facts; the cursor and the marks stay with their runs."""
        here = self._here
        self._runs, self._waiting = runs, waiting
        places = [facts.folder for facts in runs]
        self._marked = [each for each in self._marked if each in places]
        if here and here.folder in places:
            self.part(Choices).cursor = places.index(here.folder)
        if not self._resuming:
            left = f"reading the run folders: {waiting:,} to go" if waiting else ""
            self.say("", "Runs", left)
        self.show_title(totals(runs, waiting))
        self._show()

    def on_choices_moved(self, message: Choices.Moved) -> None:
        message.stop()
        self._show()

    def on_resize(self) -> None:
        self._show()

    def action_accept(self) -> None:
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
        self.run_worker(self._compare(*chosen))

    def action_resume(self) -> None:
        if self._here and not self._resuming:
            self._resuming = True
            self.run_worker(self._resume(self._here.folder))

    def action_remove(self) -> None:
        if self._here:
            self.run_worker(self._remove(self._here.folder))

    @property
    def _here(self) -> RunFacts | None:
        cursor = self.part(Choices).cursor
        return self._runs[cursor] if cursor < len(self._runs) else None

    def _show(self) -> None:
        now = self._clock()
        cells = _WIDE_CELLS if self.has_class("-wide") else _CELLS
        self.query_one("#header", Static).update(header(cells))
        if self._runs or self._waiting:
            line = partial(run_line, now=now, cells=cells)
            self.part(Choices).show_lines(
                Made(self._runs, lambda facts: line(facts, self._mark_of(facts.folder)))
            )
        else:
            self.part(Choices).show_lines([Content.styled(_NONE_YET, "$muted")])
        self.query_one("#detail", Pane).display = self._here is not None
        self._due.set()

    def _show_detail(self, facts: RunFacts, history: History) -> None:
        pane = self.query_one("#detail", Pane)
        self.show_command(["watch", facts.folder.name])
        pane.show_title(visible(facts.folder.name, one_line=True))
        pane.show_subtitle(change(history))
        scale = Scale(float(facts.total_steps or 1))
        loss = loss_curve(history)
        self.part(Spark).show(loss, Scale(scale.right, bottom=0), state(facts))
        curves = [Curve(loss, "bold $primary"), Curve(history.held_out, "bold $lit", "◆")]
        self.part(Chart).show(curves, scale)
        shown = [(word, visible(text)) for word, text in details(facts, history)]
        self.query_one("#facts", Static).update(columns(shown, "$muted"))

    def _mark_of(self, folder: RunFolder) -> str:
        return _MARKS[self._marked.index(folder)] if folder in self._marked else ""

    async def _look(self) -> None:
        reader = RunsReader()
        while True:
            began = time.monotonic()
            runs, waiting = await asyncio.to_thread(reader.look)
            self.show_runs(runs, waiting)
            spent = time.monotonic() - began
            await asyncio.sleep(0 if waiting else max(LOOK_SECONDS, spent / _LOOKING_SHARE))

    async def _follow_cursor(self) -> None:
        """Read the run under the cursor, and show it: by parts, where it is long."""
        opened: dict[RunFolder, OpenRun] = {}
        while True:
            await self._due.wait()
            self._due.clear()
            if not (here := self._here):
                continue
            run = opened.pop(here.folder) if here.folder in opened else OpenRun(here.folder)
            opened[here.folder] = run
            with contextlib.suppress(UserError):  # its line in the list says why
                if await asyncio.to_thread(run.read):
                    self._due.set()
                else:
                    await asyncio.to_thread(run.keep)
            if (now := self._here) and now.folder == here.folder:
                self._show_detail(now, run.history)
            for each in list(opened)[:-_OPEN_AT_MOST]:
                del opened[each]

    async def _compare(self, first: RunFolder, second: RunFolder) -> None:
        with self.showing_refusals():
            panel = await asyncio.to_thread(_read_both, first, second)
            self.cover(panel, [Key("tab", "other pane"), Key("esc", "list")])

    async def _resume(self, run: RunFolder) -> None:
        self.say("", "Runs", f"waiting for {run.name} to begin")
        with self.showing_refusals():
            await asyncio.to_thread(resume_run, run)
            self.app.open_run(run, fresh=True)
        self._resuming = False
        self.say("", "Runs")

    async def _remove(self, run: RunFolder) -> None:
        with self.showing_refusals():
            found = await asyncio.to_thread(measure, run)
            goes = f"{counted(found.saves, 'save')}, {gib(found.total_bytes)} go."
            question = f"{goes} Its config.yml is kept in runs/.trash."
            confirm = Confirm(f"remove {run.name}", question, yes="removes it", no="keeps it")
            if not await self.app.push_screen_wait(confirm):
                return
            kept = await asyncio.to_thread(remove, run)
            tail = f"; its config is {kept}" if kept else ""
            self.app.notify(visible(f"removed {run.name}{tail}", one_line=True), markup=False)

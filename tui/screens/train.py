"""The Train page: a run that lives in a process of its own, followed through its files.

The page asks and shows; leaving it never stops the run. What the events add up to is in
`engine.runs.history`.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget
from textual.widgets import Static

from engine.errors import UserError, WorkError
from engine.events import Phase, Recorded
from engine.launch import resume_run
from engine.report.run import (
    NEXT,
    Headline,
    ask_command,
    asked,
    clock_time,
    device_and_model,
    event_line,
    figures_text,
    headline,
    notes,
    ranks_text,
    room,
    stop_question,
    way_back,
)
from engine.runs import Follower, Request, RunFolder, Status, send, status
from engine.runs.history import METRICS, Answer, History, Logged, Metric, Series, finite
from engine.runs.listing import OpenRun
from engine.runs.lock import unreadable
from engine.visible import fold, visible
from tui.line import line_content
from tui.page import HelpText, Key, Page
from tui.widgets.chart import Chart, Curve, Scale, Spark
from tui.widgets.pane import Confirm, Drawn, Pane, TextPane

_TREND_POINTS: Final = 10
_MOST_DIGITS: Final = 3
"""More would be zeros: such a figure is written as a power of ten."""


_STYLES: Final = ("$accent", "$warning", "$success", "$secondary")


def metric_styles() -> Iterator[tuple[Metric, str]]:
    return zip(METRICS, cycle(_STYLES), strict=False)


def _value(metric: Metric, series: Series) -> str:
    if not series.raw:
        return ""
    if not math.isfinite(series.last):
        return "not a number"
    if metric.digits <= _MOST_DIGITS:
        return f"{series.last:,.{metric.digits}f}"
    return f"{series.last:.1e}".replace("e-0", "e-") if series.last else "0"


def _trend(smooth: list[tuple[float, float]]) -> str:
    """Where the average went over the last points that are drawn."""
    values = finite(smooth)[-_TREND_POINTS:]
    if len(values) < _TREND_POINTS or values[0] == values[-1]:
        return ""
    return " ↓" if values[-1] < values[0] else " ↑"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not a number"


_LABEL_CELLS: Final = 9
_LEAST_BAR_CELLS: Final = 8


def progress_row(headline: Headline, size: Size) -> Content:
    """A bar where a share of the work is known, and one sentence."""
    text = visible(headline.text, one_line=True)
    room = size.width - len(text) - 2
    if headline.share is None or room < _LEAST_BAR_CELLS:
        return Content(text)
    full = round(room * min(1.0, max(0.0, headline.share)))
    return Content.assemble(
        ("━" * full, "bold $primary"), ("╌" * (room - full), "$faint"), "  ", text
    )


def log_rows(lines: Sequence[Logged], size: Size) -> Content:
    """What happened, the newest line first, of lines that have the oldest first."""
    rows = [log_line(line) for line in reversed(lines)][: max(1, size.height)]
    return Content("\n").join(row.truncate(size.width, ellipsis=True) for row in rows)


def log_line(line: Logged) -> Content:
    report = event_line(line.event, line.best)
    assert report is not None  # what tells a person nothing is not logged
    if isinstance(line.event, Phase):  # how far it is stands in the second row
        report = replace(report, text="")
    return Content.styled(f"{clock_time(line.time)} ", "$faint") + line_content(report, detail=True)


def answer_text(prompt: str, answers: Sequence[Answer], size: Size) -> Content:
    """A prompt and its answers, the newest last, in the lines of `size`.

    The answer before training and the newest are shown whole before others get room; where even
    they have none, each is cut to one line.
    """
    said = [("asked", prompt), *((each.label, each.text) for each in answers)]
    newest = len(answers) or -1
    blocks = [
        _block(label, text, "$lit" if place == newest else "$muted", size.width)
        for place, (label, text) in enumerate(said)
    ]
    while len(blocks) > 3 and sum(map(len, blocks)) > size.height:
        del blocks[2]  # the oldest answer between the first and the last
    if sum(map(len, blocks)) > size.height:
        blocks = [[_cut(block, size.width)] for block in blocks]
    lines = [line for block in blocks for line in block]
    return Content("\n").join(lines[: size.height])


def _block(label: str, text: str, style: str, columns: int) -> list[Content]:
    shown = fold(visible(text, one_line=True), max(1, columns - _LABEL_CELLS))
    heads = [label, *[""] * (len(shown) - 1)]
    return [
        Content.assemble((f"{head:<{_LABEL_CELLS}}", "$accent"), (line, style))
        for head, line in zip(heads, shown, strict=True)
    ]


def _cut(block: list[Content], columns: int) -> Content:
    if len(block) == 1:
        return block[0]
    return block[0].truncate(columns - 2).rstrip() + Content(" …")


_REDRAW_SECONDS: Final = 0.25
_LOG_BYTES: Final = 1 << 14
_RESUME_SECONDS: Final = 120.0
POLL_SECONDS: Final = 0.25
_EVENTS_AT_ONCE: Final = 500
"""A long file arrives in pieces of some 10 ms of work, so that keys are answered in between."""

_ALIVE: Final = ("waiting", "running", "paused")
_KEYS: Final = (
    Key("tab", "next pane", 1),
    Key("z", "maximise"),
    Key("l", "log"),
    Key("v", "all samples"),
    Key("c", "save now"),
)
_LIVE_KEYS: Final = (
    *_KEYS,
    Key("p", "pause", 2),
    Key("s", "stop and save", 3),
    Key("q", "leave it running", 3),
)
_PAUSED_KEYS: Final = (
    *_KEYS[:-1],
    Key("p", "go on", 3),
    Key("s", "stop and save", 3),
    Key("q", "leave it paused", 2),
)
_DONE_KEYS: Final = (*_KEYS[:-1], Key("esc", "all runs"), Key("q", "leave"))
_DEAD_KEYS: Final = (Key("r", "resume", 3), *_DONE_KEYS)
_STATUS_KEYS: Final[Mapping[Status | None, Sequence[Key]]] = {
    "paused": _PAUSED_KEYS,
    "finished": _DONE_KEYS,
    "stopped": _DEAD_KEYS,
    "failed": _DEAD_KEYS,
    "lost": _DEAD_KEYS,
}


class TrainPage(Page):
    """One run, live. `fresh` is a run that was started a moment ago."""

    CSS_PATH = Path(__file__).with_name("train.tcss")
    KEYS = _LIVE_KEYS
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "pause", "pause or go on", show=False),
        Binding("c", "ask('save')", "save now", show=False),
        Binding("s", "stop", "stop and save", show=False),
        Binding("r", "resume", "resume", show=False),
        Binding("f", "make_room", "make room and go on", show=False),
        Binding("v", "samples", "all samples", show=False),
        Binding("l", "log", "the log", show=False),
        Binding("z", "maximise", "maximise a pane", show=False),
        Binding("q", "app.leave", "leave it running", show=False),
    ]

    def __init__(
        self, folder: RunFolder, *, fresh: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__()
        self._folder = folder
        self._run_name = visible(folder.name, one_line=True)
        self._fresh = fresh
        self._clock = clock
        self._history = History()
        self._status: Status | None = None
        self._asked: dict[str, tuple[Request, float]] = {}
        self._changed = True
        self._end_shown = False
        self._resuming = False

    def compose_body(self) -> ComposeResult:
        yield Drawn(id="progress")
        with Horizontal(id="charts"):
            with Pane(title="loss", id="loss", can_focus=True):
                yield Chart()
            with Vertical(id="small"):
                for metric, _ in metric_styles():
                    with Pane(title=metric.name, classes="small", can_focus=True):
                        yield Chart(foot=False)
        with Vertical(id="sparks"):
            for metric, style in metric_styles():
                yield Spark(metric.name, style)
        yield Static(id="note", markup=False)
        with Horizontal(id="below"):
            with Pane(id="samples", can_focus=True):
                yield Drawn("no answer was asked for yet", id="answers")
            with Pane(title="log", id="log", can_focus=True):
                yield Drawn(id="happened")

    def on_mount(self) -> None:
        self.show_command(["watch", self._folder.name])
        self.set_interval(_REDRAW_SECONDS, self._redraw)
        self.run_worker(self._follow())
        if self._fresh:
            self.notify("started; it goes on when this window closes", timeout=4, markup=False)

    @property
    def parting(self) -> str:
        return way_back(self._folder, self._status)

    def help_for(self, focused: Widget | None) -> HelpText:
        text = _HELP.get(focused.id or "" if focused else "", _HELP["loss"])
        return HelpText("the run", text, ("watch", self._folder.name))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        alive = self._status in _ALIVE
        if action in ("pause", "stop", "ask") and not alive:
            return False
        if action == "resume" and (alive or self._status == "finished"):
            return False
        return super().check_action(action, parameters)

    async def _follow(self) -> None:
        with self.showing_refusals():
            opened = await asyncio.to_thread(OpenRun, self._folder)
            self._history = opened.history
            async for events, now in follow_run(self._folder, opened.follower):
                self._take_in(events, now)
                if now:
                    await asyncio.to_thread(opened.keep)

    def _take_in(self, events: Sequence[Recorded], now: Status | None) -> None:
        self._history.add(events)
        if now != self._status:
            self._status = now
            self._end_shown = self._end_shown and now not in _ALIVE
            self.refresh_bindings()
        for identity in [each for each in self._asked if each in self._history.acks]:
            word, _ = self._asked.pop(identity)
            if self._history.acks[identity].outcome == "refused":
                self.show_problem(_refused(self._run_name, word))
        if self._status not in _ALIVE:
            self._asked.clear()
        self._changed = True

    def on_screen_resume(self) -> None:
        self._changed = True

    def on_resize(self) -> None:
        self._changed = True

    def action_accept(self) -> None:
        """Enter does what the highlighted pane offers: show it whole."""
        self.action_maximise()

    def action_pause(self) -> None:
        self.action_ask("resume" if self._status == "paused" else "pause")

    def action_ask(self, word: Request) -> None:
        self.run_worker(self._send(word))

    async def _send(self, word: Request) -> None:
        with self.showing_refusals():
            identity = await asyncio.to_thread(send, self._folder, word)
            if identity not in self._history.acks:
                self._asked[identity] = (word, self._clock())
            self._changed = True

    def action_stop(self) -> None:
        self.run_worker(self._stop())

    async def _stop(self) -> None:
        question = stop_question(self._history)
        confirm = Confirm(self._folder.name, question, yes="stops", no="goes on")
        if await self.app.push_screen_wait(confirm):
            await self._send("stop")

    def action_resume(self, changes: Mapping[str, str] | None = None) -> None:
        if not self._resuming:
            self._resuming = True
            words = [f"{key}={value}" for key, value in (changes or {}).items()]
            self.run_worker(self._resume(words))

    async def _resume(self, changes: Sequence[str]) -> None:
        work = partial(resume_run, self._folder, changes=changes, timeout_seconds=_RESUME_SECONDS)
        with self.showing_refusals():
            await asyncio.to_thread(work)
        self._resuming = False

    def action_make_room(self) -> None:
        """Go on with the change that saves memory and alters no result."""
        shortage = self._history.shortage
        if shortage and shortage.changes and self._status not in _ALIVE:
            self.action_resume(shortage.changes)

    def action_samples(self) -> None:
        size = Size(max(20, self.size.width - 6), 1000)
        texts = [
            answer_text(prompt, answers, size) for prompt, answers in self._history.answers.items()
        ]
        text = Content("\n\n").join(texts) if texts else Content("no answer was asked for yet")
        self.cover(TextPane("what it said", text), [Key("esc", "close")])

    def action_log(self) -> None:
        happened = Content("\n").join(log_line(line) for line in reversed(self._history.log))
        printed = visible(_tail(self._folder.log))
        panel = Vertical(
            TextPane("what happened", happened or Content("nothing yet"), subtitle="newest first"),
            TextPane("engine.log", Content(printed or "it printed nothing"), subtitle="its end"),
            classes="halves",
        )
        self.cover(panel, [Key("tab", "other pane"), Key("esc", "close")])

    def action_maximise(self) -> None:
        focused = self.focused
        match focused.id if focused else None:
            case "samples":
                self.action_samples()
            case "log":
                self.action_log()
            case _:
                self._toggle_maximised(focused)

    def action_back(self) -> None:
        if self.query_one("#body").has_class("-one"):
            self._toggle_maximised(None)
        else:
            super().action_back()

    def _toggle_maximised(self, pane: Widget | None) -> None:
        """One pane of curves takes the room of all."""
        body = self.query_one("#body")
        one = not body.has_class("-one") and pane is not None
        self.query(".-only").remove_class("-only")
        body.set_class(one, "-one")
        if one and pane:
            shown = [each for each in pane.ancestors_with_self if body in each.ancestors]
            for each in shown:
                each.add_class("-only")
        self._changed = True

    def _redraw(self) -> None:
        """Draw what has changed; a timer calls it, so a flood of events costs four pictures."""
        if not self.is_current:  # under another page, or the app is being closed
            return
        self._show_headline()
        if self._changed:
            self._changed = False
            self._show_curves()
            self._show_answers()
            self.query_one("#happened", Drawn).show(partial(log_rows, self._history.log))
            self._show_note()
            self._show_end()

    def _show_curves(self) -> None:
        right = float(self._history.total_steps or 1)
        self._show_loss(right)
        panes = self.query("Pane.small").results(Pane)
        for (metric, style), pane, spark in zip(
            metric_styles(), panes, self.query(Spark), strict=True
        ):
            series = self._history.series[metric.name]
            points, value = series.raw.points(), _value(metric, series)
            top = max(finite(points), default=1.0) or 1.0
            scale = Scale(right, bottom=0, top=top, digits=metric.digits)
            pane.show_subtitle(value)
            pane.query_one(Chart).show([Curve(points, style)], scale)
            spark.show(points, scale, value)

    def _show_loss(self, right: float) -> None:
        pane, loss, held_out = (
            self.query_one("#loss", Pane),
            self._history.loss,
            self._history.held_out,
        )
        smooth = loss.smooth.points()
        pane.show_title(f"loss {_number(loss.smooth.last)}{_trend(smooth)}" if smooth else "loss")
        legend = "⠒ loss  ━ smoothed"
        if held_out and self._history.best:
            step, newest = held_out[-1]
            best = ", best" if newest == self._history.best[1] else ""
            legend += f"  ◆ held out {_number(newest)} at step {step}{best}"
        pane.show_subtitle(legend)
        curves = [Curve(loss.raw.points(), "$raw"), Curve(smooth, "bold $primary")]
        curves.append(Curve([(float(step), value) for step, value in held_out], "bold $lit", "◆"))
        pane.query_one(Chart).show(curves, Scale(right))

    def _show_headline(self) -> None:
        now = self._clock()
        line = headline(self._history, self._status, now)
        if self._resuming:
            line = Headline("·", "resuming", "waiting for the trainer's process to begin")
        text = device_and_model(self._history)
        for word, since in self._asked.values():
            text = asked(word, since, now, self._history)
        self.say(line.mark, line.word, f"{self._folder.name}  {text}")
        self.query_one("#progress", Drawn).show(partial(progress_row, line))

    def _show_note(self) -> None:
        """What to look at, the figures of the last evaluation, what a finished run is good for."""
        note = notes(self._history)
        lines = [Content.styled(note, "$warning")] if note else []
        if figures := figures_text(*self._history.figures):
            lines.append(Content.styled(visible(figures, one_line=True), "$muted"))
        if ranks := ranks_text(self._history.step):
            lines.append(Content.styled(ranks, "$muted"))
        if self._status == "finished":
            lines.append(Content(NEXT))
            self.show_command(ask_command(self._history, self._folder.name))
        self.query_one("#note", Static).update(Content("\n").join(lines))
        self.query_one("#note").display = bool(lines)

    def _show_answers(self) -> None:
        prompts = list(self._history.answers)
        pane = self.query_one("#samples", Pane)
        more = f"   v all {len(prompts)} prompts" if len(prompts) > 1 else ""
        pane.show_title("what it says now" + more)
        if prompts:
            draw = partial(answer_text, prompts[0], self._history.answers[prompts[0]])
            self.query_one("#answers", Drawn).show(draw)

    def _show_end(self) -> None:
        self.show_keys(_STATUS_KEYS.get(self._status, _LIVE_KEYS))
        if self._status not in ("failed", "lost") or self._end_shown:
            return
        self._end_shown = True
        saves = [each.path for each in self._history.saved]
        last = visible(saves[-1], one_line=True) if saves else ""
        actions: list[tuple[str, Callable[[], None]]] = [("keep it as it is", lambda: None)]
        actions.append(("show the log", self.action_log))
        if last:
            actions.insert(0, (f"resume from {last.rsplit('/', 1)[-1]}", self.action_resume))
        shortage = self._history.shortage
        if words := room(shortage) if shortage else "":
            actions.insert(0, (words, self.action_make_room))
        kept = f"{last} is whole." if last else "nothing was saved yet."
        self.show_problem(_end_of(self._history, self._folder), kept=kept, actions=actions)


async def follow_run(
    run: RunFolder, follower: Follower
) -> AsyncIterator[tuple[Sequence[Recorded], Status | None]]:
    """The events of a run that `follower` has not given, read in a thread: no disk holds the screen
    up.

    At most four times a second once what was there is read, and only when there is something new.
    The status is None while what was written before is still being read. Raises UserError where
    the folder cannot be read.
    """
    before: Status | None = None
    while True:
        try:
            now = await asyncio.to_thread(status, run)  # first: no word before an end is lost
            events = await asyncio.to_thread(follower.read)
        except OSError as error:
            raise unreadable(run, error) from error
        more = len(events) > _EVENTS_AT_ONCE
        for start in range(0, len(events), _EVENTS_AT_ONCE):
            yield events[start : start + _EVENTS_AT_ONCE], before if more else now
            await asyncio.sleep(0)  # keys are let in between
        if not events and now != before:
            yield (), now
        if not more:
            before = now
            await asyncio.sleep(POLL_SECONDS)


_HELP: Final = {
    "loss": "How far the model is from the answers of the data, per learned token, in nats: lower "
    "is better. The thin line is each step, the bold one its average over the last steps, a "
    "diamond the loss on held-out rows that are never learned. When the diamonds rise while the "
    "lines fall, the model learns its rows by heart.",
    "figures": "By kind: the held-out loss of thinking, answers and calls apart. Stop by "
    "themselves: the share of answers to held-out rows, written freely, that end before the limit. "
    "Drift: how far the model has moved from its base on general questions, in nats a token; 0 is "
    "not at all.",
    "samples": "The same prompts, answered before training, at each evaluation and at the end, "
    "with the settings that the model's makers advise and always equal luck: whatever changes in "
    "them was learned.",
    "log": "What the run did besides its steps, the newest first. l shows it whole, with all that "
    "the trainer and its libraries printed.",
}


def _end_of(history: History, folder: RunFolder) -> UserError:
    end = history.ended
    if end and end.outcome == "failed":
        return WorkError(end.what, end.why, end.fix)
    return WorkError(
        f"The run {visible(folder.name, one_line=True)} is lost.",
        "Its trainer's process is gone and wrote no last word: it was killed, or the machine was.",
        "Read the end of its log, then resume it from its last save.",
    )


def _refused(name: str, word: Request) -> WorkError:
    return WorkError(
        f"The run {name} refused to {word}.",
        "It cannot do that where it is now.",
        "Wait for the next step, then ask again.",
    )


def _tail(path: Path) -> str:
    """The end of a text file; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            return file.read().decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    except OSError:
        return ""

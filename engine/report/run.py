"""A run in words: each event as a line, where it stands, how far it is, what it changed.

The lines of `watch` and of the questions, the bar of a foreground run and the pages of runs are
these. Pure but for the folder that is read: a history, a status and the time make the sentences.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from engine.errors import UserError, WorkError
from engine.events import (
    Answers,
    Drift,
    Ended,
    Eval,
    Event,
    Note,
    Phase,
    Sample,
    Saved,
    Score,
    Shortage,
    Started,
    Step,
)
from engine.report import SEVERITY_MARKS, Line, Mark
from engine.runs import Follower, Request, RunFolder, Status, Summary, summarize
from engine.runs.folder import LATEST, read_mark
from engine.runs.history import History
from engine.units import GIB, counted, gib, nats, stored
from engine.visible import visible

_LIVE: Final[dict[Status | None, str]] = {
    "waiting": "starting",
    "running": "training",
    "paused": "paused",
}


def state_lines(run: RunFolder) -> list[Line]:
    """Where a run is now, and how to go on with it or what came of it."""
    summary = summarize(run)
    match summary.status:
        case "finished":
            made = " and ".join(
                str(folder) for folder in (run.adapter, run.model) if folder.is_dir()
            )
            return [Line("", f"Finished at step {summary.step}", made)]
        case "stopped" | "lost":
            of = f" of {summary.total_steps}" if summary.total_steps else ""
            ended = f"{summary.status.capitalize()} at step {summary.step}{of}"
            return [
                Line("", "", f"{ended}, {_saved_text(run, summary.step)}."),
                Line("", "Go on with", f"windtunnel resume {run.path}"),
            ]
        case _:
            return [Line("", "", f"It is {summary.status} in {run.path}")]


def _saved_text(run: RunFolder, step: int) -> str:
    """`and saved`, or what a run that ended at `step` goes on from."""
    name = read_mark(run.checkpoints, LATEST)
    if name == f"step-{step}":
        return "and saved"
    if name:
        return f"the last save is {name}"
    return "and nothing was saved" if step else "nothing to save yet"


def require_end(run: RunFolder, end: Event | None, exit_status: int | None = None) -> None:
    """Raises the sentence of a run whose last event is that it failed, and WorkError where it is
    none that ends a run."""
    if not isinstance(end, Ended):
        how = "" if exit_status is None else f" (exit status {exit_status})"
        name = visible(run.name, one_line=True)
        raise WorkError(
            f"The run {name} is lost.",
            f"Its trainer ended without a word{how}.",
            f"Read {visible(str(run.log), one_line=True)}, then: windtunnel resume {name}",
        )
    if end.outcome == "failed":
        raise UserError(end.what, end.why, end.fix, exit_status=exit_status or 1)


def way_back(run: RunFolder, status: Status | None) -> str:
    """`still paused: windtunnel watch pilot`, for who leaves a run alone; empty for one that has
    ended."""
    name = visible(run.name, one_line=True)
    return f"still {_LIVE[status]}: windtunnel watch {name}" if status in _LIVE else ""


def progress_text(summary: Summary) -> str:
    of = f" of {summary.total_steps}" if summary.total_steps else ""
    loss = "" if summary.loss is None else f", loss {nats(summary.loss)}"
    left_out = rows_left_out(summary.rows, summary.rows_left_out)
    return f"step {summary.step}{of}{loss}{f', {left_out}' if left_out else ''}"


def rows_left_out(rows: int | None, count: int | None) -> str:
    """`2 of 5 rows left out`, empty where none is."""
    return f"{count:,} of {counted(rows, 'row')} left out" if rows and count else ""


def figures_text(score: Score | None, written: Answers | None, drift: Drift | None) -> str:
    """The newest figures of an evaluation beside its loss, and its step; empty before the first."""
    figures = []
    if score and (kinds := kind_losses(score)):
        figures.append("loss of " + ", ".join(f"{kind} {nats(loss)}" for kind, loss in kinds))
    if written:
        figures.append(f"{written.stopped:.0%} stop by themselves")
    if drift:
        figures.append(f"drift {drift.kl:.2f}")
    step = max(each.step for each in (score, written, drift) if each) if figures else 0
    return f"step {step}: {'  ·  '.join(figures)}" if figures else ""


_RANKS_LISTED: Final = 8
"""As many as a line of 80 columns has room for."""


def ranks_text(step: Step | None) -> str:
    """Peak memory of each rank, the slowest one marked, and what they wait for each other; empty
    for a run of one."""
    if step is None or not step.rank_peak_bytes:
        return ""
    peaks = [size / GIB for size in step.rank_peak_bytes]
    if len(peaks) <= _RANKS_LISTED:
        slowest = step.slowest_rank
        listed = (f"{rank}{'◂' if rank == slowest else ''} {x:.1f}" for rank, x in enumerate(peaks))
        text = f"ranks {'  '.join(listed)} GiB, ◂ slowest"
    else:
        text = f"{len(peaks)} ranks {min(peaks):.1f} to {max(peaks):.1f} GiB"
        text += f", slowest {step.slowest_rank}" if step.slowest_rank is not None else ""
    return text + (f", {step.imbalance:.0%} waiting" if step.imbalance is not None else "")


PHASES: Final[Mapping[str, str]] = {
    "import": "starting PyTorch",
    "model": "looking for the model",
    "download": "downloading the model",
    "hashing": "reading the data",
    "tokenizing": "tokenizing",
    "waiting": "waiting for another process that prepares the same data",
    "prepared": "data ready",
    "load": "loading the model",
    "evaluate": "scoring what is held out",
    "save": "saving",
    "export": "writing the result",
    "upload": "uploading the result",
}
KINDS: Final[Mapping[str, str]] = {"think": "thinking", "text": "answers", "call": "tool calls"}
"""The kinds of learned tokens that a person asks for; what ends an answer and learned questions are
in the whole alone."""
_OUTCOMES: Final[Mapping[str, Mark]] = {"finished": "✓", "stopped": "·", "failed": "✗"}


def event_line(event: Event, best: float | None = None) -> Line | None:
    """One event; None for one that tells a person nothing.

    `best` is the lowest held-out loss before it, where that is known.
    """
    match event:
        case Started():
            text = f"training {event.model} ({event.method}) on {', '.join(event.devices)}:"
            text += f" {event.total_steps:,} steps"
            return Line("", "", f"{text}, {event.trainable_parameters:,} trained parameters")
        case Phase():
            return Line("", PHASES.get(event.name, event.name), _amount(event))
        case Step():
            of = f" of {event.total_steps}" if event.total_steps else ""
            speed = f"{event.tokens_per_second:,.0f} tokens/s"
            ranks = f", {text}" if (text := ranks_text(event)) else ""
            text = f"loss {nats(event.loss)}, lr {event.lr:.2e}, {speed}{ranks}"
            return Line("", f"step {event.step}{of}", text)
        case Note():
            return Line(SEVERITY_MARKS[event.level], "", event.text)
        case Shortage():
            return Line("✗", f"memory ran out in {event.where}", _held(event), room(event))
        case Sample():
            return Line("", event.when, f"{event.prompt} -> {event.text}")
        case Ended():
            text = f"{event.outcome} at step {event.step}"
            return Line(_OUTCOMES[event.outcome], text, event.what)
        case Eval() | Score() | Answers() | Drift() | Saved():
            return _measured(event, best)
        case _:
            return None


LINE_SECONDS: Final = 10.0
"""Between two lines of steps, or of one phase, where lines stay: in a log, for a screen reader."""


class SpacedLines:
    """Events as lines that stay: all but those of steps and of a phase, which come in time.

    The end is none: whoever waits for it says what came of it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next: dict[str, float] = {}

    def line(self, event: Event) -> Line | None:
        """The line of an event; None where there is none, or where it is not its time."""
        if isinstance(event, Step | Phase):
            name, now = event.name if isinstance(event, Phase) else "", self._clock()
            is_last = isinstance(event, Step) and event.step == event.total_steps
            if now < self._next.get(name, now) and not is_last:
                return None
            self._next[name] = now + LINE_SECONDS
        return None if isinstance(event, Ended) else event_line(event)


def _measured(event: Eval | Score | Answers | Drift | Saved, best: float | None) -> Line:
    detail = ""
    match event:
        case Eval():
            text = f"held-out loss {nats(event.loss)}"
            if best is not None:
                better = event.loss < best
                detail = f"best so far (was {nats(best)})" if better else f"best {nats(best)}"
        case Score():
            text = f"{event.dataset}, loss {nats(event.loss)},"
            text += f" {event.exact:.0%} of {event.rows:,} answers word for word"
            detail = ", ".join(f"{name} {nats(loss)}" for name, loss in kind_losses(event))
        case Answers():
            text = f"{event.dataset}, {event.stopped:.0%} of {event.rows:,} written answers stop by"
            text += f" themselves, {event.length_ratio:.2f} times the reference's length"
        case Drift():
            text = f"drift on general questions {event.kl:.2f} nats a token"
        case Saved():
            text = f"saved {event.path}"
    return Line("", f"step {event.step}", text, detail)


def kind_losses(score: Score) -> list[tuple[str, float]]:
    """The loss of each kind by its name; empty where there is one kind only."""
    found = [(KINDS[kind], loss) for kind, loss in score.loss_by_kind.items() if kind in KINDS]
    return found if len(found) > 1 else []


def _amount(phase: Phase) -> str:
    """How far a phase is: bytes as people say them, and in percent; other things are counted."""
    done, total, detail = phase.done or 0, phase.total, phase.detail
    if not total or phase.name == "prepared":  # its detail counts the rows itself
        return detail
    if not detail.startswith("bytes"):
        return f"{done:,} of {total:,} {detail}".strip()
    amount = f"{stored(done, total)}, {done / total:.0%}"
    rows = detail.removeprefix("bytes")
    return amount if rows == ", 0 rows" else amount + rows


def _held(shortage: Shortage) -> str:
    """What was held when memory ran out, beside what was planned."""
    planned = shortage.predicted_parts
    parts = [
        f"{name} {gib(size)}" + (f" (planned {gib(planned[name])})" if name in planned else "")
        for name, size in shortage.parts.items()
        if size
    ]
    return ", ".join(parts)


def room(shortage: Shortage) -> str:
    """What makes room after memory ran out, and what it costs; empty where nothing does."""
    if not shortage.changes or shortage.taken:
        return ""
    values = ", ".join(f"{key} {value}" for key, value in shortage.changes.items())
    return f"go on with {values}: {gib(shortage.saves_bytes)} less; {shortage.trade}"


_LABEL_CELLS: Final = 38
_NUMBER_CELLS: Final = 9


def read_results(run: RunFolder) -> list[str]:
    follower, events = Follower(run.events), list[Event]()
    while found := follower.read():
        events += [recorded.event for recorded in found]
    return describe_results(events)


def describe_results(events: Iterable[Event]) -> list[str]:
    """The table, line by line; empty where a run has not been evaluated twice."""
    scores: dict[str, list[Score]] = {}
    answers: dict[str, list[Answers]] = {}
    drifts: list[Drift] = []
    for event in events:
        match event:
            case Score():
                scores.setdefault(event.dataset, []).append(event)
            case Answers():
                answers.setdefault(event.dataset, []).append(event)
            case Drift():
                drifts.append(event)
    lines = []
    for dataset, found in scores.items():
        if found[0].step < found[-1].step:
            lines += _set_lines(dataset, found, answers.get(dataset, ()))
    if drifts and drifts[0].step < drifts[-1].step:
        values = (f"{each.kl:.2f}" for each in (drifts[0], drifts[-1]))
        lines.append(_row("drift on general questions (nats)", *values))
    return [_row("", "before", "after"), *lines] if lines else []


def _set_lines(dataset: str, scores: Sequence[Score], answers: Sequence[Answers]) -> list[str]:
    first, last = scores[0], scores[-1]
    lines = [_row(f"{dataset}: loss", nats(first.loss), nats(last.loss))]
    kinds = [kind for kind in KINDS if kind in last.loss_by_kind]
    for kind in kinds if len(kinds) > 1 else ():
        found = (each.loss_by_kind.get(kind) for each in (first, last))
        losses = ("-" if loss is None else nats(loss) for loss in found)
        lines.append(_row(f"  loss of {KINDS[kind]}", *losses))
    lines.append(_row("  answers word for word", f"{first.exact:.0%}", f"{last.exact:.0%}"))
    if not answers or answers[0].step == answers[-1].step:
        return lines
    pair = (answers[0], answers[-1])
    lines.append(_row("  stop by themselves", *(f"{each.stopped:.0%}" for each in pair)))
    ratios = (f"{each.length_ratio:.2f}" for each in pair)
    lines.append(_row("  length against the reference", *ratios))
    if pair[-1].calls:
        shares = ("-" if e.calls_valid is None else f"{e.calls_valid:.0%}" for e in pair)
        lines.append(_row("  right calls, valid arguments", *shares))
    return lines


def _row(label: str, before: str, after: str) -> str:
    shown = visible(label, one_line=True)
    return f"{shown:<{_LABEL_CELLS}}{before:>{_NUMBER_CELLS}}{after:>{_NUMBER_CELLS}}"


SILENT_SECONDS: Final = 30.0
_SILENT_STEPS: Final = 5
_PATIENCE_SECONDS: Final = 10.0
_PHASE_SECONDS: Final = 600.0
"""Reading 250 GB of weights from a slow disk tells nothing for minutes."""
_FORESEEN_SECONDS: Final = 1e9
"""Thirty years: what takes longer has no time of day at which it is done."""
_MANY_SECONDS: Final = 300.0
_CLOCK_SECONDS: Final = 3.0
"""Longer waits have a clock: what stands still looks dead."""
_RISES: Final = 3


@dataclass(frozen=True, slots=True)
class Headline:
    """The first row's verdict and the second row."""

    mark: Mark
    word: str
    text: str
    """Of the second row."""
    share: float | None = None
    """How much of the bar is full, 0 to 1; None draws no bar."""


def headline(history: History, status: Status | None, now: float) -> Headline:
    """What the run does. `now` is in Unix seconds."""
    done, share = steps(history), _share(history)
    match status:
        case "running":
            return _running(history, now)
        case "paused":
            return Headline("❚❚", "paused", f"{done}   p goes on", share)
        case "finished":
            took = duration(history.last_time - history.began_time)
            text = f"{history.steps_done} steps in {took}"
            if history.best:
                step, loss = history.best
                text += f"   best held-out {nats(loss)} at step {step}"
            return Headline("✓", "done", text)
        case "stopped":
            text = f"{done}  stopped {clock_time(history.last_time)}   r goes on"
            return Headline("·", "stopped", text, share)
        case "failed":
            what = history.ended.what if history.ended else ""
            return Headline("✗", "failed", f"{done}  {what}".strip())
        case "lost":
            text = f"{done}  its process ended without a word   r goes on, l shows its log"
            return Headline("✗", "lost", text)
        case _:
            return Headline("·", "starting", "waiting for the trainer's process to begin")


def device_and_model(history: History) -> str:
    """`2 GPUs · Magistral-Small-2509`, or nothing before the model is loaded."""
    if not history.started:
        return ""
    devices = history.started.devices
    gpus = [each for each in devices if each != "cpu"]
    where = counted(len(gpus), "GPU") if gpus else "CPU"
    started = history.started
    model = started.model.rstrip("/").rsplit("/", 1)[-1]
    left_out = rows_left_out(started.rows, started.rows_left_out)
    return " · ".join(part for part in (where, model, left_out) if part)


def asked(command: Request, since: float, now: float, history: History) -> str:
    """What is said between a request and its answer."""
    if now - since < _PATIENCE_SECONDS:
        return f"asked to {command}…"
    return f"no answer to {command} yet: step {history.steps_done + 1} takes longer than usual"


def stop_question(history: History) -> str:
    """What `s` will do, in the sentence that asks for it."""
    step = history.steps_done + 1
    return f"Stop after step {step}, save it and keep the adapter? You can resume."


def notes(history: History) -> str:
    saves = [each.step for each in history.saved]
    if history.nan_since is not None:
        good = [step for step in saves if step < history.nan_since]
        kept = f"the last good save is step {good[-1]}" if good else "nothing good is saved"
        return f"! loss is not a number since step {history.nan_since}: s stops, {kept}"
    if history.rises >= _RISES and history.best:
        step, loss = history.best
        return (
            f"! held-out loss rose {history.rises} times in a row: more passes will not help; "
            f"best is {nats(loss)} at step {step}"
        )
    return ""


NEXT: Final = "next: ask it as below, or windtunnel chat, merge -o FOLDER, serve-hint"
"""What a finished run is good for; the command below it is `ask_command`."""


def ask_command(history: History, name: str) -> list[str]:
    """The words after `windtunnel` that ask a finished run what it was asked while it learned."""
    return ["generate", name, "--prompt", next(iter(history.answers), "Hello")]


def duration(seconds: float) -> str:
    """`5:41`, or `3 h 20 min`."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock_time(moment: float) -> str:
    """`14:58:07` in the local time zone; `?` before the first event."""
    if not math.isfinite(moment):
        return "?"
    return datetime.fromtimestamp(moment).strftime("%H:%M:%S")


def steps(history: History) -> str:
    """`step 61/99  epoch 1.8/3`."""
    step, total = history.step, history.total_steps
    words = f"step {history.steps_done}" + (f"/{total}" if total else "")
    if step and step.step > 0 and total:
        words += f"  epoch {step.epoch:.1f}/{round(step.epoch * total / step.step, 1):g}"
    return words


def _running(history: History, now: float) -> Headline:
    quiet = now - history.last_time
    if history.phase:
        if quiet > _PHASE_SECONDS:
            return _silent(history, quiet)
        return _in_phase(history, now)
    if not history.started:
        return Headline("◌", "loading", "the trainer's process has begun")
    if not history.step:
        text = f"{steps(history)}  the first step takes longer than the others"
        return Headline("▶", "training", text)
    if quiet > max(SILENT_SECONDS, _SILENT_STEPS * history.step_seconds):
        return _silent(history, quiet)
    left = history.seconds_left
    tail = ""
    if left < _FORESEEN_SECONDS:
        done = datetime.fromtimestamp(history.last_time + left).strftime("%H:%M")
        tail = f"   {duration(left - quiet)} left, done {done}"
    return Headline("▶", "training", steps(history) + tail, _share(history))


def _in_phase(history: History, now: float) -> Headline:
    phase = history.phase
    assert phase
    line = event_line(phase)
    assert line is not None
    words, waited = str(line), now - history.phase_time
    if waited >= _CLOCK_SECONDS:
        words += f"  {duration(waited)}"
    if history.started and history.step:
        word = "checking" if phase.name == "evaluate" else "training"
        return Headline("▶", word, f"{steps(history)}  {words}", _share(history))
    share = (phase.done or 0) / phase.total if phase.total else None
    return Headline("◌", "loading", words, share)


def _silent(history: History, quiet: float) -> Headline:
    usual = history.step_seconds
    takes = f" (a step takes {usual:.1f})" if math.isfinite(usual) else ""
    waited = f"{quiet:.0f} s" if quiet < _MANY_SECONDS else duration(quiet)
    text = f"no word for {waited}{takes}. The process lives: l shows its log"
    return Headline("?", "silent", text)


def _share(history: History) -> float | None:
    return history.steps_done / history.total_steps if history.total_steps else None

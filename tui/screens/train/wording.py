"""The words of the Train page: what a run does now, how long it still takes, what to look at.

Pure: a history, a status and the time make the sentences, so each state can be read and tested
without a screen.
"""

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from engine.report.run import event_line
from engine.runs import Request, Status
from engine.runs.history import History
from engine.units import counted, nats

SILENT_SECONDS: Final = 30.0
_SILENT_STEPS: Final = 5
_PATIENCE_SECONDS: Final = 10.0
_PHASE_SECONDS: Final = 600.0
"""Reading 250 GB of weights from a slow disk tells nothing for minutes."""
_MANY_SECONDS: Final = 300.0
_CLOCK_SECONDS: Final = 3.0
"""Longer waits have a clock: what stands still looks dead."""
_RISES: Final = 3


@dataclass(frozen=True, slots=True)
class Headline:
    """The first row's verdict and the second row."""

    mark: str
    word: str
    text: str
    """Of the second row."""
    share: float | None = None
    """How much of the bar is full, 0 to 1; None draws no bar."""


def headline(history: History, status: Status | None, now: float) -> Headline:
    """What the run does. `now` is in Unix seconds."""
    name = {
        None: _starting,
        "waiting": _starting,
        "running": _running,
        "paused": _paused,
        "finished": _finished,
        "stopped": _stopped,
        "failed": _failed,
        "lost": _lost,
    }[status]
    return name(history, now)


def device_and_model(history: History) -> str:
    """`2 GPUs · Magistral-Small-2509`, or nothing before the model is loaded."""
    if not history.started:
        return ""
    devices = history.started.devices
    gpus = [each for each in devices if each != "cpu"]
    where = counted(len(gpus), "GPU") if gpus else "CPU"
    model = history.started.model.rstrip("/").rsplit("/", 1)[-1]
    return f"{where} · {model}"


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
    """What to look at in the curves; empty where all is well."""
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
    """`14:58:07` in the local time zone."""
    return datetime.fromtimestamp(moment).strftime("%H:%M:%S")


def steps(history: History) -> str:
    """`step 61/99  epoch 1.8/3`."""
    step, total = history.step, history.total_steps
    words = f"step {history.steps_done}" + (f"/{total}" if total else "")
    if step and total:
        words += f"  epoch {step.epoch:.1f}/{round(step.epoch * total / step.step, 1):g}"
    return words


def _starting(history: History, now: float) -> Headline:
    return Headline("·", "starting", "waiting for the trainer's process to begin")


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
    if math.isfinite(left):
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


def _paused(history: History, now: float) -> Headline:
    return Headline("❚❚", "paused", f"{steps(history)}   p goes on", _share(history))


def _finished(history: History, now: float) -> Headline:
    text = f"{history.steps_done} steps in {_elapsed(history)}"
    if history.best:
        step, loss = history.best
        text += f"   best held-out {nats(loss)} at step {step}"
    return Headline("✓", "done", text)


def _stopped(history: History, now: float) -> Headline:
    text = f"{steps(history)}  stopped {clock_time(history.last_time)}   r goes on"
    return Headline("·", "stopped", text, _share(history))


def _failed(history: History, now: float) -> Headline:
    what = history.ended.what if history.ended else ""
    return Headline("✗", "failed", f"{steps(history)}  {what}".strip())


def _lost(history: History, now: float) -> Headline:
    text = f"{steps(history)}  its process ended without a word   r goes on, l shows its log"
    return Headline("✗", "lost", text)


def _share(history: History) -> float | None:
    return history.steps_done / history.total_steps if history.total_steps else None


def _elapsed(history: History) -> str:
    return duration(history.last_time - history.began_time)

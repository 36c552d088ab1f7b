"""An event of a run as a line: what happened, at which step, with which figures.

The lines of `watch` and of the questions, the bar of a foreground run and the log of the full
screen are these.
"""

from collections.abc import Mapping
from typing import Final

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
from engine.report.line import SEVERITY_MARKS, Line, Mark
from engine.units import gib, nats, stored

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
            text = f"loss {nats(event.loss)}, lr {event.lr:.2e}, {speed}"
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


def _measured(event: Eval | Score | Answers | Drift | Saved, best: float | None) -> Line:
    """What a run says of itself between two steps."""
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

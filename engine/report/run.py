"""A run in words: where it stands, how far it is, what its last evaluation said."""

from collections.abc import Iterable, Mapping, Sequence
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
from engine.report import SEVERITY_MARKS, Line, Mark
from engine.runs import Follower, RunFolder, Status, Summary, summarize
from engine.units import gib, nats, stored
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
        case "stopped":
            of = f" of {summary.total_steps}" if summary.total_steps else ""
            return [
                Line("", "", f"Stopped at step {summary.step}{of}, and saved."),
                Line("", "Go on with", f"windtunnel resume {run.path}"),
            ]
        case _:
            return [Line("", "", f"It is {summary.status} in {run.path}")]


def way_back(run: RunFolder, status: Status | None) -> str:
    """`still paused: windtunnel watch pilot`, for who leaves a run alone; empty for one that has
    ended."""
    name = visible(run.name, one_line=True)
    return f"still {_LIVE[status]}: windtunnel watch {name}" if status in _LIVE else ""


def progress_text(summary: Summary) -> str:
    """How far a run is, and its loss there."""
    of = f" of {summary.total_steps}" if summary.total_steps else ""
    loss = "" if summary.loss is None else f", loss {nats(summary.loss)}"
    return f"step {summary.step}{of}{loss}"


def figures_text(score: Score | None, written: Answers | None, drift: Drift | None) -> str:
    """The newest figures of an evaluation beside its loss, and its step; empty before the first."""
    told = []
    if score and (kinds := kind_losses(score)):
        told.append("loss of " + ", ".join(f"{kind} {nats(loss)}" for kind, loss in kinds))
    if written:
        told.append(f"{written.stopped:.0%} stop by themselves")
    if drift:
        told.append(f"drift {drift.kl:.2f}")
    step = max(each.step for each in (score, written, drift) if each) if told else 0
    return f"step {step}: {'  ·  '.join(told)}" if told else ""


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


_LABEL_CELLS: Final = 38
_NUMBER_CELLS: Final = 9


def read_results(run: RunFolder) -> list[str]:
    """The table of a run's folder."""
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
    for dataset, told in scores.items():
        if told[0].step < told[-1].step:
            lines += _set_lines(dataset, told, answers.get(dataset, ()))
    if drifts and drifts[0].step < drifts[-1].step:
        values = (f"{each.kl:.2f}" for each in (drifts[0], drifts[-1]))
        lines.append(_row("drift on general questions (nats)", *values))
    return [_row("", "before", "after"), *lines] if lines else []


def _set_lines(dataset: str, scores: Sequence[Score], answers: Sequence[Answers]) -> list[str]:
    first, last = scores[0], scores[-1]
    lines = [_row(f"{dataset}: loss", nats(first.loss), nats(last.loss))]
    kinds = [kind for kind in KINDS if kind in last.loss_by_kind]
    for kind in kinds if len(kinds) > 1 else ():
        values = (each.loss_by_kind.get(kind) for each in (first, last))
        lines.append(_row(f"  loss of {KINDS[kind]}", *(_number(value) for value in values)))
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


def _number(value: float | None) -> str:
    return "-" if value is None else nats(value)


def _row(label: str, before: str, after: str) -> str:
    shown = visible(label, one_line=True)
    return f"{shown:<{_LABEL_CELLS}}{before:>{_NUMBER_CELLS}}{after:>{_NUMBER_CELLS}}"

"""What a run changed, as a short table: the figures of its first evaluation beside the last."""

from collections.abc import Iterable, Sequence
from typing import Final

from engine.events import Answers, Drift, Event, Score
from engine.report.events import KINDS
from engine.runs import Follower, RunFolder
from engine.units import nats
from engine.visible import visible

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

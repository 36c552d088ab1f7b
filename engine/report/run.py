"""A run in words: where it stands, how far it is, what its last evaluation said."""

from typing import Final

from engine.events import Answers, Drift, Score
from engine.report.events import kind_losses
from engine.report.line import Line
from engine.runs import RunFolder, Status, Summary, summarize
from engine.units import nats
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

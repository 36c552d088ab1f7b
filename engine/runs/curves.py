"""All that the events of a run say, for the figures of one that is done: what a resume repeated
counts once. A run that is watched is a `History`, which takes no more room the longer it gets."""

import math
from dataclasses import dataclass, field

from engine.events import Eval, Sample, Score, Started, Step
from engine.runs.folder import RunFolder
from engine.runs.summary import Follower


@dataclass(slots=True)
class Curves:
    """Steps and evaluations in their order, answers and scores before and after."""

    started: Started | None = None
    """The newest."""
    steps: list[Step] = field(default_factory=list)
    evals: list[Eval] = field(default_factory=list)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    """By dataset: `before` the first step and, the newest, `after`."""
    answers: dict[str, dict[str, str]] = field(default_factory=dict)
    """By prompt: `before` and `after`."""

    @property
    def learned_tokens(self) -> int:
        """Over all steps."""
        return sum(step.learned_tokens for step in self.steps)

    @property
    def best(self) -> Eval | None:
        """The evaluation with the lowest loss."""
        real = [each for each in self.evals if math.isfinite(each.loss)]
        return min(real, key=lambda each: each.loss, default=None)


def read_curves(run: RunFolder) -> Curves:
    """Read all events of a run. Raises OSError where they cannot be read."""
    follower, curves = Follower(run.events), Curves()
    while events := follower.read():
        for event in (recorded.event for recorded in events):
            match event:
                case Started():
                    curves.started = event
                case Step():
                    _forget(curves.steps, event.step)
                    curves.steps.append(event)
                case Eval():
                    _forget(curves.evals, event.step)
                    curves.evals.append(event)
                case Score():
                    when = "after" if event.step else "before"
                    curves.scores.setdefault(event.dataset, {})[when] = event
                case Sample() if event.when != "during":
                    curves.answers.setdefault(event.prompt, {})[event.when] = event.text
    return curves


def _forget(events: list[Step] | list[Eval], step: int) -> None:
    while events and events[-1].step >= step:
        events.pop()

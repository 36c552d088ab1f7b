"""How good the model is on rows that it does not train on, in numbers a person can check.

Beside the loss, whole and by kind of token, it counts exact answers: a row is exact when every
learned token is the most likely one, which is the same as greedy decoding giving the reference
answer back word for word. Only learned tokens count anywhere: thinking that the config does not
train is in no figure. What the model writes by itself is in `measure`, what it forgets in `drift`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine import events
from engine.chat.render import IGNORED_LABEL, Kind, LabelRule, learned
from engine.config import RunConfig
from engine.data.prepare import label_rule
from engine.errors import UserError
from engine.train.batches import Micro, Rows, StepBatch, evaluation_micros
from engine.train.forward import Model, head_module, head_of, hidden_states
from engine.train.loss import score_tokens
from engine.train.model import Base
from engine.train.offload import head_at_hand

RISES = 2
"""Rises of the held-out loss in a row that are told."""


@dataclass(frozen=True, slots=True)
class Score:
    """One dataset's figures."""

    loss: float
    """Mean over the learned tokens of all rows, in nats."""
    learned_tokens: int
    rows: int
    exact: float
    """Share of rows whose learned tokens are all predicted, 0 to 1."""
    loss_by_kind: Mapping[str, float] = field(default_factory=dict)
    """The loss of the learned tokens of each kind by its word, where there are any."""
    tokens_by_kind: Mapping[str, int] = field(default_factory=dict)

    def told(self, step: int, dataset: str) -> events.Score:
        """The event that tells it."""
        return events.Score(
            step,
            dataset,
            self.loss,
            self.exact,
            self.rows,
            loss_by_kind=self.loss_by_kind,
            tokens_by_kind=self.tokens_by_kind,
        )


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """No gradients and no dropout inside, and the head at hand; back to training afterwards."""
    model.eval()
    try:
        with torch.no_grad(), head_at_hand(head_module(model)):
            yield
    finally:
        model.train()


def score(model: Model, base: Base, rows: Rows, config: RunConfig) -> Score:
    """Loss and exact answers of `model` over every row of `rows`."""
    sums, counts = np.zeros(len(Kind)), np.zeros(len(Kind), np.int64)
    exact, rule = 0, label_rule(config)
    with evaluating(model):
        for micro in evaluation_micros(rows, config):
            tensors = micro.to(base.device)
            losses, right = score_tokens(
                hidden_states(model, tensors), head_of(model), tensors["labels"]
            )
            kinds = _learned_kinds(micro, rows, rule)
            sums += np.bincount(kinds, losses.double().cpu().numpy(), len(Kind))
            counts += np.bincount(kinds, minlength=len(Kind))
            exact += _exact_rows(tensors, right)
    total, tokens = float(sums.sum()), int(counts.sum())
    seen = [kind for kind in Kind if counts[kind]]
    return Score(
        total / max(1, tokens),
        tokens,
        len(rows),
        exact / max(1, len(rows)),
        {kind.word: float(sums[kind] / counts[kind]) for kind in seen},
        {kind.word: int(counts[kind]) for kind in seen},
    )


def _learned_kinds(micro: Micro, rows: Rows, rule: LabelRule) -> NDArray[np.uint8]:
    """The kind of each learned token of a micro-batch, in the loss's order."""
    # A row's first token is never learned: nothing precedes it.
    kinds = np.concatenate([rows.kinds(row)[1:] for row in micro.rows])
    return kinds[learned(kinds, rule)]


def row_losses(model: Model, base: Base, batch: StepBatch) -> list[tuple[int, float]]:
    """Each row of an optimizer step that learns something, with its mean loss in nats."""
    found: list[tuple[int, float]] = []
    with evaluating(model):
        for micro in batch.micros:
            tensors = micro.to(base.device)
            states = hidden_states(model, tensors)
            losses, _ = score_tokens(states, head_of(model), tensors["labels"])
            row_of_token = _row_of_learned(tensors)
            totals = torch.zeros(len(micro.rows), device=losses.device)
            counts = totals.clone().scatter_add_(0, row_of_token, torch.ones_like(losses))
            means = totals.scatter_add_(0, row_of_token, losses) / counts
            told = zip(micro.rows, means.tolist(), counts.tolist(), strict=True)
            found += [(row, loss) for row, loss, count in told if count]
    return found


def _exact_rows(tensors: dict[str, Tensor], right: Tensor) -> int:
    """Rows of one micro-batch of which every learned token is right."""
    rows = int((tensors["position_ids"] == 0).sum())
    wrong = torch.zeros(rows, dtype=torch.int64, device=right.device)
    wrong.scatter_add_(0, _row_of_learned(tensors), (~right).long())
    return int((wrong == 0).sum())


def _row_of_learned(tensors: dict[str, Tensor]) -> Tensor:
    """For each learned token of a micro-batch, in the loss's order, its row's place in it."""
    first = (tensors["position_ids"] == 0).flatten()
    row_of_token = first.cumsum(0).view_as(tensors["labels"])[:, 1:] - 1
    return row_of_token[tensors["labels"][:, 1:] != IGNORED_LABEL]


def score_all(
    model: Model, base: Base, datasets: Mapping[str, Rows], config: RunConfig
) -> dict[str, Score]:
    """The score of each dataset by its name; UserError when one teaches nothing to score."""
    scores = {}
    for name, rows in datasets.items():
        scores[name] = score(model, base, rows, config)
        if scores[name].learned_tokens == 0:
            raise UserError(
                f"The evaluation set {name} has no answer to score.",
                "None of its tokens is one that this config learns.",
                "Give it rows with assistant answers, or remove it from `test_datasets`.",
            )
    return scores


def mean_loss(scores: Mapping[str, Score]) -> float:
    """One loss over several datasets, every learned token weighing the same."""
    tokens = sum(s.learned_tokens for s in scores.values())
    return sum(s.loss * s.learned_tokens for s in scores.values()) / tokens


class RiseWatch:
    """Tells when the held-out loss rises while the training loss falls: learning by heart."""

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._training = math.inf
        self._risen: list[float] = []
        """Held-out losses of which each is above the one before."""

    def add_step(self, loss: float) -> None:
        """Take in a training step's loss."""
        self._steps.append(loss)

    def add_evaluation(self, loss: float, best_step: int | None) -> str | None:
        """Take in a held-out loss; a sentence at the second rise in a row, since one is noise.

        `best_step` is the step of the save with the lowest held-out loss so far.
        """
        training = mean(self._steps) if self._steps else math.inf
        learns = training < self._training
        self._steps, self._training = [], training
        rises = bool(self._risen) and learns and loss > self._risen[-1]
        self._risen = [*self._risen, loss] if rises else [loss]
        if len(self._risen) != 1 + RISES:
            return None
        path = " -> ".join(f"{each:.3f}" for each in self._risen)
        kept = f"the save of step {best_step} is the best" if best_step else "no save is better"
        return (
            f"the held-out loss has risen twice in a row ({path}) while the training loss still "
            f"falls: the model learns its rows by heart, and {kept}"
        )

"""How good the model is on rows that it does not train on, in numbers a person can check.

Beside the loss it counts exact answers: a row is exact when every learned token is the most likely
one, which is the same as greedy decoding giving the reference answer back word for word.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.chat.render import IGNORED_LABEL
from engine.config import RunConfig
from engine.errors import UserError
from engine.train.batches import Rows, evaluation_micros
from engine.train.forward import Model, head_of, hidden_states
from engine.train.loss import score_tokens
from engine.train.model import Base


@dataclass(frozen=True, slots=True)
class Score:
    """One dataset's figures."""

    loss: float
    """Mean over the learned tokens of all rows, in nats."""
    learned_tokens: int
    rows: int
    exact: float
    """Share of rows whose learned tokens are all predicted, 0 to 1."""


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """No gradients and no dropout inside; back to training afterwards."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def score(model: Model, base: Base, rows: Rows, config: RunConfig) -> Score:
    """Loss and exact answers of `model` over every row of `rows`."""
    total, learned, exact = 0.0, 0, 0
    with evaluating(model):
        for micro in evaluation_micros(rows, config):
            tensors = micro.to(base.device)
            losses, right = score_tokens(
                hidden_states(model, tensors), head_of(model), tensors["labels"]
            )
            total += float(losses.double().sum())
            learned += micro.learned_tokens
            exact += _exact_rows(tensors, right)
    return Score(total / max(1, learned), learned, len(rows), exact / max(1, len(rows)))


def _exact_rows(tensors: dict[str, Tensor], right: Tensor) -> int:
    """Rows of one micro-batch of which every learned token is right."""
    first = (tensors["position_ids"] == 0).flatten()
    row_of_token = first.cumsum(0).view_as(tensors["labels"])[:, 1:] - 1
    wrong = torch.zeros(int(first.sum()), dtype=torch.int64, device=right.device)
    learned = tensors["labels"][:, 1:] != IGNORED_LABEL
    wrong.scatter_add_(0, row_of_token[learned], (~right).long())
    return int((wrong == 0).sum())


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

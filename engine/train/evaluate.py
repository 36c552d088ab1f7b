"""How good the model is on rows that it does not train on, in numbers a person can check.

Beside the loss, whole and by kind of token, it counts exact answers: a row is exact when every
learned token is the most likely one, which is the same as greedy decoding giving the reference
answer back word for word. Only learned tokens count anywhere: thinking that the config does not
train is in no figure. What the model writes by itself is in `text_metrics`, what it forgets in
`drift`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.chat.render import IGNORED_LABEL, Kind, LabelRule, learned
from engine.config import RunConfig
from engine.data.prepare import label_rule
from engine.errors import UserError
from engine.events import Score
from engine.train.batches import Micro, Rows, StepBatch, evaluation_micros
from engine.train.forward import Model, head_module, head_of, hidden_states
from engine.train.loss import score_tokens
from engine.train.model import Base
from engine.train.offload import head_at_hand


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """No gradients and no dropout inside, and the head at hand; back to training afterwards."""
    model.eval()
    try:
        with torch.no_grad(), head_at_hand(head_module(model)):
            yield
    finally:
        model.train()


def score(
    model: Model, base: Base, rows: Rows, config: RunConfig, step: int = 0, dataset: str = ""
) -> Score:
    """Loss and exact answers of `model`, after `step` steps, over every row of a dataset."""
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
    seen = [kind for kind in Kind if counts[kind]]
    return Score(
        step,
        dataset,
        loss=float(sums.sum()) / max(1, int(counts.sum())),
        exact=exact / max(1, len(rows)),
        rows=len(rows),
        loss_by_kind={kind.word: float(sums[kind] / counts[kind]) for kind in seen},
        tokens_by_kind={kind.word: int(counts[kind]) for kind in seen},
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
            figures = zip(micro.rows, means.tolist(), counts.tolist(), strict=True)
            found += [(row, loss) for row, loss, count in figures if count]
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


def learned_tokens(score: Score) -> int:
    """Tokens that a score is the mean over."""
    return sum(score.tokens_by_kind.values())


def score_all(
    model: Model, base: Base, datasets: Mapping[str, Rows], config: RunConfig, step: int = 0
) -> list[Score]:
    """The score of each dataset by its name; UserError when one teaches nothing to score."""
    scores = []
    for name, rows in datasets.items():
        scores.append(score(model, base, rows, config, step, name))
        if not learned_tokens(scores[-1]):
            raise UserError(
                f"The evaluation set {name} has no answer to score.",
                "None of its tokens is one that this config learns.",
                "Give it rows with assistant answers, or remove it from `test_datasets`.",
            )
    return scores


def mean_loss(scores: Sequence[Score]) -> float:
    """One loss over several datasets, every learned token weighing the same."""
    return sum(s.loss * learned_tokens(s) for s in scores) / sum(map(learned_tokens, scores))

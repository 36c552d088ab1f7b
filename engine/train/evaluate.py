"""How good the model is, how far it has moved from its base, and what a run's losses warn of.

Beside the held-out loss, whole and by kind of token, exact answers are counted: a row is exact when
every learned token is the most likely one, which is the same as greedy decoding giving the answer
back word for word. Only learned tokens count: thinking that the config does not train is in no
figure. What the model writes by itself is in `text_metrics`.

Drift is the Kullback-Leibler divergence of base from tuned model over fixed answers to general
questions, which need no generation and are the same for every run. Of the base only the `TOP` most
likely tokens of each place and the mass of the rest are kept, in the run's folder: a full fine-tune
has no second model to ask, and a resumed run nothing to repeat.
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from engine.chat.conversation import RowFormat
from engine.chat.render import IGNORED_LABEL, Kind, LabelRule, labels, learned, render
from engine.chat.row import read_row
from engine.chat.tokenizer import ChatTokenizer
from engine.config import DatasetConfig, RunConfig
from engine.data.prepare import label_rule
from engine.errors import UserError
from engine.events import Score
from engine.plan.trainer import SMALLEST_CHUNK_BYTES, chunk_rows
from engine.train.batches import PAD, Rows, StepBatch, evaluation_micros
from engine.train.forward import Model, head_module, hidden_states, put_head_away, use_head
from engine.train.loss import product, score_tokens, shift
from engine.train.model import Base
from engine.train.offload import head_at_hand
from engine.train.ranks import LONE, Ranks

T = TypeVar("T")


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """No gradients and no dropout inside, and the head at hand; back to training afterwards."""
    model.eval()
    try:
        with torch.no_grad(), head_at_hand(head_module(model)):
            yield
    finally:
        model.train()
        put_head_away(model)


def score(
    model: Model,
    base: Base,
    rows: Rows,
    config: RunConfig,
    step: int = 0,
    dataset: str = "",
    ranks: Ranks = LONE,
) -> Score:
    """Loss and exact answers of `model`, after `step` steps, over every row of a dataset.

    Each rank computes its part of the rows, and all get the whole result.
    """
    sums, counts = np.zeros(len(Kind)), np.zeros(len(Kind), np.int64)
    exact, rule = 0, label_rule(config)
    with evaluating(model):
        for micro in evaluation_micros(rows, config, ranks):
            tensors = micro.to(base.device)
            losses, right = score_batch(model, tensors, micro.tower_calls)
            if not micro.rows:
                continue
            # In the loss's order; a row's first token is never learned: nothing precedes it.
            kinds = np.concatenate([rows.kinds(row)[1:] for row in micro.rows])
            kinds = kinds[learned(kinds, rule)]
            sums += np.bincount(kinds, losses.double().cpu().numpy(), len(Kind))
            counts += np.bincount(kinds, minlength=len(Kind))
            exact += _exact_rows(tensors, right)
    # As float64 too counts are whole numbers, up to 2^53.
    together = torch.from_numpy(np.concatenate([sums, counts, [exact]]))
    sums, counts, (exact,) = np.split(ranks.sum(together).numpy(), (len(Kind), 2 * len(Kind)))
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


def row_losses(model: Model, base: Base, batch: StepBatch) -> list[tuple[int, float]]:
    """Each row of an optimizer step that learns something, with its mean loss in nats."""
    found: list[tuple[int, float]] = []
    with evaluating(model):
        for micro in batch.micros:
            tensors = micro.to(base.device)
            losses, _ = score_batch(model, tensors, micro.tower_calls)
            if not micro.rows:
                continue
            row_of_token = _row_of_learned(tensors)
            totals = torch.zeros(len(micro.rows), device=losses.device)
            counts = totals.clone().scatter_add_(0, row_of_token, torch.ones_like(losses))
            means = totals.scatter_add_(0, row_of_token, losses) / counts
            figures = zip(micro.rows, means.tolist(), counts.tolist(), strict=True)
            found += [(row, loss) for row, loss, count in figures if count]
    return found


def score_batch(
    model: Model, tensors: dict[str, Tensor], tower_calls: int = 0
) -> tuple[Tensor, Tensor]:
    """`score_tokens` of one forward pass."""
    states = hidden_states(model, tensors, tower_calls)
    return use_head(model, states, partial(score_tokens, labels=tensors["labels"]))


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
    model: Model,
    base: Base,
    datasets: Mapping[str, Rows],
    config: RunConfig,
    step: int = 0,
    ranks: Ranks = LONE,
) -> list[Score]:
    """The score of each dataset by its name; UserError when one teaches nothing to score."""
    scores = []
    for name, rows in datasets.items():
        scores.append(score(model, base, rows, config, step, name, ranks))
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


TOP = 64
"""Tokens of the base that are kept for each place. All others count as one outcome, which can only
lower the divergence (log-sum inequality): by at most the divergence among them times their mass,
which in a trained model is a few hundredths."""
FAR = 0.5
"""Nats a token from which a person is warned: a token that the base would write has lost two fifths
of its probability on average (exp(-0.5) = 0.61), a sentence of twenty nearly all of it. Quantizing
to 4 bits costs some hundredths of a nat."""
_TEXTS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Text:
    """A general question with its answer."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    """The answer's ids, `IGNORED_LABEL` before it."""


@dataclass(frozen=True, slots=True)
class Distributions:
    """What a model expects at each place of the answers: natural logarithms of probabilities."""

    ids: Tensor
    """The most likely tokens, int64 (places, top)."""
    logs: Tensor
    """float32 (places, top)."""
    rest: Tensor
    """All other tokens together, float32 (places,)."""


def general_texts(tokenizer: ChatTokenizer) -> tuple[Text, ...]:
    """The questions that ship with Windtunnel, as this model reads them."""
    row_format = RowFormat.from_config(DatasetConfig(path="."))
    rule, found = LabelRule(), []
    for row in _general_rows():
        rendered = render(read_row(row, row_format), tokenizer)
        targets = labels(rendered.input_ids, rendered.kinds, rule)
        found.append(Text(rendered.input_ids.astype(np.int64), targets))
    return tuple(found)


def general_questions() -> list[str]:
    """The same questions for a person."""
    return [row["messages"][0]["content"] for row in _general_rows()]


def _general_rows() -> list[dict[str, Any]]:
    path = files("presets") / "samples" / "general" / "questions.jsonl"
    return list(map(json.loads, path.read_text("utf-8").splitlines()))


class BaseDrift:
    """Measures one run's model against its base, which it remembers in `file`."""

    def __init__(
        self,
        model: Model,
        device: torch.device,
        texts: Sequence[Text],
        file: Path,
        ranks: Ranks = LONE,
    ) -> None:
        self._model, self._device, self._texts, self._file = model, device, texts, file
        self._ranks = ranks
        self._base: Distributions | None = None

    def measure(self, *, untouched: bool) -> tuple[float, int] | None:
        """The divergence in nats a token, and the tokens it is the mean of.

        `untouched` says that no step was made. None where the base is lost: a full fine-tune past
        its first step whose `file` is gone or is of other texts.
        """
        if self._base is None:
            self._base = self._read()
            if not min(self._ranks.gather(self._base is not None)):
                self._base = None  # all compute it, or none
        if self._base is None and (untouched or isinstance(self._model, PeftModel)):
            with without_adapter(self._model):
                self._base = expect(self._model, self._device, self._texts)
            if self._ranks.is_first:
                self._write(self._base)
        if self._base is None:
            return None
        parts = divergences(self._base, self._model, self._device, self._texts)
        return float(parts.double().mean()), len(parts)

    def _read(self) -> Distributions | None:
        try:
            with safe_open(self._file, "pt", str(self._device)) as stored:
                if (stored.metadata() or {}).get("texts") != _digest(self._texts):
                    return None
                names = ("ids", "logs", "rest")
                return Distributions(**{name: stored.get_tensor(name) for name in names})
        except (OSError, SafetensorError):
            return None

    def _write(self, base: Distributions) -> None:
        """Keep it for a later launch; where the disk refuses, this launch has it all the same."""
        partial = self._file.with_name(self._file.name + ".partial")
        tensors = {"ids": base.ids.cpu(), "logs": base.logs.cpu(), "rest": base.rest.cpu()}
        try:
            save_file(tensors, partial, {"texts": _digest(self._texts)})
            os.replace(partial, self._file)
        except (OSError, SafetensorError):
            partial.unlink(missing_ok=True)


def without_adapter(model: Model) -> AbstractContextManager[object]:
    """Inside, the model is its base; of a full fine-tune it stays what it is."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def expect(
    model: Model, device: torch.device, texts: Sequence[Text], top: int = TOP
) -> Distributions:
    """What `model` expects at each place of the answers of `texts`."""

    def likeliest(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        highest = logits.topk(min(top, logits.shape[-1]), dim=-1)
        return highest.indices, highest.values, _rest(logits, highest.indices)

    found = _of_log_probabilities(model, device, texts, likeliest)
    return Distributions(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def divergences(
    base: Distributions, model: Model, device: torch.device, texts: Sequence[Text]
) -> Tensor:
    """KL(base || model) at each place of the answers, in nats, float32 (places,)."""
    start = 0

    def diverged(logs: Tensor) -> Tensor:
        nonlocal start
        part = slice(start, start + len(logs))
        start += len(logs)
        ids, expected, rest = base.ids[part], base.logs[part], base.rest[part]
        known = (expected.exp() * (expected - logs.gather(1, ids))).sum(-1)
        others = rest.exp() * (rest - _rest(logs, ids))
        each = known + torch.where(rest.exp() > 0, others, 0.0)
        return each.clamp(min=0.0)  # below zero lies only rounding

    return torch.cat(_of_log_probabilities(model, device, texts, diverged))


def _rest(logs: Tensor, ids: Tensor) -> Tensor:
    """Logarithm of the mass of all tokens but `ids`; changes `logs`."""
    return logs.scatter_(1, ids, -torch.inf).logsumexp(-1)


def _of_log_probabilities(
    model: Model, device: torch.device, texts: Sequence[Text], take: Callable[[Tensor], T]
) -> list[T]:
    """What `take` makes of the logarithms of all probabilities, for some places at a time, float32
    (some, vocabulary)."""
    found: list[T] = []

    def use(states: Tensor, head: Tensor) -> None:
        rows = chunk_rows(SMALLEST_CHUNK_BYTES // 2, head.shape[0])  # their logarithms lie beside
        found.extend(take(product(s, head.t()).log_softmax(-1)) for s in states.split(rows))

    with evaluating(model):
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            batch = _batch(texts[start : start + _TEXTS_AT_ONCE])
            batch = {name: value.to(device) for name, value in batch.items()}
            states, _ = shift(hidden_states(model, batch), batch["labels"])
            use_head(model, states, use)
    return found


def _batch(texts: Sequence[Text]) -> dict[str, Tensor]:
    """One text a sequence, padded behind: positions count on, so that no mask is needed."""

    def padded(parts: list[NDArray[np.int64]], filler: int) -> Tensor:
        return pad_sequence([torch.from_numpy(part) for part in parts], True, filler)

    ids = padded([text.ids for text in texts], PAD)
    return {
        "input_ids": ids,
        "labels": padded([text.labels for text in texts], IGNORED_LABEL),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
    }


def _digest(texts: Sequence[Text]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.ids.tobytes() + text.labels.tobytes())
    return digest.hexdigest()[:16]


PATIENCE_STEPS = 3
"""Axolotl's, where the config names none."""
WINDOW_STEPS, LEAST_STEPS = 50, 10
"""Losses that the median is taken of, and how many there have to be."""
SPIKE_RATIO, SPIKE_NATS = 2.0, 1.0
"""A spike is both: twice the median, and a whole nat above it, which a memorised loss of 0.01 that
doubles is not."""
RISES = 2
"""Rises of the held-out loss in a row that are warned of."""


class LossAlarm:
    """The training losses of one launch, and what is odd about the newest."""

    def __init__(self, config: RunConfig, vocabulary: int) -> None:
        self._limit = config.loss_watchdog_threshold
        self._patience = config.loss_watchdog_patience or PATIENCE_STEPS
        self._guessing = math.log(vocabulary)
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._above = 0
        self._quiet_steps = 0

    def stop_reason(self, step: int, loss: float, norm: float) -> str | None:
        """Why the run has to end before `step` changes anything: a loss or a gradient norm that is
        no number, or one loss too many above `loss_watchdog_threshold`."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"Step {step} gave a loss of {loss:g} and a gradient norm of {norm:g}."
        self._above = self._above + 1 if self._limit is not None and loss > self._limit else 0
        if self._limit is None or self._above < self._patience:
            return None
        return (
            f"The loss is {loss:.2f} at step {step}, and stays above "
            f"loss_watchdog_threshold: {self._limit:g}."
        )

    def odd_start(self, loss: float) -> str | None:
        """A sentence about the untouched model's loss, where guessing would be better."""
        if loss <= self._guessing:
            return None
        return (
            f"the first loss is {loss:.2f}, worse than {self._guessing:.2f}, which a model has "
            "that takes every token for equally likely: usual for a base that was never trained; "
            "of a trained one the weights or the tokenizer are not its own"
        )

    def spike(self, loss: float) -> float | None:
        """The median of the losses before, where `loss` leaps above it; then quiet for a while."""
        usual = median(self._recent) if len(self._recent) >= LEAST_STEPS else math.inf
        self._recent.append(loss)
        self._quiet_steps -= 1
        if loss <= max(SPIKE_RATIO * usual, usual + SPIKE_NATS) or self._quiet_steps > 0:
            return None
        self._quiet_steps = LEAST_STEPS
        return usual


class OverfittingAlarm:
    """Whether the held-out loss rises while the training loss falls: learning by heart."""

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


def unreached(trainable: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """A sentence about what got no gradient from the first step.

    Raises UserError where nothing got one.
    """
    trainable = list(trainable)
    idle = [name for name, parameter in trainable if parameter.grad is None]
    if len(idle) == len(trainable):
        raise UserError(
            "Nothing would be trained.",
            f"No row of the first step reaches what is trained, such as {idle[0]}.",
            "Rows with images reach the vision tower; change the rows, or what is trained.",
        )
    if not idle:
        return None
    return (
        f"{len(idle)} of {len(trainable)} trained tensors were not reached by the first step, such "
        f"as {idle[0]}: without rows that reach them they stay as they are"
    )

"""How far a model has moved from its base where nobody trains it: one number, in nats a token.

The Kullback-Leibler divergence of base from tuned model over fixed answers to general questions.
The answers are written down and not the base's own: so the number needs no generation, is the same
on every machine, and two runs on one base compare. Of the base only the `TOP` most likely tokens of
each place and the mass of the rest are kept, in the run's folder: a full fine-tune has no second
model to ask, and a resumed run nothing to repeat.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.chat.messages import RowFormat, read_row
from engine.chat.render import IGNORED_LABEL, LabelRule, labels, render
from engine.chat.tokenizer import ChatTokenizer
from engine.config import DatasetConfig
from engine.plan.trainer import SMALLEST_CHUNK_BYTES, chunk_rows
from engine.train.batches import PAD
from engine.train.evaluate import evaluating
from engine.train.forward import Model, head_of, hidden_states
from engine.train.loss import product, shift

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
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class BaseDrift:
    """TextMetrics one run's model against its base, which it remembers in `file`."""

    def __init__(
        self, model: Model, device: torch.device, texts: Sequence[Text], file: Path
    ) -> None:
        self._model, self._device, self._texts, self._file = model, device, texts, file
        self._base: Distributions | None = None

    def measure(self, *, untouched: bool) -> tuple[float, int] | None:
        """The divergence in nats a token, and the tokens it is the mean of.

        `untouched` says that no step was made. None where the base is lost: a full fine-tune past
        its first step whose `file` is gone or is of other texts.
        """
        if self._base is None:
            self._base = self._read()
        if self._base is None and (untouched or isinstance(self._model, PeftModel)):
            with without_adapter(self._model):
                self._base = expect(self._model, self._device, self._texts)
            self._write(self._base)
        if self._base is None:
            return None
        parts = divergences(self._base, self._model, self._device, self._texts)
        return float(parts.double().mean()), len(parts)

    def _read(self) -> Distributions | None:
        try:
            with safe_open(self._file, "pt") as stored:
                if (stored.metadata() or {}).get("texts") != _digest(self._texts):
                    return None
                found = {name: stored.get_tensor(name) for name in ("ids", "logs", "rest")}
        except (OSError, SafetensorError):
            return None
        return Distributions(**{name: found[name].to(self._device) for name in found})

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
    ids, logs, rest = [], [], []
    for logits in _log_probabilities(model, device, texts):
        highest = logits.topk(min(top, logits.shape[-1]), dim=-1)
        ids.append(highest.indices)
        logs.append(highest.values)
        rest.append(_rest(logits, highest.indices))
    return Distributions(torch.cat(ids), torch.cat(logs), torch.cat(rest))


def divergences(
    base: Distributions, model: Model, device: torch.device, texts: Sequence[Text]
) -> Tensor:
    """KL(base || model) at each place of the answers, in nats, float32 (places,)."""
    found, start = [], 0
    for logs in _log_probabilities(model, device, texts):
        part = slice(start, start + len(logs))
        start += len(logs)
        ids, expected, rest = base.ids[part], base.logs[part], base.rest[part]
        known = (expected.exp() * (expected - logs.gather(1, ids))).sum(-1)
        others = rest.exp() * (rest - _rest(logs, ids))
        each = known + torch.where(rest.exp() > 0, others, 0.0)
        found.append(each.clamp(min=0.0))  # below zero lies only rounding
    return torch.cat(found)


def _rest(logs: Tensor, ids: Tensor) -> Tensor:
    """Logarithm of the mass of all tokens but `ids`; changes `logs`."""
    return logs.scatter_(1, ids, -torch.inf).logsumexp(-1)


def _log_probabilities(
    model: Model, device: torch.device, texts: Sequence[Text]
) -> Iterator[Tensor]:
    """Logarithms of all probabilities for some places at a time, float32 (some, vocabulary)."""
    head = head_of(model)
    rows = chunk_rows(SMALLEST_CHUNK_BYTES // 2, head.shape[0])  # their logarithms lie beside
    with evaluating(model):
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            batch = _batch(texts[start : start + _TEXTS_AT_ONCE])
            batch = {name: value.to(device) for name, value in batch.items()}
            states, _ = shift(hidden_states(model, batch), batch["labels"])
            for part in states.split(rows):
                yield product(part, head.t()).log_softmax(-1)


def _batch(texts: Sequence[Text]) -> dict[str, Tensor]:
    """One text a sequence, padded behind: positions count on, so that no mask is needed."""
    length = max(len(text.ids) for text in texts)

    def padded(values: NDArray[np.int64], filler: int) -> NDArray[np.int64]:
        return np.pad(values, (0, length - len(values)), constant_values=filler)

    ids = np.stack([padded(text.ids, PAD) for text in texts])
    targets = np.stack([padded(text.labels, IGNORED_LABEL) for text in texts])
    positions = np.tile(np.arange(length), (len(texts), 1))
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(targets),
        "position_ids": torch.from_numpy(positions),
    }


def _digest(texts: Sequence[Text]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.ids.tobytes() + text.labels.tobytes())
    return digest.hexdigest()[:16]

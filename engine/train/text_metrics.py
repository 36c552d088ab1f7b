"""What the model writes by itself on a few held-out rows, in numbers.

A model can have a low loss and never stop. Everything here is greedy, so that the numbers repeat,
and bounded by the config: a few rows, a few tokens, a quarter of them at evaluations inside a run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

from engine.chat.render import IGNORED_LABEL, Kind, LabelRule, learned
from engine.chat.tokenizer import ChatTokenizer
from engine.config import RunConfig
from engine.data.prepare import label_rule
from engine.data.prepared import shuffle_order
from engine.events import Answers, Drift, Event, Note
from engine.train.batches import Rows, collate
from engine.train.evaluate import FAR, BaseDrift, evaluating, general_texts, score_batch
from engine.train.forward import Model
from engine.train.generate import generate
from engine.train.ranks import LONE, Ranks

INSIDE_SHARE = 4
"""At evaluations inside a run, one of so many answers is generated."""
DRIFT_FILE = "drift.safetensors"


@dataclass(frozen=True, slots=True)
class Reference:
    """One answer of a held-out row, which the model is to give by itself."""

    row: int
    begins: int
    """Its first token in the row."""
    ends: int
    """Behind its </s>."""
    calls: bool

    @property
    def tokens(self) -> int:
        return self.ends - self.begins


class TextMetrics:
    """What one run measures at its evaluations beside the loss."""

    def __init__(
        self,
        model: Model,
        device: torch.device,
        held_out: Mapping[str, Rows],
        config: RunConfig,
        tokenizer: ChatTokenizer,
        folder: Path,
        ranks: Ranks = LONE,
    ) -> None:
        self._model, self._device, self._tokenizer = model, device, tokenizer
        self._ranks = ranks
        self._held_out, self._config = held_out, config
        each = -(-config.eval_table_size // max(1, len(held_out)))
        self._references = {
            name: choose_references(rows, config, each) for name, rows in held_out.items()
        }
        self._base_drift = (
            BaseDrift(model, device, general_texts(tokenizer), folder / DRIFT_FILE, ranks)
            if config.eval_drift
            else None
        )
        self._warned = False

    def take(self, step: int, *, inside: bool) -> Iterator[Event]:
        """The events of an evaluation at `step`; `inside` the run it generates fewer answers."""
        for name, references in self._references.items():
            if references:
                some = references[: -(-len(references) // INSIDE_SHARE)] if inside else references
                yield self._answer(step, name, some)
            elif self._config.eval_table_size and step == 0:
                limit = self._config.eval_max_new_tokens
                text = f"{name}: no answer is short enough for eval_max_new_tokens: {limit}"
                yield Note("info", f"{text}, so none is generated")
        if self._base_drift:
            yield from self._drift(step, self._base_drift)

    def _answer(self, step: int, name: str, references: Sequence[Reference]) -> Answers:
        rows, eos = self._held_out[name], self._tokenizer.specials.eos
        given = [rows.ids(r.row)[r.begins : r.ends].tolist() for r in references]
        made = [self._write(rows, reference) for reference in references]
        called = [
            calls_agree(answer, target, self._tokenizer)
            for reference, answer, target in zip(references, made, given, strict=True)
            if reference.calls
        ]
        pairs = list(zip(made, given, strict=True))
        return Answers(
            step,
            name,
            rows=len(references),
            stopped=mean(answer[-1] == eos for answer in made),
            length_ratio=median(len(answer) / len(target) for answer, target in pairs),
            exact=mean(answer == target for answer, target in pairs),
            calls=len(called),
            calls_valid=mean(called) if called else None,
        )

    def _write(self, rows: Rows, reference: Reference) -> list[int]:
        """The model's own answer, at most `eval_max_new_tokens`.

        It is the reference up to the first token that the model would choose otherwise, which one
        forward pass shows: an exact answer is not generated at all.
        """
        cut = rows.beginning(reference.row, reference.ends)
        tensors = collate(cut, [[0]], LabelRule()).to(self._device)
        ids = tensors["input_ids"]
        tensors["labels"] = torch.full_like(ids, IGNORED_LABEL)
        tensors["labels"][:, reference.begins :] = ids[:, reference.begins :]
        with evaluating(self._model):
            _, right = score_batch(self._model, tensors)
        agreed = int(self._ranks.from_first(right.long().cumprod(0).sum()))
        known = ids[0].tolist()
        if agreed == reference.tokens:
            return known[reference.begins :]
        begun = known[: reference.begins + agreed]
        more = generate(
            self._model,
            self._device,
            begun,
            images={k: v for k, v in tensors.items() if k in ("pixels", "image_sizes")},
            end=self._tokenizer.specials.eos,
            max_new_tokens=self._config.eval_max_new_tokens - agreed,
            ranks=self._ranks,
        )
        return [*begun[reference.begins :], *more]

    def _drift(self, step: int, drift: BaseDrift) -> Iterator[Event]:
        found = drift.measure(untouched=step == 0)
        if found is None:
            return
        kl, tokens = found
        yield Drift(step, kl, tokens)
        if kl > FAR and not self._warned:
            self._warned = True
            yield Note(
                "warning",
                f"the model now answers general questions differently: {kl:.2f} nats a token from "
                f"its base, where {FAR} is far; a lower learning_rate or fewer epochs keep more",
            )


def choose_references(rows: Rows, config: RunConfig, count: int) -> tuple[Reference, ...]:
    """`count` answers of as many rows, drawn by the seed among those that are short enough."""
    found: list[Reference] = []
    rule = label_rule(config)
    for row in shuffle_order(len(rows), config.seed, 0).tolist():
        if len(found) == count:
            break
        reference = find_reference(rows, row, rule)
        if reference and reference.tokens <= config.eval_max_new_tokens:
            found.append(reference)
    return tuple(found)


def find_reference(rows: Rows, row: int, rule: LabelRule) -> Reference | None:
    """The row's last answer that calls tools, else its last one, from its first learned token on.

    Thinking that is not learned thus counts as given. None where no learned answer is whole.
    """
    kinds = rows.kinds(row)
    answers = learned(kinds, LabelRule(thinking=rule.thinking))
    answers[0] = False
    ends = np.flatnonzero(answers & (kinds == Kind.EOS))
    breaks = np.flatnonzero(~answers | (kinds == Kind.EOS))
    found = None
    for end in ends.tolist():
        begins = int(breaks[breaks < end][-1]) + 1
        calls = bool((kinds[begins:end] == Kind.CALL).any())
        if calls or found is None or not found.calls:
            found = Reference(row, begins, end + 1, calls)
    return found


def calls_agree(made: Sequence[int], target: Sequence[int], tokenizer: ChatTokenizer) -> bool:
    """Whether an answer calls the functions that the reference calls, with readable arguments."""
    names = read_calls(made, tokenizer)
    return bool(names) and names == read_calls(target, tokenizer)


def read_calls(answer: Sequence[int], tokenizer: ChatTokenizer) -> list[str] | None:
    """The names of the functions that an answer calls, in their order.

    None where a call is not written as the model's own tokenizer writes it, or where its arguments
    are not one JSON object.
    """
    special = tokenizer.specials
    body = [token for token in answer if token != special.eos]
    if special.call not in body:
        return []
    parts = _split(body, special.call)[1:]
    try:
        if special.args is None:
            calls = [(c["name"], c["arguments"]) for c in json.loads(_text(parts[0], tokenizer))]
        else:
            calls = []
            for name, arguments in (_split(part, special.args) for part in parts):
                own = _split(name, special.call_id)[0]  # the call's id is nobody's to guess
                calls.append((_text(own, tokenizer), json.loads(_text(arguments, tokenizer))))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return [name for name, _ in calls] if all(isinstance(a, dict) for _, a in calls) else None


def _split(tokens: Sequence[int], at: int | None) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == at:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _text(tokens: list[int], tokenizer: ChatTokenizer) -> str:
    return tokenizer.tekken.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)

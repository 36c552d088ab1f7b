"""Text from a prompt, token by token: a run's own questions, and those to what it trained.

A question is a row cut where its answer begins, rendered and batched as training rows are: what a
model is asked here is what it learned to answer. This is the one place where a key-value cache
exists: a cache turns off the separation of packed rows, so it stays out of training and scoring.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from torch import Tensor

from engine.catalog import official_sampling
from engine.chat.conversation import RowFormat
from engine.chat.images import pixels
from engine.chat.render import WITHHELD, Kind, LabelRule, learned, render
from engine.chat.row import read_row
from engine.chat.tokenizer import ChatTokenizer, open_tokenizer
from engine.config import DatasetConfig, RunConfig, read_config
from engine.errors import UserError
from engine.runs import RunFolder
from engine.train.batches import Rows, join, open_pixels
from engine.train.checkpoint import load_trained, newest_result
from engine.train.evaluate import evaluating, general_questions, without_adapter
from engine.train.fetch import leave_hub, locate_base
from engine.train.forward import Model, half_precision, image_features, unwrapped
from engine.train.lora import put_on_training
from engine.train.model import Base, load_base
from engine.train.ranks import LONE, Ranks
from engine.train.seal import Say


def generate(
    model: Model,
    device: torch.device,
    prompt: Sequence[int],
    *,
    images: Mapping[str, torch.Tensor] = MappingProxyType({}),
    end: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    on_token: Callable[[int], None] = lambda token: None,
    ranks: Ranks = LONE,
) -> list[int]:
    """Token ids that follow `prompt`, up to and with `end`; greedy at temperature 0.

    `images` are those of the prompt, in the order of its image tokens, as `images.stack` makes
    them. `on_token` gets each token as soon as it is chosen.
    """
    inner: Any = unwrapped(model)
    current = torch.tensor([list(prompt)], device=device)
    cache, out = None, []
    with evaluating(model), half_precision(model):
        seen = image_features(model, {k: v.to(device) for k, v in images.items()})
        for _ in range(max_new_tokens):
            result = inner(
                input_ids=current, past_key_values=cache, use_cache=True, logits_to_keep=1, **seen
            )
            seen = {}  # from here on the cache holds them
            cache = result.past_key_values
            token = _choose(result.logits[0, -1].float(), temperature, top_p)
            token = int(ranks.from_first(torch.tensor(token)))  # all go on with the same one
            out.append(token)
            on_token(token)
            if token == end:
                break
            current = torch.tensor([[token]], device=device)
    return out


def _choose(logits: torch.Tensor, temperature: float, top_p: float) -> int:
    if temperature <= 0.0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1)])


def readable(tokens: Sequence[int], tokenizer: ChatTokenizer) -> str:
    """Generated tokens as text, control tokens by their names, the end of the answer left out."""
    kept = [token for token in tokens if token != tokenizer.specials.eos]
    tekken = tokenizer.tekken
    return tekken.decode(kept, special_token_policy=SpecialTokenPolicy.KEEP)


IMAGE_QUESTIONS = 3
"""Held-out rows with images that a run asks: enough to see a pattern, little to wait for."""
TEXT_QUESTIONS = 2
"""Held-out rows without, where the config names no question."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model sees it, and its text for a person."""

    text: str
    tokens: tuple[int, ...]
    images: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    """As `images.join` makes them."""


def ask(text: str, tokenizer: ChatTokenizer, config: RunConfig) -> Prompt:
    """A question as the model sees it: everything up to where its answer begins."""
    return replace(open_answer([{"role": "user", "content": text}], tokenizer, config), text=text)


def open_answer(
    messages: list[dict[str, Any]],
    tokenizer: ChatTokenizer,
    config: RunConfig,
    reasoning_effort: str | None = None,
) -> Prompt:
    """A conversation as training renders it, cut where the answer to its last message begins."""
    effort = {"reasoning_effort": reasoning_effort} if reasoning_effort is not None else {}
    answered = [*messages, {"role": "assistant", "content": "."}]
    row = (config.chat_template_kwargs or {}) | effort | {"messages": answered}
    rendered = render(read_row(row, RowFormat.from_config(DatasetConfig(path="."))), tokenizer)
    spec = tokenizer.image
    images = [pixels(i.content, i.rows, i.columns, spec) for i in rendered.images if spec]
    own = learned(rendered.kinds, LabelRule()) & (rendered.sources == len(messages))
    begins = int(np.flatnonzero(own)[0])
    return Prompt("", tuple(rendered.input_ids[:begins].tolist()), join(images))


def ask_by_default(
    held_out: Mapping[str, Rows], tokenizer: ChatTokenizer, config: RunConfig
) -> list[Prompt]:
    """What a run asks whose config names no question: held-out rows without images, and one of the
    general questions, which shows what is forgotten."""
    places = ((rows, row) for rows in held_out.values() for row in range(len(rows)))
    texts = (p for p in places if Kind.IMAGE not in p[0].kinds(p[1]) & ~np.uint8(WITHHELD))
    asked = [_question(*place, tokenizer) for place in itertools.islice(texts, TEXT_QUESTIONS)]
    return [*asked, ask(general_questions()[0], tokenizer, config)]


def ask_about_images(
    held_out: Mapping[str, Rows], tokenizer: ChatTokenizer, count: int = IMAGE_QUESTIONS
) -> list[Prompt]:
    """The questions of the first held-out rows that begin with images; none without such rows."""
    found: list[Prompt] = []
    for rows in held_out.values():
        if rows.prepared.image_spec is None:
            continue
        for row in range(len(rows)):
            if len(found) == count:
                return found
            prompt = _question(rows, row, tokenizer)
            found += [prompt] if prompt.images else []
    return found


def _question(rows: Rows, row: int, tokenizer: ChatTokenizer) -> Prompt:
    """One row up to where its first answer begins, with the images that come before it."""
    begins = int(np.flatnonzero(learned(rows.kinds(row), LabelRule()))[0])
    asked, decoders = rows.beginning(row, begins), open_pixels(rows)
    images = join([decoders.read(image) for image in asked.images(0)]) if decoders else {}
    ids = asked.ids(0)
    of_user = asked.kinds(0) & ~np.uint8(WITHHELD) == Kind.USER
    tekken = tokenizer.tekken
    text = tekken.decode(ids[of_user].tolist(), special_token_policy=SpecialTokenPolicy.IGNORE)
    shown = f"{text} [image of {rows.place(row)}]" if images else text
    return Prompt(shown, tuple(ids.tolist()), images)


Emit: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Prints one record as a line of JSON."""
MAX_TOKENS = 1024
"""Longest answer where neither the request nor the model's card names one."""
_UNFINISHED = "\ufffd"


@dataclass(frozen=True, slots=True)
class Request:
    """One question. None stands for the model's official setting."""

    messages: list[dict[str, Any]]
    """The conversation up to the answer, in OpenAI's form; an image chunk has a `path`."""
    base: bool = False
    """Ask the model as it was before training."""
    reasoning_effort: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    @classmethod
    def from_line(cls, line: str) -> "Request":
        """A request as a line of JSON; unknown keys are left out."""
        content = json.loads(line)
        return cls(**{k: v for k, v in content.items() if k in {f.name for f in fields(cls)}})


class Answering:
    """A run's model, loaded once, with what was trained and without it."""

    def __init__(self, run: RunFolder, say: Say = lambda text: None) -> None:
        """Find the run's result and its base. Raises as `newest_result`."""
        self.run = run
        self.config: RunConfig = read_config(run.config).config
        self.trained = newest_result(run, self.config, say)
        self._base_folder = locate_base(self.config, run.path)
        source = self.config.tokenizer_config or self._base_folder
        self.tokenizer: ChatTokenizer = open_tokenizer(source)
        leave_hub()
        self._loaded: tuple[Base, Model] | None = None
        self._holds_base = False

    def load(self, base: bool = False) -> tuple[Base, Model]:
        """The model that answers, loaded where it is not yet; an adapter can be switched off.

        The base of a full fine-tune is a model of its own: it takes the place of the tuned one.
        """
        as_base = base and self.config.adapter is None
        if self._loaded is None or as_base != self._holds_base:
            self._loaded = None  # its memory is free before the other one is read
            self._loaded = self._load(as_base)
            self._holds_base = as_base
        return self._loaded

    def _load(self, as_base: bool) -> tuple[Base, Model]:
        finished = self.config.adapter is None and self.trained == self.run.model and not as_base
        base = load_base(self.trained if finished else self._base_folder, self.config)
        if as_base or finished:
            return base, base.model
        model = put_on_training(base, self._base_folder, self.config)
        load_trained(model, self.trained)
        return base, model

    def answer(self, request: Request, emit: Emit) -> dict[str, Any]:
        """Answer one request; pieces of its text are emitted as `{"text": …}` while they come.

        Raises UserError where the conversation cannot be rendered.
        """
        prompt = self.prompt(request)
        base, model = self.load(request.base)
        sampling = official_sampling(self.config.base_model, request.reasoning_effort)
        temperature = _first(request.temperature, sampling.temperature, 0.0)
        top_p = _first(request.top_p, sampling.top_p, 1.0)
        max_tokens = int(_first(request.max_tokens, sampling.max_tokens, MAX_TOKENS))
        torch.manual_seed(int(_first(request.seed, self.config.seed, 0)))
        pieces = _Pieces(self.tokenizer, emit)
        began = time.monotonic()
        with without_adapter(model) if request.base else nullcontext():
            tokens = generate(
                model,
                base.device,
                prompt.tokens,
                images=prompt.images,
                end=self.tokenizer.specials.eos,
                max_new_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                on_token=pieces.add,
            )
        return {
            "text": readable(tokens, self.tokenizer),
            "base": request.base,
            "prompt_tokens": len(prompt.tokens),
            "tokens": len(tokens),
            "stopped": bool(tokens) and tokens[-1] == self.tokenizer.specials.eos,
            "seconds": time.monotonic() - began,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
        }

    def prompt(self, request: Request) -> Prompt:
        """The conversation as training renders it, cut where the answer begins."""
        messages = [*map(_with_image_bytes, request.messages)]
        return open_answer(messages, self.tokenizer, self.config, request.reasoning_effort)


class _Pieces:
    """Tokens to text as they come; half a letter is kept until its other half is there."""

    def __init__(self, tokenizer: ChatTokenizer, emit: Emit) -> None:
        self._tokenizer, self._emit = tokenizer, emit
        self._unfinished: list[int] = []

    def add(self, token: int) -> None:
        self._unfinished.append(token)
        text = readable(self._unfinished, self._tokenizer)
        if text and (not text.endswith(_UNFINISHED) or len(self._unfinished) > 4):
            self._emit({"text": text})
            self._unfinished.clear()


def serve(run: RunFolder, lines: Iterable[str], emit: Emit) -> None:
    """Load the run's model, then answer each line of `lines`; raises what loading raises.

    Emitted are `{"note": …}` for what was passed over, `{"ready": …}` once, then for each request
    its pieces and `{"answer": …}`, or `{"refused": …}` with the sentences for one that cannot be
    answered, and `{"end": …}`.
    """
    answering = Answering(run, lambda text: emit({"note": text}))
    base, _ = answering.load()
    model, trained = answering.config.base_model, str(answering.trained)
    report = base.report.sentence()
    emit({"ready": True, "trained": trained, "model": model, "report": report})
    for line in lines:
        try:
            emit({"answer": answering.answer(Request.from_line(line), emit)})
        except UserError as error:
            emit({"refused": {"what": error.what, "why": error.why, "fix": error.fix}})
        emit({"end": True})


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _with_image_bytes(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its images read: the person who asks named them, no dataset did."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    chunks = [
        {"type": "image", "image": Path(chunk["path"]).read_bytes()}
        if chunk.get("type") == "image" and "path" in chunk
        else chunk
        for chunk in content
    ]
    return message | {"content": chunks}

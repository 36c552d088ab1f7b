"""Questions to what a run trained, answered one after another by one loaded model.

It reads the run's own files and speaks with the command that started it in lines of JSON.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from engine.catalog import official_sampling
from engine.chat.images import pixels
from engine.chat.messages import RowFormat, read_row
from engine.chat.render import LabelRule, learned, render
from engine.chat.tokenizer import ChatTokenizer, open_tokenizer
from engine.config import DatasetConfig, RunConfig, read_config
from engine.errors import UserError
from engine.runs import RunFolder
from engine.runs.newest_result import newest_result
from engine.train.batches import join
from engine.train.checkpoint import load_trained
from engine.train.drift import without_adapter
from engine.train.fetch import leave_hub, locate_base
from engine.train.forward import Model
from engine.train.generate import generate, readable
from engine.train.lora import put_on_training
from engine.train.model import Base, load_base
from engine.train.prompts import Prompt

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

    def __init__(self, run: RunFolder) -> None:
        """Find the run's result and its base. Raises UserError where there is none."""
        self.run = run
        self.config: RunConfig = read_config(run.config).config
        self.trained = newest_result(run, self.config)
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
            self._loaded = self._load_base() if as_base else self._load_tuned()
            self._holds_base = as_base
        return self._loaded

    def _load_base(self) -> tuple[Base, Model]:
        base = load_base(self._base_folder, self.config)
        return base, base.model

    def _load_tuned(self) -> tuple[Base, Model]:
        if self.config.adapter is None and self.trained == self.run.model:
            base = load_base(self.trained, self.config)
            return base, base.model
        base = load_base(self._base_folder, self.config)
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
        messages = [*(map(_with_image_bytes, request.messages))]
        row: dict[str, Any] = {
            **(self.config.chat_template_kwargs or {}),
            "messages": [*messages, {"role": "assistant", "content": "."}],
        }
        if request.reasoning_effort is not None:
            row["reasoning_effort"] = request.reasoning_effort
        conversation = read_row(row, RowFormat.from_config(DatasetConfig(path=".")))
        rendered = render(conversation, self.tokenizer)
        images = [
            pixels(image.content, image.rows, image.columns, self.tokenizer.image)
            for image in rendered.images
            if self.tokenizer.image
        ]
        own = learned(rendered.kinds, LabelRule()) & (rendered.sources == len(messages))
        begins = int(np.flatnonzero(own)[0])
        return Prompt("", tuple(rendered.input_ids[:begins].tolist()), join(images))


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

    Emitted are `{"ready": …}` once, then for each request its pieces and `{"answer": …}`, or
    `{"refused": …}` with the sentences for one that cannot be answered, and `{"end": …}`.
    """
    answering = Answering(run)
    base, _ = answering.load()
    emit(
        {
            "ready": True,
            "trained": str(answering.trained),
            "model": answering.config.base_model,
            "report": base.report.sentence(),
        }
    )
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
    return message | {"content": [_read_image(chunk) for chunk in content]}


def _read_image(chunk: dict[str, Any]) -> dict[str, Any]:
    if chunk.get("type") != "image" or "path" not in chunk:
        return chunk
    return {"type": "image", "image": Path(chunk["path"]).read_bytes()}

"""What a run asks its model before, during and after: the config's questions, and held-out rows.

A question is a row cut where its answer begins, rendered and batched as training rows are: what a
model is asked here is what it learned to answer.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from torch import Tensor

from engine.chat.messages import RowFormat, read_row
from engine.chat.render import WITHHELD, Kind, LabelRule, learned, render
from engine.chat.tokenizer import ChatTokenizer
from engine.config import DatasetConfig, RunConfig
from engine.train.batches import Rows, join, open_pixels
from engine.train.drift import general_questions

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
    row = {
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "."}],
        **(config.chat_template_kwargs or {}),
    }
    first = config.datasets[0] if config.datasets else DatasetConfig(path=".")
    row_format = RowFormat.from_config(DatasetConfig(path=first.path))
    rendered = render(read_row(row, row_format), tokenizer)
    begins = int(np.flatnonzero(learned(rendered.kinds, LabelRule()))[0])
    return Prompt(text, tuple(rendered.input_ids[:begins].tolist()))


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
    one = slice(row, row + 1)
    asked = replace(rows, chosen=rows.chosen[one], lengths=np.array([begins], np.int64))
    pixels = open_pixels(rows)
    images = join([pixels.read(image) for image in asked.images(0)]) if pixels else {}
    ids = asked.ids(0)
    of_user = asked.kinds(0) & ~np.uint8(WITHHELD) == Kind.USER
    tekken = tokenizer.tekken
    text = tekken.decode(ids[of_user].tolist(), special_token_policy=SpecialTokenPolicy.IGNORE)
    shown = f"{text} [image of {rows.place(row)}]" if images else text
    return Prompt(shown, tuple(ids.tolist()), images)

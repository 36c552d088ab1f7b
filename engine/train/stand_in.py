"""The model that is measured: the real one or a smaller one of its make, its weights drawn.

A computer without a GPU could not build the real one in minutes: there it has two of the layers,
and, where even those are too much, all widths divided by one number. The formula is then asked for
exactly this model, so that what is compared is the formula, not the card.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.catalog import Architecture
from engine.catalog.rows import Mistral3Sizes, Mistral4Sizes, TextSizes, module_table, read_sizes
from engine.chat.render import IGNORED_LABEL, WITHHELD, Kind, learned
from engine.config import RunConfig
from engine.data.prepare import label_rule
from engine.plan import Device, Place, Statistics, estimate
from engine.plan.layers import largest_image_tokens, tower_of
from engine.plan.trainer import IMAGE_TOKEN
from engine.train.batches import (
    Micro,
    Order,
    Pixels,
    Rows,
    StepBatch,
    collate,
    join,
    packed,
)
from engine.train.weight_files import StoredTensor

LAYERS = 2
"""Enough for a kept state to lie between two layers, and for the last one to be freed first."""
PRODUCTS = 1e11
"""Tokens times weights of one forward pass. Three steps of Ministral 3 3B, Small 4 and Medium 3.5
in 4 bits, 2,048 tokens at once, took 35, 44 and 78 seconds on one core."""
NUMBERS = 10**9
"""Weights that are drawn and quantized in less than a minute."""
FACTORS = (1, 2, 4, 8, 16, 32)
BLOCK = 64
"""bitsandbytes' NF4 takes whole blocks of so many numbers on a CPU."""
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
"""As a safetensors file would call them."""


@dataclass(frozen=True, slots=True)
class Built:
    """The model that is measured."""

    architecture: Architecture
    layers: int
    of_layers: int
    factor: int = 1
    """What all widths are divided by."""
    whole: bool = True
    """Whether it is the model itself."""

    def sentence(self) -> str:
        """What was left out, and what the measurement therefore stands for."""
        widths = f" with all widths divided by {self.factor}" if self.factor > 1 else ""
        return (
            f"Built on the CPU with {self.layers} of {self.of_layers} layers{widths}: this checks "
            "the formula for that small model, and says nothing of a card's memory or speed."
        )


def as_it_is(architecture: Architecture) -> Built:
    """The model itself."""
    *_, text = read_sizes(architecture.config, architecture.name)
    layers = text.num_hidden_layers
    return Built(architecture, layers, layers)


def reduce_for_cpu(
    architecture: Architecture,
    config: RunConfig,
    device: Device,
    statistics: Statistics | None,
) -> Built:
    """The largest model of the same make that is built and trained here in about a minute.

    The model itself where it is so small. Raises UserError where the adapter's targets name only
    layers that are left out.
    """

    def affordable(model: Architecture) -> bool:
        needs = estimate(config, Place(model, device, statistics))
        products = needs.tokens_at_once * model.table.active_parameters
        quick = products <= PRODUCTS and model.table.total_parameters <= NUMBERS
        return needs.verdict != "does not fit" and quick

    built = as_it_is(architecture)
    if affordable(architecture):
        return built
    layers = min(LAYERS, built.of_layers)
    for factor in FACTORS:
        content = shrink(architecture.config, layers, factor)
        smaller = replace(architecture, config=content, table=module_table(content))
        if affordable(smaller):
            break
    return Built(smaller, layers, built.of_layers, factor, whole=False)


def shrink(config: Mapping[str, Any], layers: int, factor: int) -> dict[str, Any]:
    """The content of a config.json with fewer layers, and with widths divided by `factor`.

    Heads become fewer and keep their width; a width stays a multiple of 64; vocabulary and experts
    keep their number.
    """
    content = deepcopy(dict(config))
    _, sizes, text = read_sizes(config, "config.json")
    part = content["text_config"] if isinstance(sizes, Mistral3Sizes) else content
    for key, value in list(part.items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            part[key] = value[:layers]  # one entry a layer
    part |= {"num_hidden_layers": layers} | dict(_text_widths(text, factor))
    if isinstance(text, Mistral4Sizes):
        part["first_k_dense_replace"] = min(text.first_k_dense_replace, layers - 1)
    if isinstance(sizes, Mistral3Sizes):
        vision = sizes.vision_config
        # A tower's head is what its width leaves to each.
        heads = content["vision_config"].get("num_attention_heads", 16)
        fewer = max(1, heads // factor)
        content["vision_config"] |= {
            "num_hidden_layers": min(layers, vision.num_hidden_layers),
            "num_attention_heads": fewer,
            "hidden_size": vision.hidden_size // heads * fewer,
            "intermediate_size": _part(vision.intermediate_size, factor),
        }
        content["vision_feature_layer"] = -1
    return content


def _text_widths(text: TextSizes, factor: int) -> Iterator[tuple[str, int]]:
    yield "hidden_size", _part(text.hidden_size, factor)
    yield "intermediate_size", _part(text.intermediate_size, factor)
    heads = max(1, text.num_attention_heads // factor)
    if isinstance(text, Mistral4Sizes):
        yield "num_attention_heads", heads
        yield "num_key_value_heads", heads
        yield "moe_intermediate_size", _part(text.moe_intermediate_size, factor)
        yield "kv_lora_rank", _part(text.kv_lora_rank, factor)
        if text.q_lora_rank is not None:
            yield "q_lora_rank", _part(text.q_lora_rank, factor)
        return
    of_keys = max(1, text.num_key_value_heads // factor)
    yield "num_key_value_heads", of_keys
    yield "num_attention_heads", -(-heads // of_keys) * of_keys
    yield "head_dim", text.head_dim or text.hidden_size // text.num_attention_heads


def _part(width: int, factor: int) -> int:
    return width if factor == 1 else max(BLOCK, -(-width // factor // BLOCK) * BLOCK)


@dataclass(frozen=True, slots=True)
class DrawnTensor(StoredTensor):
    """One tensor of no file, drawn anew each time, with the same numbers.

    It is drawn, quantized and dropped before the next, by the code that loads a run.
    """

    kind: torch.dtype
    device: torch.device
    seed: int

    def read(self, index: int | slice | None = None) -> Tensor:
        """All of it, or entry `index` of its first dimension, on the device; of some entries the
        numbers are no part of the whole's.

        A matrix keeps its input's length: normal numbers with a deviation of 1 / sqrt(inputs). What
        scales a norm is one, and a bias zero.
        """
        shape = self.shape if index is None else self.shape[1:]
        if isinstance(index, slice):
            shape = (index.stop - index.start, *shape)
        if len(self.shape) == 1:
            make = torch.zeros if self.name.endswith("bias") else torch.ones
            return make(shape, dtype=self.kind, device=self.device)
        # A convolution's inputs are its channels and its window; each expert has its own.
        stack = len(self.shape) == 3
        inputs = self.shape[-1] if stack else torch.Size(self.shape[1:]).numel()
        seed = zlib.crc32(f"{self.seed} {self.name} {index}".encode())
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.empty(shape, dtype=self.kind, device=self.device)
        return drawn.normal_(0.0, inputs**-0.5, generator=generator)


def draw_weights(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, seed: int
) -> Mapping[str, StoredTensor]:
    """Every parameter of the model that has memory of its own, by its name."""
    return {
        row.name: DrawnTensor(
            Path("drawn"), row.name, row.shape, _NAMES[dtype], dtype, device, seed
        )
        for row in architecture.table.parameters
        if not row.tied
    }


MICROS = 2
"""Forward passes of a measured step, where a run has as many: from the second one on gradients lie
beside what a forward pass keeps."""
PACKED_ROWS = 4
"""Rows of a synthetic sequence."""
FIRST_PIECE = 1000
"""Ids below are control tokens in every Tekken vocabulary."""


def count_rows(rows: Rows, config: RunConfig) -> Statistics:
    """What a plan has to know of the rows."""
    lengths, of_images, rule = rows.lengths, _image_tokens(rows), label_rule(config)
    learns = [np.count_nonzero(learned(rows.kinds(row), rule)) for row in range(len(rows))]
    return Statistics(
        usable_rows=len(rows),
        total_tokens=int(lengths.sum()),
        thinking_tokens=0,
        mean_tokens=float(lengths.mean()),
        longest_tokens=int(lengths.max()),
        p99_tokens=int(np.percentile(lengths, 99)),
        image_tokens=int(of_images.sum()),
        most_image_tokens=int(of_images.max()),
        most_learned_tokens=int(max(learns)),
    )


def heaviest_step(rows: Rows, config: RunConfig) -> StepBatch:
    """One step of the rows' heaviest sequences, the packed ones filled up to `sequence_len`.

    A sequence weighs its tokens, and those of images twice: once for the tower.
    """
    weights = rows.lengths + _image_tokens(rows)
    bins = packed(rows, config) if config.sample_packing else [[row] for row in range(len(rows))]
    bins.sort(key=lambda members: -int(weights[members].sum()))
    chosen = bins[: config.micro_batch_size]
    if config.sample_packing and len(bins) > len(chosen):
        rows, chosen = _fill_up(rows, chosen, config.sequence_len)
    return _repeat(collate(rows, chosen, label_rule(config)), config)


def _fill_up(rows: Rows, bins: list[list[int]], length: int) -> tuple[Rows, list[list[int]]]:
    """The bins with the beginnings of other rows behind them, so that each holds `length` tokens.

    Only beginnings without an image: half of one cannot be read.
    """
    begins = [_first_image(rows, row) for row in range(min(len(rows), 1000))]
    filler = int(np.argmax(begins))
    chosen, lengths, filled = rows.chosen.tolist(), rows.lengths.tolist(), []
    for members in bins:
        room = length - int(rows.lengths[members].sum())
        parts = []
        while room > 1 and begins[filler] > 1:  # one token alone would teach nothing
            chosen.append(int(rows.chosen[filler]))
            lengths.append(min(room, begins[filler]))
            parts.append(len(chosen) - 1)
            room -= lengths[-1]
        filled.append([*members, *parts])
    return replace(rows, chosen=np.array(chosen), lengths=np.array(lengths)), filled


def _first_image(rows: Rows, row: int) -> int:
    """Tokens of a row that come before its first image."""
    images = np.flatnonzero(_of_images(rows, row))
    return int(images[0]) if len(images) else int(rows.lengths[row])


def _image_tokens(rows: Rows) -> NDArray[np.int64]:
    if rows.prepared.image_spec is None:
        return np.zeros(len(rows), np.int64)
    return np.array([_of_images(rows, row).sum() for row in range(len(rows))], np.int64)


def _of_images(rows: Rows, row: int) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = rows.kinds(row) & ~np.uint8(WITHHELD) == Kind.IMAGE
    return found


def synthetic_step(architecture: Architecture, config: RunConfig) -> StepBatch:
    """One step of random ids: full sequences, packed ones of several rows, every token learned.

    With `processor_type` they are as much image as fits, as a plan without rows counts them.
    """
    rng = np.random.default_rng(config.seed)
    size, length = config.micro_batch_size, config.sequence_len
    vocabulary = next(p.shape[0] for p in architecture.table.parameters if p.group == "embedding")
    ids = rng.integers(min(FIRST_PIECE, vocabulary // 2), vocabulary, (size, length))
    pixels: list[Pixels] = []
    tower = tower_of(architecture.table)
    if config.processor_type and tower:
        for sequence in ids:
            pixels += _put_images(sequence, architecture, tower.token_pixels, rng)
    labels = np.where(ids == IMAGE_TOKEN, IGNORED_LABEL, ids)
    positions = np.tile(np.arange(length), (size, 1))
    if config.sample_packing and not pixels:
        for start in range(0, length, max(2, math.ceil(length / PACKED_ROWS))):
            positions[:, start:] = np.arange(length - start)
            labels[:, start] = IGNORED_LABEL
    text = {"input_ids": ids, "labels": labels, "position_ids": positions}
    tensors = {name: torch.from_numpy(values.astype(np.int64)) for name, values in text.items()}
    learns = int((labels != IGNORED_LABEL).sum())
    return _repeat(Micro(tensors | join(pixels), (), ids.size, learns), config)


def _put_images(
    sequence: NDArray[np.int64],
    architecture: Architecture,
    token_pixels: int,
    rng: np.random.Generator,
) -> Iterator[Pixels]:
    """Write as many of the model's largest images into a sequence as there is room for."""
    largest = largest_image_tokens(architecture)
    start = 1
    # n rows of n tokens, and one more at each row's end: n of the largest n (n + 1) that has room.
    while (side := (math.isqrt(4 * min(largest, len(sequence) - start) + 1) - 1) // 2) > 0:
        block = sequence[start : start + side * (side + 1)].reshape(side, side + 1)
        block[:, :side] = IMAGE_TOKEN
        start += block.size
        yield rng.standard_normal((3, side * token_pixels, side * token_pixels), np.float32)


def _repeat(micro: Micro, config: RunConfig) -> StepBatch:
    return StepBatch((micro,) * min(MICROS, config.gradient_accumulation_steps), epoch=0.0)


def run_length(rows: Rows, config: RunConfig) -> tuple[int, int]:
    """Steps and tokens of a whole run over the rows."""
    order = Order(rows, config)
    epochs = order.total_steps / max(1, order.steps_per_epoch())
    return order.total_steps, round(int(rows.lengths.sum()) * epochs)

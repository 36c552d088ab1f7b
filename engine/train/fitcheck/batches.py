"""The batch that decides a run's memory: as full as any of its batches can be.

It is made of the person's own rows where they are here, else of random ids.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from engine.catalog import Architecture
from engine.chat.render import IGNORED_LABEL, WITHHELD, Kind, learned
from engine.config import RunConfig
from engine.data.pack import pack
from engine.data.prepare import label_rule
from engine.plan import Statistics
from engine.plan.vision import largest_image_tokens, tower_of
from engine.train.batches import IMAGE_TOKEN, Micro, Pixels, Rows, StepBatch, collate, join

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
        rows=len(rows),
        usable_rows=len(rows),
        total_tokens=int(lengths.sum()),
        learned_tokens=int(sum(learns)),
        thinking_tokens=0,
        mean_tokens=float(lengths.mean()),
        p95_tokens=int(np.percentile(lengths, 95)),
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
    if config.sample_packing:
        bins = [part.tolist() for part in pack(rows.lengths, config.sequence_len, config.seed, 0)]
    else:
        bins = [[row] for row in range(len(rows))]
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
    if rows.prepared.image_spec is None:
        return int(rows.lengths[row])
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
    # n rows of n tokens, and one more at each row's end.
    while (side := _largest_side(min(largest, len(sequence) - start))) > 0:
        block = sequence[start : start + side * (side + 1)].reshape(side, side + 1)
        block[:, :side] = IMAGE_TOKEN
        start += block.size
        yield rng.standard_normal((3, side * token_pixels, side * token_pixels), np.float32)


def _largest_side(tokens: int) -> int:
    """n of the largest n (n + 1) that is at most `tokens`."""
    return (math.isqrt(4 * tokens + 1) - 1) // 2


def _repeat(micro: Micro, config: RunConfig) -> StepBatch:
    return StepBatch((micro,) * min(MICROS, config.gradient_accumulation_steps), epoch=0.0)


def run_tokens(rows: Rows, config: RunConfig, steps: int, steps_per_epoch: int) -> int:
    """Tokens of a whole run over the rows."""
    return round(int(rows.lengths.sum()) * steps / max(1, steps_per_epoch))

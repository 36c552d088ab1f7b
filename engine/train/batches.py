"""From prepared rows and their images to the batches of every optimizer step.

The order is a pure function of rows, config and seed: step 412 can be cut without walking through
the 411 before it, which is how a run resumes in no time. Decoding images is the one part of a batch
that takes long: threads do it while the model computes (Pillow lets go of the interpreter), and
what was decoded is kept while there is room.

Several ranks learn the same micro-batches as one that accumulates as many: every rank knows the
whole step and makes only its own part of it, in as many forward passes as every other.
"""

import hashlib
import itertools
import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.chat.images import ImageSpec, pixels
from engine.chat.render import IGNORED_LABEL, WITHHELD, Kind, LabelRule, labels, learned
from engine.config import RunConfig
from engine.data.prepare import label_rule
from engine.data.prepared import Indices, Prepared, StoredImage, efficiency, pack, shuffle_order
from engine.data.statistics import LeftOut
from engine.errors import WorkError
from engine.plan.trainer import IMAGE_TOKEN, PATCHES_AT_ONCE
from engine.train.ranks import LONE, Ranks

Pixels: TypeAlias = NDArray[np.float32]
"""One image, normalised, (3, height, width)."""
CACHE_BYTES = 512 * 2**20
"""Decoded images that are kept: eighteen of the largest, 1540 pixels a side."""
DECODERS = 4
"""Threads. One decodes a photograph of 12 megapixels in about 0.15 s."""


class ImagePixels:
    """Decoded images by their number in one prepared store; the least recently used go first."""

    def __init__(self, spec: ImageSpec, cache_bytes: int = CACHE_BYTES) -> None:
        self._spec = spec
        self._cache_bytes = cache_bytes
        self._held: OrderedDict[int, tuple[Future[Pixels], int]] = OrderedDict()
        self._held_bytes = 0
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def prefetch(self, images: Iterable[StoredImage]) -> None:
        """Begin to decode `images`, as many as there is room for, and return at once."""
        ahead = 0
        for image in images:
            ahead += self._size_bytes(image)
            if ahead > self._cache_bytes:
                return
            self._start(image)

    def read(self, image: StoredImage) -> Pixels:
        """The pixels of one image; waits for its decoder."""
        return self._start(image).result()

    def _start(self, image: StoredImage) -> Future[Pixels]:
        if image.number in self._held:
            self._held.move_to_end(image.number)
            return self._held[image.number][0]
        future = self._decoders.submit(pixels, image.content, image.rows, image.columns, self._spec)
        size = self._size_bytes(image)
        self._held[image.number] = (future, size)
        self._held_bytes += size
        while self._held_bytes > self._cache_bytes and len(self._held) > 1:
            _, (_, freed) = self._held.popitem(last=False)
            self._held_bytes -= freed
        return future

    def _size_bytes(self, image: StoredImage) -> int:
        return 3 * 4 * image.rows * image.columns * self._spec.side**2


def join(images: Sequence[Pixels]) -> dict[str, Tensor]:
    """Images of several sizes as one batch, for `forward.image_features`; empty without images.

    `pixels` float32, one image behind the other, so that a small one costs no more beside a large
    one; `image_sizes` int64 (images, 2), each one's height and width.
    """
    if not images:
        return {}
    sizes = np.array([image.shape[1:] for image in images], np.int64)
    flat = np.concatenate([image.reshape(-1) for image in images])
    return {"pixels": torch.from_numpy(flat), "image_sizes": torch.from_numpy(sizes)}


def pad(
    pixels: Tensor, sizes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The images of `join` as a vision tower reads them: (images, 3, largest height, largest
    width), zero behind each image's own edges."""
    parts: Sequence[Tensor] = pixels.split([3 * height * width for height, width in sizes])
    if len(parts) == 1:
        one: Tensor = parts[0].view(1, 3, *sizes[0]).to(dtype)
        return one
    height, width = (max(size[k] for size in sizes) for k in (0, 1))
    padded = pixels.new_zeros((len(parts), 3, height, width), dtype=dtype)
    for place, part, (high, wide) in zip(padded, parts, sizes, strict=True):
        place[:, :high, :wide] = part.view(3, high, wide)
    return padded


StepRows: TypeAlias = list[list[list[int]]]
"""Rows of one optimizer step: micro-batches of sequences of rows."""
NAMED_ROWS = 3
"""Rows that the report of a bad step, or of rows that are left out, names."""
PAD = 11
"""`<pad>` of every Tekken vocabulary. It is never learned and nothing attends to it."""


def place(prepared: Prepared, row: int) -> str:
    """Where a person finds a prepared row."""
    return f"{prepared.file(int(row))} line {prepared.line(int(row))}"


@dataclass(frozen=True, slots=True)
class Rows:
    """The prepared rows that one side of the split uses, cut to the config's length."""

    prepared: Prepared
    chosen: Indices
    """Rows of `prepared`."""
    lengths: Indices
    """Tokens of each, after truncation."""
    left_out: LeftOut | None = None
    """What of the dataset is not among them, the other side of the split apart."""

    def __len__(self) -> int:
        return len(self.chosen)

    def ids(self, row: int) -> NDArray[np.uint32]:
        """Token ids of one row, uint32 (tokens,)."""
        return self.prepared.ids(int(self.chosen[row]))[: self.lengths[row]]

    def kinds(self, row: int) -> NDArray[np.uint8]:
        """Kind of each of them, uint8 (tokens,)."""
        return self.prepared.kinds(int(self.chosen[row]))[: self.lengths[row]]

    def images(self, row: int) -> tuple[StoredImage, ...]:
        """The images of one row whose tokens it has, in their order.

        A cut row lacks those behind the cut. Raises WorkError where tokens and images do not agree:
        the model would put one image's patches into another's place.
        """
        if self.prepared.image_spec is None:
            return ()
        stored = self.prepared.images(int(self.chosen[row]))
        of_images = self.kinds(row) & ~np.uint8(WITHHELD) == Kind.IMAGE
        tokens = np.array([image.rows * (image.columns + 1) for image in stored], np.int64)
        whole = int(np.searchsorted(tokens.cumsum(), of_images.sum(), side="right"))
        patches = sum(image.rows * image.columns for image in stored[:whole])
        found = int((self.ids(row)[of_images] == IMAGE_TOKEN).sum())
        if (tokens[:whole].sum(), patches) != (of_images.sum(), found):
            raise WorkError(
                f"The image tokens of {self.place(row)} do not fit its images.",
                f"It has {found} of them, and its first {whole} images have {patches} patches.",
                "Delete the prepared rows of this dataset and start again.",
            )
        return stored[:whole]

    def learned(self, row: int, rule: LabelRule) -> int:
        """Tokens of one row that are learned; nothing precedes its first."""
        return int(learned(self.kinds(row)[1:], rule).sum())

    def beginning(self, row: int, tokens: int) -> "Rows":
        """One row alone, cut behind its first `tokens`."""
        return Rows(self.prepared, self.chosen[row : row + 1], np.array([tokens], np.int64))

    def first(self, count: int) -> "Rows":
        """The first `count` rows, fewer where there are fewer."""
        return Rows(self.prepared, self.chosen[:count], self.lengths[:count])

    def place(self, row: int) -> str:
        """Where a person finds the row."""
        return place(self.prepared, self.chosen[row])

    def longest(self, rows: Iterable[int]) -> str:
        """Where the longest of `rows` is, and its tokens; empty without rows."""
        tokens, row = max(((int(self.lengths[row]), row) for row in rows), default=(0, -1))
        return f"{self.place(row)}, {tokens:,} tokens" if row >= 0 else ""

    def left_out_places(self) -> str:
        """Where the first usable rows are that are not among the chosen; empty where all are."""
        missing = np.setdiff1d(np.arange(len(self.prepared)), self.chosen)
        named = ", ".join(place(self.prepared, index) for index in missing[:NAMED_ROWS])
        return named + " and others" * (len(missing) > NAMED_ROWS)

    def fingerprint(self) -> str:
        """Hash of which rows these are and where each is cut."""
        hashes = self.prepared.hashes[self.chosen]
        return hashlib.sha256(hashes.tobytes() + self.lengths.tobytes()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Micro:
    """One forward pass: plain tensors, and the rows they came from."""

    tensors: dict[str, Tensor]
    """input_ids, labels, position_ids: int64, (sequences, length).

    Where the rows have images, also `pixels` and `image_sizes` as `images.join` makes them,
    in the order of the image tokens.
    """
    rows: tuple[int, ...]
    """Empty where this rank only takes part: see `idle`."""
    tokens: int
    learned_tokens: int
    tower_calls: int = 0
    """Times that every rank calls the vision tower in this round: as often as the one with the most
    images has to."""

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors on the device that trains."""
        return {k: v.to(device) for k, v in self.tensors.items()}


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The part of an optimizer step that is other ranks'."""

    micros: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    imbalance: float = 0.0
    """Of the whole step, the share of the ranks' time that they wait for each round's slowest."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Everything between two updates of the weights."""

    micros: tuple[Micro, ...]
    """This rank's, in as many rounds as every rank's."""
    epoch: float
    """Epochs finished when this step is done, 0.25 after a quarter of the first."""
    elsewhere: Elsewhere = Elsewhere()
    """What the other ranks compute meanwhile."""

    @property
    def tokens(self) -> int:
        """Of all ranks."""
        return sum(micro.tokens for micro in self.micros) + self.elsewhere.tokens

    @property
    def learned_tokens(self) -> int:
        """Of all ranks."""
        own = sum(micro.learned_tokens for micro in self.micros)
        return own + self.elsewhere.learned_tokens

    @property
    def passes(self) -> int:
        """Micro-batches with rows, on all ranks."""
        return sum(bool(micro.rows) for micro in self.micros) + self.elsewhere.micros

    @property
    def rows(self) -> tuple[int, ...]:
        """This rank's."""
        return tuple(itertools.chain.from_iterable(micro.rows for micro in self.micros))


def collate(
    rows: Rows,
    sequences: Sequence[Sequence[int]],
    rule: LabelRule,
    pixels: ImagePixels | None = None,
) -> Micro:
    """Lay each sequence's rows side by side and pad to the longest sequence.

    Positions start at 0 with every row, which is all that keeps packed rows apart; a row's first
    token is never a target, so no row predicts the next one. `pixels` is what decodes their images,
    here a fresh one by default.
    """
    parts = []
    for members in sequences:
        ids, targets, positions = [], [], []
        for row in members:
            tokens, kinds = rows.ids(row), rows.kinds(row)
            answers = labels(tokens, kinds, rule)
            answers[0] = IGNORED_LABEL
            ids.append(tokens.astype(np.int64))
            targets.append(answers)
            positions.append(np.arange(len(tokens), dtype=np.int64))
        parts.append([np.concatenate(column) for column in (ids, targets, positions)])
    length = max(len(ids) for ids, _, _ in parts)
    fillers = (PAD, IGNORED_LABEL, None)
    tensors = [
        torch.from_numpy(np.stack([_fill(part[k], length, filler) for part in parts]))
        for k, filler in enumerate(fillers)
    ]
    flat = tuple(itertools.chain.from_iterable(sequences))
    text = dict(zip(("input_ids", "labels", "position_ids"), tensors, strict=True))
    pixels = pixels or open_pixels(rows)
    images = join([pixels.read(image) for image in images_of(rows, sequences)]) if pixels else {}
    return Micro(
        tensors=text | images,
        rows=flat,
        tokens=sum(len(ids) for ids, _, _ in parts),
        learned_tokens=int((tensors[1] != IGNORED_LABEL).sum()),
    )


def _fill(values: NDArray[np.int64], length: int, filler: int | None) -> NDArray[np.int64]:
    short = length - len(values)
    if filler is None:
        # A lone row counts on, so that no mask is needed; behind packed rows any count will do.
        tail = np.arange(values[-1] + 1, values[-1] + 1 + short, dtype=np.int64)
    else:
        tail = np.full(short, filler, dtype=np.int64)
    return np.concatenate([values, tail])


def idle() -> Micro:
    """What a rank computes in a round that has nothing for it: padding, of which nothing is
    learned."""
    ids = torch.full((1, 2), PAD)
    texts = {"input_ids": ids, "labels": torch.full_like(ids, IGNORED_LABEL)}
    return Micro(texts | {"position_ids": torch.arange(2)[None]}, (), 0, 0)


EVEN_TOKENS = 2**16
"""Tokens of a row whose attention costs as much as its matrices: about twelve widths of a model,
which is 49,152 at a width of 4,096, and half of it where the attention is causal."""
PATCH_TOKENS = 0.05
"""Cost of a patch in the vision tower, of 0.4 billion weights, in tokens of a model of 8."""


def cost(rows: Rows, sequences: Sequence[Sequence[int]]) -> float:
    """What a micro-batch takes to compute, in tokens: all that are laid side by side, padding too,
    the attention inside each row, and the patches of images."""
    lengths = [rows.lengths[list(members)] for members in sequences]
    padded = len(lengths) * max(int(each.sum()) for each in lengths)
    attention = sum(float((each.astype(np.float64) ** 2).sum()) for each in lengths) / EVEN_TOKENS
    spec = rows.prepared.image_spec
    if spec is None:
        return padded + attention
    merged = sum(image.rows * image.columns for image in images_of(rows, sequences))
    return padded + attention + PATCH_TOKENS * merged * spec.merge**2


def deal(costs: Sequence[float], ranks: int) -> tuple[list[list[int | None]], float]:
    """Which of so many micro-batches each rank computes, round by round, None for nothing; and the
    share of the ranks' time that they wait for a round's slowest.

    The most alike share a round, since ranks wait for each other in each layer; inside one, the
    costliest goes to who had the least so far. One rank keeps the order as it is.
    """
    if ranks == 1:
        return [list(range(len(costs)))], 0.0
    dealt: list[list[int | None]] = [[] for _ in range(ranks)]
    totals, spent = [0.0] * ranks, 0.0
    falling = sorted(range(len(costs)), key=lambda number: (-costs[number], number))
    for members in group(falling, ranks):
        spent += ranks * costs[members[0]]
        free = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        for rank, number in itertools.zip_longest(free, members):
            dealt[rank].append(number)
            totals[rank] += 0.0 if number is None else costs[number]
    return dealt, 1 - sum(costs) / spent if spent else 0.0


def tower_groups(sizes: Sequence[Sequence[int]], patch: int) -> Iterator[tuple[int, int]]:
    """Which images go through the tower together: from one to before another, in order.

    Counted as they are padded, each to the largest; `sizes` are heights and widths in pixels.
    """
    start, high, wide = 0, 0, 0
    for place, (height, width) in enumerate(sizes):
        high, wide = max(high, height // patch), max(wide, width // patch)
        if start < place and (place + 1 - start) * high * wide > PATCHES_AT_ONCE:
            yield start, place
            start, high, wide = place, height // patch, width // patch
    yield start, len(sizes)


class Dealt:
    """The micro-batches of one rank, and what it has to know of the others'."""

    def __init__(self, rows: Rows, parts: StepRows, ranks: Ranks) -> None:
        self._rows, self._parts = rows, parts
        costs = [0.0] * len(parts) if ranks.is_alone else [cost(rows, part) for part in parts]
        self._all, self.imbalance = deal(costs, ranks.world_size)
        self._own = self._all[ranks.rank]

    def images(self, begin: int = 0, end: int | None = None) -> Iterator[StoredImage]:
        """The images that this rank decodes in some of the rounds."""
        own = (self._parts[number] for number in self._own[begin:end] if number is not None)
        return images_of(self._rows, itertools.chain.from_iterable(own))

    def micros(self, rule: LabelRule, pixels: ImagePixels | None) -> Iterator[Micro]:
        """This rank's, one a round; while one is used, the next one's images are decoded."""
        for turn, number in enumerate(self._own):
            micro = idle()
            if number is not None:
                micro = collate(self._rows, self._parts[number], rule, pixels)
            if pixels:
                pixels.prefetch(self.images(turn + 1, turn + 2))
            yield replace(micro, tower_calls=self._tower_calls(turn)) if pixels else micro

    def elsewhere(self, rule: LabelRule) -> Elsewhere:
        """What the other ranks have."""
        own = set(self._own)
        others = [part for number, part in enumerate(self._parts) if number not in own]
        rows = [row for part in others for members in part for row in members]
        tokens = int(self._rows.lengths[rows].sum()) if rows else 0
        taught = sum(self._rows.learned(row, rule) for row in rows)
        return Elsewhere(len(others), tokens, taught, self.imbalance)

    def _tower_calls(self, turn: int) -> int:
        spec = self._rows.prepared.image_spec
        if spec is None or len(self._all) == 1:
            return 0
        calls = 0
        for number in (each[turn] for each in self._all):
            if number is not None:
                images = images_of(self._rows, self._parts[number])
                sizes = [(i.rows * spec.side, i.columns * spec.side) for i in images]
                calls = max(calls, len(list(tower_groups(sizes, spec.patch))) if sizes else 0)
        return calls


class Order:
    """Which rows make up each optimizer step of a run, and which of them are this rank's."""

    def __init__(self, rows: Rows, config: RunConfig, ranks: Ranks = LONE) -> None:
        self._rows = rows
        self._config = config
        self._ranks = ranks
        self._rule = label_rule(config)
        self._pixels = open_pixels(rows)
        self._cached: tuple[int, list[StepRows]] = (-1, [])
        lengths: list[int] = []
        if config.max_steps is not None:
            while sum(lengths) < config.max_steps:
                lengths.append(len(self._steps_of(len(lengths))))
        else:
            whole, part = divmod(config.num_epochs, 1)
            lengths += [len(self._steps_of(epoch)) for epoch in range(int(whole))]
            if part:
                # 1.1 leaves 0.10000000000000009: ten steps of it are one step, not two.
                share = round(part * len(self._steps_of(int(whole))), 9)
                lengths.append(max(1, math.ceil(share)))
        self._ends = list(itertools.accumulate(lengths))
        self.total_steps = config.max_steps or self._ends[-1]

    def step(self, number: int) -> StepBatch:
        """This rank's batches of optimizer step `number`, from 1 to `total_steps`."""
        parts, epoch = self._place(number)
        dealt = Dealt(self._rows, parts, self._ranks)
        micros = tuple(dealt.micros(self._rule, self._pixels))
        return StepBatch(micros, epoch, dealt.elsewhere(self._rule))

    def steps(self, done: int) -> Iterator[tuple[int, StepBatch]]:
        """The steps after the first `done`, with their numbers.

        While one is computed, the images of the next are decoded.
        """
        for number in range(done + 1, self.total_steps + 1):
            batch = self.step(number)
            if self._pixels and number < self.total_steps:
                parts, _ = self._place(number + 1)
                self._pixels.prefetch(Dealt(self._rows, parts, self._ranks).images())
            yield number, batch

    def packing(self) -> tuple[int, float]:
        """Sequences of the first epoch, and the share of their places that holds a token."""
        config, lengths = self._config, self._rows.lengths
        bins = pack(lengths, config.sequence_len, config.seed, 0)
        return len(bins), efficiency(bins, lengths, config.sequence_len)

    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch."""
        return len(self._steps_of(0))

    def fingerprint(self) -> str:
        """Hash of all that decides this order: a checkpoint fits only the order it was made in."""
        parts = [
            self._rows.fingerprint(),
            self._config.seed,
            self._config.sample_packing,
            self._config.sequence_len if self._config.sample_packing else None,
            # How a step is cut, and over how many ranks, changes neither its rows nor their order.
            self._config.micro_batch_size * self._micros,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _place(self, number: int) -> tuple[StepRows, float]:
        """The rows of a step, and the epochs finished when it is done."""
        epoch = next(k for k, end in enumerate(self._ends) if number <= end)
        steps = self._steps_of(epoch)
        place = number - (self._ends[epoch - 1] if epoch else 0)
        return steps[place - 1], epoch + place / len(steps)

    def _steps_of(self, epoch: int) -> list[StepRows]:
        if self._cached[0] != epoch:
            self._cached = (epoch, self._cut(epoch))
        return self._cached[1]

    def _cut(self, epoch: int) -> list[StepRows]:
        config, rows = self._config, self._rows
        if config.sample_packing:
            sequences = packed(rows, config, epoch)
        else:
            sequences = [[row] for row in shuffle_order(len(rows), config.seed, epoch).tolist()]
        return group(group(sequences, config.micro_batch_size), self._micros)

    @property
    def _micros(self) -> int:
        """Micro-batches of a step, on all ranks."""
        return self._config.gradient_accumulation_steps * self._ranks.world_size


def packed(rows: Rows, config: RunConfig, epoch: int = 0) -> list[list[int]]:
    """The rows of each packed sequence of an epoch."""
    return [part.tolist() for part in pack(rows.lengths, config.sequence_len, config.seed, epoch)]


Item = TypeVar("Item")


def group(items: Sequence[Item], size: int) -> list[list[Item]]:
    """`items` in lists of `size`; the last one keeps what is left, so that no row is dropped."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def open_pixels(rows: Rows) -> ImagePixels | None:
    """What decodes the images of `rows`; None where no row can have one."""
    spec = rows.prepared.image_spec
    return ImagePixels(spec) if spec else None


def images_of(rows: Rows, sequences: Iterable[Sequence[int]]) -> Iterator[StoredImage]:
    """The images of packed rows in the order of their tokens."""
    return itertools.chain.from_iterable(map(rows.images, itertools.chain.from_iterable(sequences)))


def evaluation_micros(rows: Rows, config: RunConfig, ranks: Ranks = LONE) -> Iterator[Micro]:
    """Every row of `rows` once, on one rank, in a fixed order, packed where the config packs
    evaluation."""
    packs = config.eval_sample_packing
    packs = config.sample_packing if packs is None else packs
    bins = packed(rows, config) if packs else [[row] for row in range(len(rows))]
    pixels, parts = open_pixels(rows), group(bins, config.micro_batch_size)
    yield from Dealt(rows, parts, ranks).micros(label_rule(config), pixels)

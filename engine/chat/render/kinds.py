"""What each token is, and which of them are learned.

Kinds are stored, labels are derived from them when a batch is made: whether thinking is trained
is then a switch, not a reason to tokenize again. Only numpy is needed here, so that the trainer
reads prepared arrays without a tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.uint32]
Kinds: TypeAlias = NDArray[np.uint8]
Sources: TypeAlias = NDArray[np.int32]

# The high bit of a stored kind: the token's message is kept out of the loss by the row.
WITHHELD = 0x80
# What torch's cross entropy skips.
IGNORED_LABEL = -100


class Kind(IntEnum):
    """The kind of a token; its lower-case name is the contract's word."""

    BOS = 0
    SYSTEM = 1
    TOOLS = 2
    SETTINGS = 3
    USER = 4
    IMAGE = 5
    TOOL_RESULT = 6
    TEXT = 7
    THINK = 8
    CALL = 9
    EOS = 10

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class RenderedImage:
    """An image behind a run of image tokens: the bytes of its file, and its grid of tokens."""

    content: bytes | memoryview
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Tokens of the run: each row of the grid ends with one more."""
        return self.rows * (self.columns + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """One conversation as tokens: three arrays of one length, and its images in their order.

    `kinds` holds a `Kind`, with `WITHHELD` set where the row keeps the message out of the loss;
    `sources` the index of the message in the row as given, -1 for tokens of none.
    """

    input_ids: Ids
    kinds: Kinds
    sources: Sources
    images: tuple[RenderedImage, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class LabelRule:
    """Which kinds are learned: the assistant's always, its thinking and the rest by choice.

    `inputs` adds system, tools, settings, user and tool_result tokens. Nothing adds bos, which no
    token precedes, or image tokens, which a model never writes.
    """

    thinking: bool = True
    inputs: bool = False


@lru_cache
def _learned_by_kind(rule: LabelRule) -> NDArray[np.bool_]:
    table = np.zeros(256, np.bool_)  # kinds with WITHHELD stay False
    table[[Kind.TEXT, Kind.CALL, Kind.EOS]] = True
    table[Kind.THINK] = rule.thinking
    table[[Kind.SYSTEM, Kind.TOOLS, Kind.SETTINGS, Kind.USER, Kind.TOOL_RESULT]] = rule.inputs
    return table


def learned(kinds: Kinds, rule: LabelRule) -> NDArray[np.bool_]:
    """True for each token that the loss counts."""
    return _learned_by_kind(rule)[kinds]


def count_learned(kind_counts: Mapping[int, int], rule: LabelRule) -> int:
    """Learned tokens among so many of each stored kind."""
    flags = learned(np.array(list(kind_counts), dtype=np.uint8), rule)
    return int(np.dot(flags, np.array(list(kind_counts.values()), dtype=np.int64)))


def labels(input_ids: Ids, kinds: Kinds, rule: LabelRule) -> NDArray[np.int64]:
    """The ids that are learned, -100 elsewhere; not shifted."""
    return np.where(learned(kinds, rule), input_ids.astype(np.int64), IGNORED_LABEL)


def truncate(
    rendered: Rendered, limit_tokens: int, rule: LabelRule | None = None
) -> Rendered | None:
    """The first `limit_tokens` tokens at most, or None where none that is learned remains.

    A cut inside a run of image tokens moves to before it: a part of an image means nothing.
    """
    end = min(limit_tokens, len(rendered))
    kinds = rendered.kinds & ~np.uint8(WITHHELD)
    if end < len(rendered) and kinds[end] == Kind.IMAGE:
        while end and kinds[end - 1] == Kind.IMAGE:
            end -= 1
    if not learned(rendered.kinds[:end], rule or LabelRule()).any():
        return None
    if end == len(rendered):
        return rendered
    left = int(np.count_nonzero(kinds[:end] == Kind.IMAGE)) if rendered.images else 0
    whole = 0
    while whole < len(rendered.images) and left >= rendered.images[whole].tokens:
        left -= rendered.images[whole].tokens
        whole += 1
    return Rendered(
        rendered.input_ids[:end],
        rendered.kinds[:end],
        rendered.sources[:end],
        rendered.images[:whole],
    )

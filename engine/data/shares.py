"""Rows in blocks, made by this process or by several, and always in the order of the dataset.

Every process reads the same files and makes only the rows of its share; what the others make it
passes over at the cost of finding where a row ends. So no row travels, and a file of any kind is
read as one process reads it.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

from msgspec import Struct

from engine.chat.tokenizer import ChatTokenizer
from engine.config import RunConfig
from engine.data.rows import RenderedRow, Share, Web, iterate_rendered

BLOCK_ROWS: Final = 64
# Characters and bytes of images; a block of several heavy rows comes in parts.
_PART_WEIGHT: Final = 2**20

Made = TypeVar("Made")


class Task(Struct, Generic[Made], tag_field="task", frozen=True, kw_only=True):
    """What is made of the rows of a config, in blocks of so many rows after the first `skip`."""

    config: RunConfig
    folder: Path
    skip: int = 0
    block_rows: int = BLOCK_ROWS

    @abstractmethod
    def make(self, rows: Sequence[RenderedRow]) -> Made:
        """What some rows in a row become."""


@dataclass(frozen=True, slots=True)
class Part(Generic[Made]):
    """What was made of a block, or of a part of one; `read_bytes` is how far into all files."""

    made: Made
    read_bytes: int
    ends_block: bool = True


def make_parts(
    task: Task[Made],
    tokenizer: ChatTokenizer | None,
    web: Web | None = None,
    share: Share | None = None,
) -> Iterator[Part[Made]]:
    """The parts of a task, or of a share of it. Raises what `iterate_rendered` raises."""
    rows, weight = list[RenderedRow](), 0
    stream = iterate_rendered(
        task.config, task.folder, tokenizer, skip=task.skip, share=share, web=web
    )
    for row in stream:
        rows.append(row)
        weight += row.weight
        ends = (row.number - task.skip) % task.block_rows == 0
        if ends or weight > _PART_WEIGHT:
            made, rows, weight = task.make(rows), [], 0
            yield Part(made, row.read_bytes, ends)
    if rows:
        yield Part(task.make(rows), rows[-1].read_bytes)

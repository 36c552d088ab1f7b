"""Rows in blocks, made by this process or by several, and always in the order of the dataset.

Every process reads the same files and makes only the rows of its share; what the others make it
passes over, at the cost of finding where a row ends. So no row travels, and a file of any kind is
read as one process reads it. Blocks are taken in turn, and who takes them fetches the images of the
web too, one after the other: what is fetched, and what comes of it, is as with one process.
"""

import sys
from abc import abstractmethod
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Raw, Struct

from engine.catalog import TokenizerSpec
from engine.chat.conversation import RowProblem
from engine.chat.tokenizer import ChatTokenizer
from engine.child import Child, read_error
from engine.config import RunConfig
from engine.config.rules import WITHOUT_RULES
from engine.data.content import COMPRESSIONS
from engine.data.requests import plain
from engine.data.rows import RenderedRow, Share, Web, iterate_rendered
from engine.data.sources import locate
from engine.hardware.reading import count_cpus, read_memory

BLOCK_ROWS: Final = 64
PAYS_BYTES = 8 * 2**20
"""Of data for each process: starting one takes as long as making the rows of half of it."""
# Characters and bytes of images; a block of several heavy rows comes in parts.
_PART_WEIGHT: Final = 2**20
_PROCESS_BYTES: Final = 400 * 10**6
_PACKED: Final = (*COMPRESSIONS, ".parquet")
_UNPACKED_FACTOR: Final = 4
_SHARER: Final = (sys.executable, "-m", "engine.data.sharer")
_ENDED: Final = (
    "A process that reads the rows ended early.",
    "Run the command again; `dataset_num_proc: 1` in the config takes the least memory.",
)

Made = TypeVar("Made")


class Task(Struct, Generic[Made], tag_field="task", frozen=True, kw_only=True):
    """What is made of the rows of a config, in blocks of so many rows after the first `skip`."""

    made: ClassVar[Any] = None
    """The type of what is made, as it is unpacked."""
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


AnyTask = TypeVar("AnyTask")


class Order(Struct, Generic[AnyTask], frozen=True):
    """What a process is asked for. The tokenizer is made of `spec` or read from `file`."""

    task: AnyTask
    share: Share
    fetches: bool
    fingerprint: str = ""
    spec: TokenizerSpec | None = None
    file: Path | None = None


class Asked(Struct, frozen=True, tag="asked"):
    """An image of the web is wanted; the answer is {"problem": its sentences or null}."""

    url: str


class Sent(Struct, frozen=True, tag="part"):
    """A part, packed."""

    made: Raw
    read_bytes: int
    ends_block: bool


class Failed(Struct, frozen=True, tag="error"):
    """The error that ended it."""

    what: str
    why: str
    fix: str
    exit_status: int


class Ended(Struct, frozen=True, tag="end"):
    """There are no more rows."""


Said: TypeAlias = Asked | Sent | Failed | Ended
"""What a process says: frames of 8 bytes of length and a packed value."""

pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Said).decode


def load(kind: type, value: Any) -> Any:
    """The paths and configs of an order; they were validated where they came from."""
    return Path(value) if kind is Path else kind.model_validate(value, context=WITHOUT_RULES)  # type: ignore[attr-defined]


def iterate_parts(
    task: Task[Made],
    tokenizer: ChatTokenizer | None,
    web: Web | None = None,
) -> Generator[Part[Made], None, None]:
    """The parts of a task in order, by as many processes as pay.

    Close it: it may have processes. Raises what `iterate_rendered` raises, and WorkError where a
    process ends early.
    """
    count = count_processes(task.config, task.folder)
    origin = tokenizer.origin if tokenizer else None
    if count == 1 or (tokenizer and origin is None):
        yield from make_parts(task, tokenizer, web)
        return
    with ExitStack() as stack:
        sharers = [stack.enter_context(Child(_SHARER, _ENDED)) for _ in range(count)]
        for index, sharer in enumerate(sharers):
            order = Order(
                task,
                Share(index, count, task.block_rows),
                web is not None,
                tokenizer.fingerprint if tokenizer else "",
                origin if isinstance(origin, TokenizerSpec) else None,
                origin if isinstance(origin, Path) else None,
            )
            sharer.ask(plain(order))
        for sharer in cycle(sharers):
            ends_block = False
            while not ends_block:
                said = _listen(sharer, web)
                if isinstance(said, Ended):
                    if web:
                        web.finish()
                    return
                made = msgspec.msgpack.decode(said.made, type=task.made)
                yield Part(made, said.read_bytes, said.ends_block)
                ends_block = said.ends_block


def _listen(sharer: Child, web: Web | None) -> Sent | Ended:
    while True:
        size = int.from_bytes(sharer.read(8), "little")
        frame = sharer.read(size)
        if not size or len(frame) < size:
            raise sharer.death()
        match _unpack(frame):
            case Asked(url):
                assert web is not None
                sharer.ask({"problem": _fetch(web, url)})
            case Failed() as error:
                raise read_error(plain(error))
            case Sent() | Ended() as said:
                return said


def _fetch(web: Web, url: str) -> tuple[str, str, str] | None:
    try:
        web.fetch(url)
    except RowProblem as problem:
        return problem.what, problem.why, problem.fix
    return None


def count_processes(config: RunConfig, folder: Path) -> int:
    """How many processes pay for the rows of a config: no more than cores or `dataset_num_proc`,
    than there is memory for, and than the data takes; one for what is on the hub."""
    locations = [locate(dataset, folder) for dataset in config.datasets]
    if any(location.hub_id is not None for location in locations):
        return 1
    size = sum(
        file.stat().st_size * (_UNPACKED_FACTOR if file.suffix.lower() in _PACKED else 1)
        for location in locations
        for file in location.files
    )
    most = min(config.dataset_num_proc or count_cpus(), size // PAYS_BYTES)
    return max(1, min(most, read_memory()[1] // _PROCESS_BYTES)) if most > 1 else 1


def make_parts(
    task: Task[Made],
    tokenizer: ChatTokenizer | None,
    web: Web | None = None,
    share: Share | None = None,
) -> Generator[Part[Made], None, None]:
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

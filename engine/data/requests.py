"""What the process that reads and tokenizes can be asked, and what it answers.

A request names the type of its answer, so that whoever asks gets that and no dictionary.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, TypeAlias, TypeVar

import numpy as np
from msgspec import Struct, convert, to_builtins
from pydantic import BaseModel, ValidationError

from engine.chat.render import WITHHELD, Kind, LabelRule, learned
from engine.child import Child
from engine.config import DatasetConfig, RunConfig
from engine.data.statistics import BadRow, Checkup
from engine.errors import UserError

WORKER: Final = (sys.executable, "-m", "engine.data.worker")

Answer = TypeVar("Answer")


class Request(Struct, Generic[Answer], frozen=True, tag_field="request"):
    """Of the worker; `answer` is the type of what it answers at last."""

    answer: ClassVar[Any] = None


class Warm(Request[None], frozen=True, tag="warm"):
    """Load what the other requests need."""


@dataclass(frozen=True, slots=True)
class FirstRow:
    """One row: its text, and (role, text) of each message or the sentences of its problem."""

    line: int
    file: str
    raw: str
    messages: tuple[tuple[str, str], ...]
    problem: str | None


@dataclass(frozen=True, slots=True)
class Shape:
    """What the first rows have in common.

    `lists` maps each column that holds a list of objects to the keys of those objects; `images`
    and `texts` are the columns that hold those; `proposed` is what `shape` proposes to map.
    `shows_images` says whether a row that can be read has an image.
    """

    title: str
    columns: tuple[str, ...]
    lists: dict[str, tuple[str, ...]]
    images: tuple[str, ...]
    texts: tuple[str, ...]
    proposed: dict[str, str]
    shows_images: bool
    rows: tuple[FirstRow, ...]
    examples: dict[str, str] = field(default_factory=dict)
    """Column of texts -> how its first value begins."""
    reads_more: bool = False
    """Whether `proposed` reads more of the rows than the dataset's entry as it is."""


class ReadShape(Request[Shape], frozen=True, tag="shape"):
    """How the first rows of the first dataset look."""

    answer: ClassVar[Any] = Shape
    config: RunConfig
    folder: Path
    """Where the paths of the config start."""
    count: int = 20


class CheckRows(Request[Checkup], frozen=True, tag="check"):
    """All rows read and counted; the answer has the bad ones in groups alone."""

    answer: ClassVar[Any] = Checkup
    config: RunConfig
    folder: Path


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """An image of a row: its grid of tokens, and the pixels of its file."""

    rows: int
    columns: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """A row to be shown: `problem`, or lists of one length with an item for each token.

    `kinds` are stored ones, from which any rule gives the labels; `images` come in the order of
    their tokens.
    """

    number: int
    line: int
    file: str
    problem: BadRow | None
    ids: Sequence[int]
    pieces: Sequence[str]
    kinds: Sequence[int]
    sources: Sequence[int]
    notes: Sequence[str]
    images: Sequence[ImageGrid]
    first_text_id: int
    """Ids below it are control tokens."""

    def learned(self, rule: LabelRule) -> list[bool]:
        """Whether each token is learned."""
        flags: list[bool] = learned(np.array(self.kinds, dtype=np.uint8), rule).tolist()
        return flags


def kind_word(stored: int) -> str:
    """The word of a stored kind."""
    return Kind(stored & ~WITHHELD).word


@dataclass(frozen=True, slots=True)
class Preview:
    """Rows from the one that was asked for; `efforts` is empty where the tokenizer states none."""

    rows: tuple[PreviewRow, ...]
    efforts: tuple[str, ...]


class PreviewRows(Request[Preview], frozen=True, tag="preview"):
    """Rows token by token, from `row` on, fewer where they are long."""

    answer: ClassVar[Any] = Preview
    config: RunConfig
    folder: Path
    row: int = 1
    count: int = 20


@dataclass(frozen=True, slots=True)
class HubRow:
    """A row of a dataset on the hub; `line` counts from 1."""

    line: int
    row: dict[str, Any]


class ReadHub(Request[HubRow], frozen=True, tag="rows"):
    """The rows of a dataset on the hub, an answer each."""

    answer: ClassVar[Any] = HubRow
    dataset: DatasetConfig


class ResolveRevision(Request[str], frozen=True, tag="revision"):
    """The commit behind the revision of a dataset on the hub."""

    answer: ClassVar[Any] = str
    dataset: DatasetConfig


def ask_worker(request: Request[Answer]) -> Iterator[Answer]:
    """The answers of a worker of its own. Raises UserError with what it says and, where it ends
    early, WorkError."""
    ended = (
        "The process that reads the hub ended early.",
        "Run the command again, or download the set and name the local folder.",
    )
    with Child(WORKER, ended) as child:
        child.ask({"id": 1, **plain(request)})
        for record in child.listen(until="result"):
            if "item" in record:
                yield read_answer(request, record["item"])


class Progress(Struct, frozen=True):
    """How far a check or `prepare` is. `phase`: tokenizer (it is opened) and reading; or waiting
    (for another process), hashing and tokenizing.

    Bytes are of the data files; both are 0 for a hub set, whose size is not known.
    """

    phase: str
    rows: int = 0
    done_bytes: int = 0
    total_bytes: int = 0


AnyRequest: TypeAlias = Warm | ReadShape | CheckRows | PreviewRows | ReadHub | ResolveRevision


def plain(value: object) -> Any:
    """A request or an answer as JSON holds it; of a type that has no JSON, its name."""
    return to_builtins(value, str_keys=True, enc_hook=_dump)


def read_request(message: dict[str, Any]) -> AnyRequest:
    """The request of a message. Raises UserError where its config is not allowed."""
    request: AnyRequest = convert(message, AnyRequest, dec_hook=_load)
    return request


def read_answer(request: Request[Answer], value: object) -> Answer:
    """What was answered to a request, in its type."""
    answer: Answer = convert(value, request.answer, str_keys=True)
    return answer


def _dump(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Path):
        return str(value)
    return f"<{type(value).__name__}>"


def _load(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    try:
        return kind.model_validate(value)  # type: ignore[attr-defined]
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            "The config does not allow this.",
            first["msg"].removeprefix("Value error, "),
            "Choose another value, or rename the file that it names.",
        ) from error

"""What the process that reads and tokenizes can be asked, and what it answers.

A request names the type of its answer, so that whoever asks gets that and no dictionary.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, TypeAlias, TypeVar

from msgspec import Struct, convert, to_builtins
from pydantic import BaseModel, ValidationError

from engine.config import DatasetConfig, RunConfig
from engine.data.preview import PreviewRow
from engine.data.shape import Shape
from engine.data.statistics import Checkup
from engine.errors import UserError

WORKER: Final = (sys.executable, "-m", "engine.data.worker")

Answer = TypeVar("Answer")


class Request(Struct, Generic[Answer], frozen=True, tag_field="request"):
    """Of the worker; `answer` is the type of what it answers at last."""

    answer: ClassVar[Any] = None


class Warm(Request[None], frozen=True, tag="warm"):
    """Load what the other requests need."""


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


class Progress(Struct, frozen=True):
    """Of a request: "tokenizer" while one is opened, "reading" while rows are read."""

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

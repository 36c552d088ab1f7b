"""Rows of a dataset on the hub, read by a child process that may import `datasets`.

The importing process stays light: it starts `engine.data.worker`, asks for the rows, and gets them
as JSON lines. `stream_hub` is the child's half and the only place that imports `datasets`.
"""

import base64
from collections.abc import Iterator
from typing import Any

from engine.chat.images import IMAGE_LIMIT_BYTES
from engine.child import Child
from engine.config import DatasetConfig
from engine.data.readers import RawRow, without_nulls
from engine.data.requests import (
    WORKER,
    Answer,
    HubRow,
    ReadHub,
    Request,
    ResolveRevision,
    plain,
    read_answer,
)
from engine.errors import UserError, WorkError
from engine.hardware.packages import install_command


def read_hub(dataset: DatasetConfig) -> Iterator[RawRow]:
    """The rows of the split, numbered from 1, streamed at the pinned revision.

    Raises `UserError` with what the child says: not installed, not found, no network.
    """
    for found in _ask(ReadHub(dataset)):
        yield RawRow(found.line, found.row, None, 0)


def pin_revision(dataset: DatasetConfig) -> str:
    """The commit that `dataset.revision` (else the main branch) names now; asks the hub."""
    (commit,) = _ask(ResolveRevision(dataset))
    return commit


def _ask(request: Request[Answer]) -> Iterator[Answer]:
    ended = (
        "The process that reads the hub ended early.",
        "Run the command again, or download the set and name the local folder.",
    )
    with Child(WORKER, ended) as child:
        child.ask({"id": 1, **plain(request)})
        for record in child.listen(until="result"):
            if "item" in record:
                yield read_answer(request, record["item"])


def stream_hub(dataset: DatasetConfig) -> Iterator[HubRow]:
    """In the child: the rows without the nulls that Arrow fills in, their bytes as {"base64"}."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise UserError(
            f"{dataset.path} is on the hub and cannot be read here.",
            f"The package {error.name} is not installed.",
            f"Install it with {install_command('train')}, or name a local file.",
        ) from error
    try:
        rows = load_dataset(
            dataset.path,
            dataset.name,
            data_files=dataset.data_files,
            split=dataset.split or "train",
            revision=dataset.revision,
            streaming=True,
        ).decode(False)
        for line, row in enumerate(rows, start=1):
            yield HubRow(line, _with_bytes(without_nulls(dict(row))))
    except UserError:
        raise
    except Exception as error:  # the hub's client raises some thirty types
        raise _unreachable(dataset, error) from error


def _with_bytes(value: Any) -> Any:
    """The row with the bytes of images that are files of the hub and not in the table."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    if isinstance(value, list):
        return [_with_bytes(item) for item in value]
    if not isinstance(value, dict):
        return value
    path = value.get("path")
    if (
        value.keys() <= {"path", "bytes"}
        and isinstance(path, str)
        and "hf://" in path
        and not value.get("bytes")
    ):
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            value = {"path": path, "bytes": file.read(IMAGE_LIMIT_BYTES + 1)}
    return {key: _with_bytes(item) for key, item in value.items()}


def resolve_revision(dataset: DatasetConfig) -> str:
    """In the child: the commit hash behind the revision."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(dataset.path, revision=dataset.revision).sha
    except Exception as error:
        raise _unreachable(dataset, error) from error
    return found or dataset.revision or "main"


def _unreachable(dataset: DatasetConfig, error: Exception) -> WorkError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return WorkError(
        f"{dataset.path} cannot be read from the hub.",
        f"{type(error).__name__}: {first_line}",
        "Check the name, split and revision, the network, and for a private set your token; "
        "or download it and name the local folder.",
    )

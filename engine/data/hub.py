"""Rows of a dataset on the hub, read by a child process that may import `datasets`.

The importing process stays light: it starts `engine.data.worker`, asks for the rows, and gets them
as JSON lines. `stream_hub` is the child's half and the only place that imports `datasets`.
"""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from engine.chat.images import IMAGE_LIMIT_BYTES
from engine.config import DatasetConfig
from engine.data.readers import RawRow, without_nulls
from engine.errors import UserError, WorkError
from engine.hardware.packages import install_command


def child_environment() -> dict[str, str]:
    """The environment of a child started with `-m engine…`.

    Without PYTHONSAFEPATH a folder that holds someone's own `engine/` would be run instead.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def read_hub(dataset: DatasetConfig) -> Iterator[RawRow]:
    """The rows of the split, numbered from 1, streamed at the pinned revision.

    Raises `UserError` with what the child says: not installed, not found, no network.
    """
    for answer in _ask({"request": "rows", "dataset": dataset.model_dump(mode="json")}):
        yield RawRow(answer["line"], answer["row"], None, 0)


def pin_revision(dataset: DatasetConfig) -> str:
    """The commit that `dataset.revision` (else the main branch) names now; asks the hub."""
    (answer,) = _ask({"request": "revision", "dataset": dataset.model_dump(mode="json")})
    return str(answer["revision"])


def _ask(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    child = subprocess.Popen(
        [sys.executable, "-m", "engine.data.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # progress bars and names that the hub chose
        env=child_environment(),
        encoding="utf-8",
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps({"id": 1, **request}) + "\n")
        child.stdin.flush()
        for line in child.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise UserError(**answer["error"])
            if "result" in answer:
                return
            if "item" in answer:
                yield answer["item"]
        raise WorkError(
            "The process that reads the hub ended early.",
            f"It left with status {child.wait()}.",
            "Run the command again, or download the set and name the local folder.",
        )
    finally:
        child.stdin.close()
        child.terminate()
        child.wait()
        child.stdout.close()


def stream_hub(dataset: DatasetConfig) -> Iterator[dict[str, Any]]:
    """In the child: `{"line", "row"}` for each row. Arrow's null fillers are dropped."""
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
            yield {"line": line, "row": _with_bytes(without_nulls(dict(row)))}
    except UserError:
        raise
    except Exception as error:  # the hub's client raises some thirty types
        raise _unreachable(dataset, error) from error


def _with_bytes(value: Any) -> Any:
    """The row with the bytes of images that are files of the hub and not in the table."""
    if isinstance(value, list):
        return [_with_bytes(item) for item in value]
    if not isinstance(value, dict):
        return value
    path = value.get("path")
    if value.keys() <= {"path", "bytes"} and isinstance(path, str) and "hf://" in path:
        if value.get("bytes"):
            return value
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return {"path": path, "bytes": file.read(IMAGE_LIMIT_BYTES + 1)}
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


def plain(value: Any) -> Any:
    """For `json.dumps(default=…)`: bytes as {"base64"}, dates as text, else the type's name."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    isoformat = getattr(value, "isoformat", None)
    return isoformat() if callable(isoformat) else f"<{type(value).__name__}>"

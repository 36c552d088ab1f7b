"""The process that reads and tokenizes for the wizard, so that its screen never waits.

`python -m engine.data.worker` takes one request of `requests` a line on stdin and answers in JSON
lines on stdout, each with the request's id: any number of `progress` and `item`, then one of
`result`, `error` and `cancelled`. Requests that read a few rows are served in turn by one thread,
those that read all of them by another, so that a preview never waits for a count; a third listens
for `{"cancel": id}`. It ends when stdin does. Only here is `datasets` imported.
"""

import base64
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeAlias

from engine.chat.images import IMAGE_LIMIT_BYTES
from engine.chat.tokenizer import ChatTokenizer, open_tokenizer
from engine.chat.tokenizer_file import tokenizer_name
from engine.config import DatasetConfig, RunConfig
from engine.data.checkup import count_rows
from engine.data.prepare import label_rule
from engine.data.preview import preview_row
from engine.data.requests import (
    CheckRows,
    HubRow,
    Preview,
    PreviewRows,
    Progress,
    ReadHub,
    ReadShape,
    ResolveRevision,
    Shape,
    Warm,
    plain,
    read_request,
)
from engine.data.rows import effective_datasets, iterate_rendered
from engine.data.shape import read_shape
from engine.data.sources import locate
from engine.data.statistics import Checkup
from engine.data.tables import without_nulls
from engine.errors import UserError, WorkError
from engine.hardware.packages import install_command

# A preview ends after the row that passes this, so that long rows come one by one.
_PREVIEW_TOKENS = 20_000
_REPORT_SECONDS = 0.1
# Going back and forth between the answers of two switches reads nothing again.
_REMEMBERED = 4
_QUICK = ("preview", "shape", "warm")


Report: TypeAlias = Callable[[Progress | None], None]


class _Cancelled(Exception):
    """Raised out of a progress report; carries no message because nobody reads one."""


class Reader:
    """Answers what rows are asked for, of several threads too, and keeps opened tokenizers."""

    def __init__(self) -> None:
        self._opening = threading.Lock()
        self._checked: dict[str, Checkup] = {}
        self._tokenizers: dict[tuple[str, Path], ChatTokenizer] = {}

    def answer(
        self, request: ReadShape | CheckRows | PreviewRows, report: Report
    ) -> Shape | Checkup | Preview:
        """The answer to a request; `report` gets its progress, None between, and may raise to end
        it. Raises UserError where the rows or the tokenizer cannot be read."""
        match request:
            case ReadShape(config, folder, count):
                return read_shape(config.datasets[0], folder, count)
            case CheckRows(config, folder):
                return self._check(config, folder, report)
            case PreviewRows() as asked:
                return self._preview(asked, report)

    def _tokenizer(self, config: RunConfig, folder: Path, report: Report) -> ChatTokenizer:
        place = (tokenizer_name(config), folder)
        if place not in self._tokenizers:
            report(Progress("tokenizer"))
        with self._opening:
            if place not in self._tokenizers:
                self._tokenizers[place] = open_tokenizer(*place)
        return self._tokenizers[place]

    def _check(self, config: RunConfig, folder: Path, report: Report) -> Checkup:
        """The checkup without its list of every bad row: no screen takes them all.

        Length limits are left out: they change while a plan is made, and `longest_rows` answers
        for any of them. The last few answers are remembered.
        """
        datasets, rule = effective_datasets(config), label_rule(config)
        locations = [locate(dataset, folder) for dataset in datasets]
        tokenizer = self._tokenizer(config, folder, report)
        key = json.dumps(
            [
                *(dataset.model_dump(mode="json") for dataset in datasets),
                *(location.stamps() for location in locations),
                *(str(folder), tokenizer.fingerprint, config.history_thinking, asdict(rule)),
                *(config.image_folder, config.image_size, config.image_resize_algorithm),
            ]
        )
        if key in self._checked:
            return self._checked[key]
        total = sum(size for place in locations for size, *_ in place.stamps())

        def count(rows: int, done_bytes: int) -> None:
            report(Progress("reading", rows, done_bytes, total))

        found = replace(count_rows(config, folder, tokenizer, progress=count), problems=())
        if not found.images.named:  # those are files of their own, which may change
            self._checked[key] = found
            if len(self._checked) > _REMEMBERED:
                self._checked.pop(next(iter(self._checked)))
        return found

    def _preview(self, asked: PreviewRows, report: Report) -> Preview:
        tokenizer = self._tokenizer(asked.config, asked.folder, report)
        rows = iterate_rendered(asked.config, asked.folder, tokenizer, skip=asked.row - 1)
        shown = []
        tokens = 0
        for row in islice(rows, asked.count):
            report(None)
            shown.append(preview_row(row, tokenizer))
            tokens += len(shown[-1].ids)
            if tokens > _PREVIEW_TOKENS:
                break
        return Preview(tuple(shown), tokenizer.efforts)


def stream_hub(dataset: DatasetConfig) -> Iterator[HubRow]:
    """The rows without the nulls that Arrow fills in, their bytes as {"base64"}."""
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
    """The commit hash behind the revision."""
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


class Worker:
    """Serves requests in lines, of several threads too."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._writing = threading.Lock()
        self._reported: dict[int, tuple[str, float]] = {}
        self._cancelled: set[int] = set()
        self._reader = Reader()

    def cancel(self, request_id: int) -> None:
        """Ends that request at its next progress report."""
        self._cancelled.add(request_id)

    def serve(self, message: dict[str, Any]) -> None:
        """Answers one request; whatever happens, exactly one last line is written."""
        request_id = message["id"]
        try:
            self._report(request_id)
            self._answer(request_id, "result", self._serve(request_id, message))
        except _Cancelled:
            self._answer(request_id, "cancelled", True)
        except UserError as error:
            self._fail(request_id, error)
        except Exception as error:  # the wizard shows it; the process must live on
            self._fail(
                request_id,
                WorkError(
                    "The worker could not do this.",
                    f"{type(error).__name__}: {error}",
                    "Try again; if it happens again, report it with this text.",
                ),
            )
        finally:
            self._cancelled.discard(request_id)
            self._reported.pop(request_id, None)

    def _serve(self, request_id: int, message: dict[str, Any]) -> object:
        match read_request(message):
            case Warm():
                return None
            case ReadHub(dataset):
                for row in stream_hub(dataset):
                    self._report(request_id)
                    self._answer(request_id, "item", row)
                return None
            case ResolveRevision(dataset):
                self._answer(request_id, "item", resolve_revision(dataset))
                return None
            case request:
                return self._reader.answer(request, partial(self._report, request_id))

    def _fail(self, request_id: int, error: UserError) -> None:
        sentences = {name: getattr(error, name) for name in ("what", "why", "fix", "exit_status")}
        self._answer(request_id, "error", sentences)

    def _answer(self, request_id: int, key: str, value: object) -> None:
        line = json.dumps({"id": request_id, key: plain(value)}) + "\n"
        with self._writing:
            self._answers.write(line)
            self._answers.flush()

    def _report(self, request_id: int, progress: Progress | None = None) -> None:
        """Ends the request if that was asked; reports each phase at once and then every 0.1 s."""
        if request_id in self._cancelled:
            raise _Cancelled
        if progress is None:
            return
        phase, reported_at = self._reported.get(request_id, ("", 0.0))
        now = time.monotonic()
        if phase != progress.phase or now - reported_at >= _REPORT_SECONDS:
            self._reported[request_id] = (progress.phase, now)
            self._answer(request_id, "progress", progress)


def main() -> None:
    """Listens on stdin until it ends."""
    # Libraries may print; only answers may reach the pipe that the wizard reads.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(answers)
    quick: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    long: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def serve_forever(waiting: queue.SimpleQueue[dict[str, Any]]) -> None:
        while True:
            worker.serve(waiting.get())

    for waiting in (quick, long):
        threading.Thread(target=serve_forever, args=(waiting,), daemon=True).start()
    for line in sys.stdin:
        request = json.loads(line)
        if "cancel" in request:
            worker.cancel(request["cancel"])
        else:
            (quick if request.get("request") in _QUICK else long).put(request)
    # The wizard is gone. What `prepare` has made durable stays, so nothing needs an orderly end.
    os._exit(0)


if __name__ == "__main__":
    main()

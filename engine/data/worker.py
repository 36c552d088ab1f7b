"""The process that reads and tokenizes for the wizard, so that its screen never waits.

`python -m engine.data.worker` takes one JSON request a line on stdin and answers in JSON lines on
stdout, each with the request's id: any number of `progress` and `item`, then one of `result`,
`error` and `cancelled`. Requests that read a few rows are served in turn by one thread, those that
read all of them by another, so that a preview never waits for a count; a third listens for
`{"cancel": id}`. It ends when stdin does.

Requests: `check`, `shape`, `preview`, `prepare` and `statistics` carry a `config` (RunConfig as
JSON) and the `folder` that its paths start from; `rows` and `revision` carry a `dataset` on the
hub; `warm` loads what the others need.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from engine.chat.tokenizer import ChatTokenizer, open_tokenizer
from engine.chat.tokenizer_file import tokenizer_name
from engine.config import DatasetConfig, RunConfig
from engine.data.checkup import check_config, group_problems
from engine.data.hub import plain, resolve_revision, stream_hub
from engine.data.prepare import Progress, default_store, label_rule, prepare
from engine.data.preview import preview_entry, preview_pieces
from engine.data.rows import effective_datasets, iterate_rendered
from engine.data.shape import read_shape
from engine.data.sources import locate
from engine.errors import UserError, WorkError

_PREVIEW_ROWS = 20
# A preview ends after the row that passes this, so that long rows come one by one.
_PREVIEW_TOKENS = 20_000
_REPORT_SECONDS = 0.1
# Going back and forth between the answers of two switches reads nothing again.
_REMEMBERED = 4
_QUICK = ("preview", "shape", "warm")


class _Cancelled(Exception):
    """Raised out of a progress report; carries no message because nobody reads one."""


class Worker:
    """Serves requests, of several threads too, and keeps the tokenizers that it has opened."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._writing = threading.Lock()
        self._opening = threading.Lock()
        self._reported: dict[int, tuple[str, float]] = {}
        self._cancelled: set[int] = set()
        self._checked: dict[str, dict[str, Any]] = {}
        self._tokenizers: dict[tuple[str, Path], ChatTokenizer] = {}
        self._serving: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
            "warm": lambda *_: {},
            "shape": self._shape,
            "check": self._check,
            "preview": self._preview,
            "prepare": self._prepare,
            "statistics": self._statistics,
            "rows": self._rows,
            "revision": self._revision,
        }

    def cancel(self, request_id: int) -> None:
        """Ends that request at its next progress report."""
        self._cancelled.add(request_id)

    def serve(self, request: dict[str, Any]) -> None:
        """Answers one request; whatever happens, exactly one last line is written."""
        request_id = request["id"]
        try:
            self._report(request_id)
            serve = self._serving.get(request["request"])
            if serve is None:
                known = ", ".join(self._serving)
                raise UserError("Unknown request.", f"Known are {known}.", "Send one of these.")
            self._answer(request_id, "result", serve(request_id, request))
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

    def _fail(self, request_id: int, error: UserError) -> None:
        told = {name: getattr(error, name) for name in ("what", "why", "fix", "exit_status")}
        self._answer(request_id, "error", told)

    def _answer(self, request_id: int, key: str, value: Any) -> None:
        line = json.dumps({"id": request_id, key: value}, default=plain) + "\n"
        with self._writing:
            self._answers.write(line)
            self._answers.flush()

    def _report(self, request_id: int, progress: dict[str, Any] | None = None) -> None:
        """Ends the request if that was asked; tells each phase at once and then every 0.1 s."""
        if request_id in self._cancelled:
            raise _Cancelled
        if progress is None:
            return
        phase, told_at = self._reported.get(request_id, ("", 0.0))
        now = time.monotonic()
        if phase != progress["phase"] or now - told_at >= _REPORT_SECONDS:
            self._reported[request_id] = (progress["phase"], now)
            self._answer(request_id, "progress", progress)

    def _tokenizer(self, request_id: int, config: RunConfig, folder: Path) -> ChatTokenizer:
        place = (tokenizer_name(config), folder)
        if place not in self._tokenizers:
            self._report(request_id, {"phase": "tokenizer"})
        with self._opening:
            if place not in self._tokenizers:
                self._tokenizers[place] = open_tokenizer(*place)
        return self._tokenizers[place]

    def _shape(self, request_id: int, request: dict[str, Any]) -> dict[str, Any]:
        config, folder = _config(request)
        (dataset, *_) = config.datasets
        return asdict(read_shape(dataset, folder, request.get("count", _PREVIEW_ROWS)))

    def _check(self, request_id: int, request: dict[str, Any]) -> dict[str, Any]:
        """The checkup with its `statistics`, and equal problems grouped: no screen takes them all.

        Length limits are left out: they change while a plan is made, and `longest_rows` answers
        for any of them. The last few answers are remembered.
        """
        config, folder = _config(request)
        datasets, rule = effective_datasets(config), label_rule(config)
        locations = [locate(dataset, folder) for dataset in datasets]
        tokenizer = self._tokenizer(request_id, config, folder)
        key = json.dumps(
            [
                *(dataset.model_dump(mode="json") for dataset in datasets),
                *(location.stamps() for location in locations),
                *(str(folder), tokenizer.fingerprint, config.history_thinking, asdict(rule)),
                *(config.image_folder, config.image_size, config.image_resize_algorithm),
            ]
        )
        if key not in self._checked:
            total_bytes = sum(size for place in locations for size, *_ in place.stamps())
            found = check_config(
                config,
                folder,
                tokenizer,
                progress=lambda rows, done: self._report(
                    request_id,
                    {
                        "phase": "reading",
                        "rows": rows,
                        "done_bytes": done,
                        "total_bytes": total_bytes,
                    },
                ),
            )
            counted = found.statistics()
            answer = asdict(found) | {
                "statistics": asdict(counted) if counted else None,
                "problems": group_problems(found.problems),
                "bad_rows": len(found.problems),
            }
            if found.images.named:  # files of their own, which may have changed when asked again
                return answer
            self._checked[key] = answer
            if len(self._checked) > _REMEMBERED:
                self._checked.pop(next(iter(self._checked)))
        return self._checked[key]

    def _preview(self, request_id: int, request: dict[str, Any]) -> dict[str, Any]:
        """Rows as `preview --json` shows them, each with its `pieces` and its stored kinds.

        Ids below `first_text_id` are control tokens; `efforts` is empty where the tokenizer
        states none.
        """
        config, folder = _config(request)
        tokenizer = self._tokenizer(request_id, config, folder)
        rows = iterate_rendered(
            config,
            folder,
            tokenizer,
            reasoning_effort=request.get("reasoning_effort"),
            skip=request.get("row", 1) - 1,
        )
        entries: list[dict[str, Any]] = []
        tokens = 0
        for row in islice(rows, request.get("count", _PREVIEW_ROWS)):
            self._report(request_id)
            entry = preview_entry(row, label_rule(config))
            entry["pieces"] = preview_pieces(entry, tokenizer)
            entry["stored_kinds"] = row.rendered.kinds.tolist() if row.rendered else []
            entries.append(entry)
            tokens += len(entry["input_ids"])
            if tokens > _PREVIEW_TOKENS:
                break
        return {
            "rows": entries,
            "first_text_id": tokenizer.first_text_id,
            "efforts": tokenizer.efforts,
        }

    def _prepare(self, request_id: int, request: dict[str, Any]) -> dict[str, Any]:
        config, folder = _config(request)

        def report(progress: Progress) -> None:
            self._report(request_id, asdict(progress))

        prepared = prepare(
            config,
            folder,
            self._tokenizer(request_id, config, folder),
            default_store(config, folder),
            report,
        )
        return {
            "path": str(prepared.folder),
            "reused": prepared.reused,
            "rows": len(prepared),
            "bad_rows": prepared.meta["bad_rows"],
            "tokens": prepared.meta["tokens"],
            "learned_tokens": prepared.learned_tokens(label_rule(config)),
        }

    def _statistics(self, request_id: int, request: dict[str, Any]) -> dict[str, Any]:
        """What the switches change, from arrays that are there already."""
        config, folder = _config(request)
        tokenizer, store = (
            self._tokenizer(request_id, config, folder),
            default_store(config, folder),
        )
        prepared = prepare(config, folder, tokenizer, store)
        rule = label_rule(config)
        selection = prepared.select(rule, config.sequence_len, config.excess_length_strategy)
        return {
            "rows": len(prepared),
            "used_rows": len(selection.rows),
            "too_long": selection.too_long,
            "truncated": selection.truncated,
            "nothing_learned": selection.nothing_learned,
            "longest_tokens": int(prepared.lengths.max()),
            "tokens": prepared.meta["tokens"],
            "learned_tokens": prepared.learned_tokens(rule),
            "tokens_by_kind": prepared.tokens_by_kind(),
        }

    def _rows(self, request_id: int, request: dict[str, Any]) -> dict[str, Any]:
        count = 0
        for item in stream_hub(DatasetConfig(**request["dataset"])):
            self._report(request_id)
            self._answer(request_id, "item", item)
            count += 1
        return {"rows": count}

    def _revision(self, request_id: int, request: dict[str, Any]) -> dict[str, Any]:
        revision = resolve_revision(DatasetConfig(**request["dataset"]))
        self._answer(request_id, "item", {"revision": revision})
        return {}


def _config(request: dict[str, Any]) -> tuple[RunConfig, Path]:
    try:
        return RunConfig.model_validate(request["config"]), Path(request["folder"])
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            "The config does not allow this.",
            first["msg"].removeprefix("Value error, "),
            "Choose another value, or rename the file that it names.",
        ) from error


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

"""The process that reads and tokenizes for the wizard, so that its screen never waits.

`python -m engine.data.worker` takes one JSON request a line on stdin and answers in JSON lines on
stdout, each with the request's id: any number of `progress` and `item`, then one of `result`,
`error` and `cancelled`. Requests are served in turn by one thread while the other listens for
`{"cancel": id}`. It ends when stdin does.

Requests: `check`, `preview`, `prepare` and `statistics` carry a `config` (RunConfig as JSON) and
the `folder` that its paths start from; `rows` and `revision` carry a `dataset` on the hub.
"""

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, Any

from engine.chat.tokenizer import ChatTokenizer, open_tokenizer
from engine.config import DatasetConfig, RunConfig
from engine.data.checkup import check
from engine.data.hub import plain, resolve_revision, stream_hub
from engine.data.prepare import Progress, default_store, label_rule, prepare
from engine.data.preview import preview_entry
from engine.data.rows import effective_datasets, iterate_rendered, tokenizer_name
from engine.errors import UserError, WorkError

_PREVIEW_ROWS = 20


class _Cancelled(Exception):
    """Raised out of a progress report; carries no message because nobody reads one."""


class Worker:
    """Serves requests one after another and keeps the tokenizers that it has opened."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._cancelled: set[int] = set()
        self._tokenizers: dict[tuple[str, Path], ChatTokenizer] = {}
        self._serving: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
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

    def _fail(self, request_id: int, error: UserError) -> None:
        told = {name: getattr(error, name) for name in ("what", "why", "fix", "exit_status")}
        self._answer(request_id, "error", told)

    def _answer(self, request_id: int, key: str, value: Any) -> None:
        self._answers.write(json.dumps({"id": request_id, key: value}, default=plain) + "\n")
        self._answers.flush()

    def _report(self, request_id: int, progress: dict[str, Any] | None = None) -> None:
        if request_id in self._cancelled:
            raise _Cancelled
        if progress is not None:
            self._answer(request_id, "progress", progress)

    def _tokenizer(self, request_id: int, config: RunConfig, folder: Path) -> ChatTokenizer:
        place = (tokenizer_name(config), folder)
        if place not in self._tokenizers:
            self._report(request_id, {"phase": "tokenizer"})
            self._tokenizers[place] = open_tokenizer(*place)
        return self._tokenizers[place]

    def _check(self, request_id: int, request: dict[str, Any]) -> dict[str, Any]:
        config, folder = _config(request)
        found = check(
            effective_datasets(config),
            folder,
            self._tokenizer(request_id, config, folder),
            rule=label_rule(config),
            history_thinking=config.history_thinking,
            sequence_len=config.sequence_len,
            progress=lambda rows, done: self._report(
                request_id, {"phase": "reading", "rows": rows, "done_bytes": done}
            ),
        )
        return asdict(found)

    def _preview(self, request_id: int, request: dict[str, Any]) -> dict[str, Any]:
        config, folder = _config(request)
        tokenizer = self._tokenizer(request_id, config, folder)
        rows = iterate_rendered(
            effective_datasets(config, reasoning_effort=request.get("reasoning_effort")),
            folder,
            tokenizer,
            history_thinking=config.history_thinking,
            skip=request.get("row", 1) - 1,
        )
        entries = []
        for row in islice(rows, request.get("count", _PREVIEW_ROWS)):
            self._report(request_id)
            entry = preview_entry(row, label_rule(config))
            entries.append(entry | {"pieces": list(tokenizer.pieces(entry["input_ids"]))})
        return {"rows": entries}

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
    return RunConfig.model_validate(request["config"]), Path(request["folder"])


def main() -> None:
    """Listens on stdin until it ends."""
    # Libraries may print; only answers may reach the pipe that the wizard reads.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(answers)
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def serve_forever() -> None:
        while True:
            worker.serve(waiting.get())

    threading.Thread(target=serve_forever, daemon=True).start()
    for line in sys.stdin:
        request = json.loads(line)
        if "cancel" in request:
            worker.cancel(request["cancel"])
        else:
            waiting.put(request)
    # The wizard is gone. What `prepare` has made durable stays, so nothing needs an orderly end.
    os._exit(0)


if __name__ == "__main__":
    main()

"""Work with torch that is no run: a process that is asked, and that answers, in lines of JSON.

It is started by module name like a trainer and never imported; it lives as long as whoever asks,
and what it says of an error arrives as the same three sentences.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from engine.errors import DOES_NOT_FIT, UserError, WorkError
from engine.launch import TRAINER, last_words, trainer_environment

_GRACE_SECONDS: Final = 10.0


class TorchProcess:
    """One such process, inside a `with`; leaving it ends the process."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        module: str = TRAINER,
    ) -> None:
        """Start `python -m module ARGUMENTS`; `environment` is added to ours."""
        self._folder = tempfile.TemporaryDirectory(prefix="windtunnel-")
        self._log = Path(self._folder.name, "stderr")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=trainer_environment(environment or {}),
            )

    def __enter__(self) -> "TorchProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if kind is not None:
            self._process.terminate()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send one request; a process that has died says why when it is listened to."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def listen(self, until: str) -> Iterator[dict[str, Any]]:
        """Its lines, up to and with the first that has the key `until`.

        Raises the UserError or WorkError that it tells, and WorkError with its last words where it
        ends without a word.
        """
        assert self._process.stdout
        for line in self._process.stdout:
            try:
                record = json.loads(line)
            except ValueError:  # a library that prints
                continue
            if not isinstance(record, dict):
                continue
            if "error" in record:
                raise _told(record["error"])
            yield record
            if until in record:
                return
        status = self._process.wait()
        raise WorkError(
            f"The process that computes ended without an answer (exit status {status}).",
            "Its last words: " + (" / ".join(last_words(self._log, 0)) or "none."),
            "See that there is memory for the model: `windtunnel estimate` says how much it takes.",
        )


def _told(error: Mapping[str, Any]) -> UserError:
    what, why, fix = (str(error.get(key, "")) for key in ("what", "why", "fix"))
    status = error.get("exit_status")
    if status == 1:
        return WorkError(what, why, fix)
    return UserError(what, why, fix, exit_status=DOES_NOT_FIT if status == DOES_NOT_FIT else 2)

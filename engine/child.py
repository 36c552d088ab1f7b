"""A process of ours that is asked and that answers in lines of JSON; started by module name.

It lives as long as whoever asks. What it refuses arrives as the same three sentences, and so does
its end: the last of what it wrote on stderr is kept for that.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

from engine.errors import DOES_NOT_FIT, UserError, WorkError
from engine.visible import visible

TRAINER: Final = "engine.train"
_GRACE_SECONDS: Final = 10.0
_LAST_LINES: Final = 8
_LAST_BYTES: Final = 1 << 14


def child_environment(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours and `added`, with what makes a child find this `engine` and print plain lines.

    Without PYTHONSAFEPATH, `-m` looks into the current directory first and would run an `engine/`
    of the person's own. A source tree that is not installed is on our path by the same accident, so
    its place is passed on; an installed one is found anyway, and must not come before the standard
    library.
    """
    environment = dict(os.environ)
    home = Path(__file__).resolve().parent.parent
    if home.name not in ("site-packages", "dist-packages"):
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(home), *([before] if before else [])])
    environment.update(PYTHONSAFEPATH="1", PYTHONUNBUFFERED="1", TERM="dumb", NO_COLOR="1")
    environment.update(added or {})
    return environment


class Child:
    """One such process, inside a `with` or until it is closed."""

    def __init__(
        self,
        command: Sequence[str],
        ended: tuple[str, str],
        *,
        environment: Mapping[str, str] | None = None,
        own_session: bool = False,
    ) -> None:
        """Start it. `ended` says what its end means, and the fix; `environment` is added to ours.

        In a session of its own, ctrl+c in the terminal does not reach it. Raises WorkError where
        it cannot be started.
        """
        self._ended = ended
        # In append mode, because the process and we share the place in the file.
        self._errors = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=child_environment(environment),
                start_new_session=own_session,
            )
        except OSError as error:
            self._errors.close()
            raise WorkError(
                "A process of Windtunnel could not be started.",
                f"{error.strerror or error}.",
                "Free memory or processes on this computer and try again.",
            ) from error
        self.id = self._process.pid

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(_GRACE_SECONDS, at_once=kind is not None)
        self.close()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send one request; a process that has died says why when it is listened to."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError, ValueError):  # ended, or closed by us
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def records(self, *, strict: bool = False) -> Iterator[dict[str, Any]]:
        """What it says until it ends.

        Lines that a library prints between are skipped, and with `strict` a ValueError.
        """
        assert self._process.stdout
        for line in self._process.stdout:
            try:
                record = json.loads(line)
            except ValueError:
                if strict:
                    raise
                continue
            if isinstance(record, dict):
                yield record

    def read(self, size: int) -> bytes:
        """So many bytes of what it says; fewer where it ended."""
        assert self._process.stdout
        return self._process.stdout.read(size)

    def listen(self, until: str) -> Iterator[dict[str, Any]]:
        """What it says, up to and with the first record that has the key `until`.

        Raises the UserError or WorkError that it answers, and WorkError where it ends before that.
        """
        for record in self.records():
            if "error" in record:
                raise read_error(record["error"])
            yield record
            if until in record:
                return
        raise self.death()

    def death(self) -> WorkError:
        """How it ended, with the last of what it wrote; waits for the end."""
        status = self._process.wait()
        what, fix = self._ended
        how = "was stopped by signal" if status < 0 else "left with exit status"
        said = " / ".join(last_lines(self._errors))
        return WorkError(what, f"It {how} {abs(status)}{': ' + said if said else ''}.", fix)

    def end(self, grace_seconds: float, *, at_once: bool = False) -> None:
        """End it: the end of its input asks for that, and it is killed where it does not follow."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if at_once:
            self._process.terminate()
        try:
            self._process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        assert self._process.stdout
        self._process.stdout.close()
        self._errors.close()


def torch_process(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, module: str = TRAINER
) -> Child:
    """The process that computes for a command and is no run: `generate`, `merge` or `fit`."""
    ended = (
        "The process that computes ended without an answer.",
        "See that there is memory for the model: `windtunnel estimate` says how much it takes.",
    )
    return Child([sys.executable, "-m", module, *arguments], ended, environment=environment)


def read_error(error: Mapping[str, Any]) -> UserError:
    """The error that a process answered: what, why, fix and exit_status."""
    what, why, fix = (str(error.get(key, "")) for key in ("what", "why", "fix"))
    status = error.get("exit_status")
    if status == 1:
        return WorkError(what, why, fix)
    return UserError(what, why, fix, exit_status=DOES_NOT_FIT if status == DOES_NOT_FIT else 2)


def last_lines(log: IO[bytes], start: int = 0) -> list[str]:
    """The last lines that were printed after `start`, safe to show; of a traceback only its end."""
    size = os.fstat(log.fileno()).st_size
    text = os.pread(log.fileno(), _LAST_BYTES, max(start, size - _LAST_BYTES)).decode(
        "utf-8", "replace"
    )
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    for index in reversed(range(len(lines))):
        if lines[index].startswith("Traceback "):
            lines = [line for line in lines[index + 1 :] if not line.startswith(" ")]
            break
    return [visible(line, one_line=True) for line in lines[-_LAST_LINES:]]

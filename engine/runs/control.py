"""Commands to a run that lives, through a file both sides can read.

A file and not a signal or a socket: it works from another machine, leaves a record, and each
command has an id that the trainer answers in its events.
"""

import json
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal, cast, get_args

from engine.errors import UserError, WorkError
from engine.events import Ack
from engine.runs.folder import LineReader, RunFolder, append_line
from engine.runs.lock import is_locked
from engine.runs.summary import Follower
from engine.visible import visible

Request = Literal["pause", "resume", "stop", "save", "sample"]

_REQUESTS: Final[tuple[str, ...]] = get_args(Request)


@dataclass(frozen=True, slots=True)
class Command:
    """One line of `control.jsonl`."""

    id: str
    command: Request
    time: float
    """Unix seconds when it was written."""


class ControlReader:
    """The trainer's ear: each command that comes after it was made once, whole lines only.

    Lines that are no commands are skipped; a file that was replaced does not repeat a command.
    Make it before the run's lock is taken: whoever sees the lock may write. By their ids and not
    by their time: a clock can be set back.
    """

    def __init__(self, path: Path) -> None:
        self._lines = LineReader(path)
        self._seen: set[str] = set()
        self.read()

    def read(self) -> list[Command]:
        """Commands since the last call, oldest first. Costs microseconds: call it at every step.

        The trainer answers each with an `Ack` of the same id. Never raises: a file that cannot
        be read holds no commands for now.
        """
        found: list[Command] = []
        try:
            while lines := self._lines.read():
                found += [each for line in lines if (each := self._accept(line))]
        except OSError:
            pass
        return found

    def _accept(self, line: bytes) -> Command | None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(record, dict):
            return None
        identity, name, written = record.get("id"), record.get("command"), record.get("time")
        if not isinstance(identity, str) or not isinstance(written, int | float):
            return None
        if name not in _REQUESTS or identity in self._seen:
            return None
        self._seen.add(identity)
        return Command(identity, cast(Request, name), written)


def send(run: RunFolder, command: Request) -> str:
    """Write a command for a run that lives; returns its id, which the `ack` event will carry.

    Raises UserError where no process would read it, WorkError where it cannot be written.
    """
    shown = visible(run.name, one_line=True)
    if not is_locked(run):
        raise UserError(
            f"The run {shown} is not running.",
            f"No process trains in its folder, so nobody would read {command!r}.",
            f"See what became of it with `windtunnel runs`; `windtunnel resume {shown}` goes on.",
        )
    return post(run, command)


def post(run: RunFolder, command: Request) -> str:
    """Write a command whether or not a process reads it, as from a node that the run's lock is not
    known on; returns its id. Raises WorkError where it cannot be written."""
    shown, identity = visible(run.name, one_line=True), uuid.uuid4().hex[:12]
    try:
        append_line(run.control, {"id": identity, "command": command, "time": time.time()})
    except OSError as error:
        raise WorkError(
            f"The run {shown} could not be asked to {command}.",
            f"Its control.jsonl cannot be written: {error}.",
            "Free space on that disk, or ask as the user who started the run.",
        ) from error
    return identity


def ask(run: RunFolder, command: Request, *, timeout_seconds: float) -> Ack:
    """Send a command and wait for its answer.

    Raises what `send` does, and WorkError where the run ends before it answers or does not answer
    in time; the command then stays asked.
    """
    follower = Follower(run.events, from_end=True)
    identity = send(run, command)
    deadline = time.monotonic() + timeout_seconds
    shown = visible(run.name, one_line=True)
    while True:
        alive = is_locked(run)
        while events := follower.read():
            for recorded in events:
                if isinstance(recorded.event, Ack) and recorded.event.id == identity:
                    return recorded.event
        if not alive:
            raise WorkError(
                f"The run {shown} ended before it answered.",
                f"It was asked to {command}, and its process is gone.",
                "See how it ended with `windtunnel runs`.",
            )
        if time.monotonic() > deadline:
            raise WorkError(
                f"The run {shown} has not answered for {timeout_seconds:.0f} seconds.",
                "A run reads commands between two steps; loading, evaluating and saving take long.",
                f"It will {command} as soon as it reads this; watch it with `windtunnel runs`.",
            )
        time.sleep(0.05)


_LEAVING: Final = 130

# `kill -- -GROUP` reaches the trainer once itself and once through a launcher that passes it on.
_SAME_REQUEST_SECONDS: Final = 0.25


class StopAsked(Exception):
    """A run was asked to end while it has nothing to save: before its first step."""


class StopSignals:
    """Inside `with StopSignals() as signals`, the first SIGTERM or SIGINT sets `requested`.

    The trainer then saves at the next step boundary and ends "stopped". A second one leaves at once
    with exit status 130 and saves nothing; `leaving` has the last word. A hangup asks to stop as
    well where a terminal owns the process, and means nothing to a detached one. Only for the main
    thread.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether the run was asked to save and end."""
        self.name = ""
        """The signal that asked, such as SIGTERM."""
        self.arrived: Callable[[], object] = lambda: None
        """Called at the first."""
        self.leaving: Callable[[], object] = lambda: None
        """Called before it leaves at once."""
        self._first = 0.0
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        for each in (signal.SIGTERM, signal.SIGINT):
            self._before[each] = signal.signal(each, self._receive)
        leads_a_session = os.getsid(0) == os.getpid()
        under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        if leads_a_session or under_nohup:
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        else:
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._receive)
        self._before[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self.name, self._first = True, signal.Signals(number).name, now
            self.arrived()
        elif number != signal.SIGHUP and now - self._first > _SAME_REQUEST_SECONDS:
            self.leaving()
            os._exit(_LEAVING)

"""Rows that a step asks for: as work for any printer, read in this process or by a worker.

The event loop never waits for the worker: a thread listens to it. A process that died is started
anew by the next request; whoever waited gets a sentence.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

from msgspec import convert

from engine.child import Child, read_error
from engine.data.requests import (
    WORKER,
    Answer,
    CheckRows,
    PreviewRows,
    Progress,
    ReadShape,
    Request,
    Warm,
    plain,
    read_answer,
)
from engine.errors import UserError
from engine.pace import every
from engine.wizard.question import Progress as Say
from engine.wizard.question import Work

if TYPE_CHECKING:
    from engine.data.worker import Reader

_SECONDS = 10.0


class Read:
    """Makes work of requests. Its tokenizers stay open, as opening one takes seconds."""

    def __init__(self) -> None:
        self._reader: Reader | None = None

    def work(self, request: ReadShape | CheckRows | PreviewRows, waiting: str) -> Work:
        """The request as work; its `request` is for a process that answers it."""
        key = (repr(request),)
        return Work(type(request).__name__, key, waiting, partial(self._answer, request), request)

    def _answer(self, request: ReadShape | CheckRows | PreviewRows, say: Say) -> Any:
        # Imported here: the tokenizer takes seconds to load, and a screen never loads it.
        from engine.data.worker import Reader

        self._reader = self._reader or Reader()
        due = every(_SECONDS)

        def report(progress: Progress | None) -> None:
            if progress is None:
                return
            if progress.phase == "tokenizer":
                say("Opening the tokenizer of the model.")
            elif due():
                say(f"{progress.rows:,} rows so far.")

        return self._reader.answer(request, report)


_END_SECONDS: Final = 2.0
_ENDED: Final = (
    "The process that reads the data ended.",
    "Press r to try again; it is started anew. Out of memory is the usual reason.",
)


@dataclass(frozen=True, slots=True)
class _Waiting:
    child: Child
    request: Request[Any]
    answer: asyncio.Future[Any]
    progress: Callable[[Progress], None] | None


class DataWorker:
    """One child process, started by the first request. To be used from one event loop."""

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self._command = command
        self._child: Child | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._ids = count(1)

    async def warm(self) -> None:
        """Starts the process, so that its imports are done when a page needs it."""
        with suppress(UserError):
            await self.ask(Warm())

    async def ask(
        self, request: Request[Answer], progress: Callable[[Progress], None] | None = None
    ) -> Answer:
        """The answer to one request; `progress` gets its reports.

        Cancelling the caller cancels the request. Raises the UserError that the process answers,
        WorkError where it cannot be started or ends before it answers.
        """
        child = self._running()
        request_id = next(self._ids)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = _Waiting(child, request, answer, progress)
        try:
            child.ask({"id": request_id, **plain(request)})
            return await answer
        except asyncio.CancelledError:
            child.ask({"cancel": request_id})
            raise
        finally:
            self._waiting.pop(request_id, None)

    async def close(self) -> None:
        """Ends the process; what waits for it gets a sentence."""
        if self._child is not None:
            await asyncio.to_thread(self._child.end, _END_SECONDS)

    @property
    def process_id(self) -> int | None:
        """Of the process that serves now; None before the first request and after its end."""
        return self._child.id if self._child is not None and self._child.is_alive else None

    def _running(self) -> Child:
        if self._child is None or not self._child.is_alive:
            self._child = Child(self._command, _ENDED, own_session=True)
            loop = asyncio.get_running_loop()
            Thread(target=self._listen, args=(self._child, loop), daemon=True).start()
        return self._child

    def _listen(self, child: Child, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: hands each record to the event loop, in its type, until the process ends."""
        with suppress(RuntimeError):  # the loop ended first
            try:
                for record in child.records(strict=True):
                    waiting = self._waiting.get(record.get("id", 0))
                    if waiting is not None:
                        loop.call_soon_threadsafe(_react, waiting, _reaction(waiting, record))
            except ValueError:  # the answers after a line that is none are lost too
                child.end(0)
            loop.call_soon_threadsafe(self._fail, child, child.death())
        child.close()

    def _fail(self, child: Child, error: UserError) -> None:
        for waiting in list(self._waiting.values()):
            if waiting.child is child:
                _react(waiting, partial(waiting.answer.set_exception, error))


def _reaction(waiting: _Waiting, record: dict[str, Any]) -> Callable[[], object]:
    if "progress" in record:
        reported = convert(record["progress"], Progress)
        return partial(waiting.progress or (lambda _: None), reported)
    if "result" in record:
        return partial(waiting.answer.set_result, read_answer(waiting.request, record["result"]))
    if "error" in record:
        return partial(waiting.answer.set_exception, read_error(record["error"]))
    return waiting.answer.cancel


def _react(waiting: _Waiting, reaction: Callable[[], object]) -> None:
    if not waiting.answer.done():
        reaction()

"""The wizard's end of the process that reads and tokenizes: requests out, answers in, by id.

The event loop only ever waits for lines. A process that died is started anew by the next request;
whoever waited gets a sentence.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from engine.data.hub import child_environment
from engine.errors import UserError, WorkError
from engine.visible import visible

COMMAND = (sys.executable, "-m", "engine.data.worker")
# One answer is one line, and a preview of long rows has millions of characters.
_LINE_BYTES = 256 * 2**20
_END_SECONDS = 2.0

OnProgress = Callable[[dict[str, Any]], None]


class DataWorker:
    """One child process, started by the first request. To be used from one event loop."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._child: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: dict[int, tuple[asyncio.Future[dict[str, Any]], OnProgress | None]] = {}
        self._last_id = 0
        self._last_words = ""

    async def warm(self) -> None:
        """Starts the process, so that its imports are done when a page needs it."""
        with suppress(UserError):
            await self.ask("warm")

    async def ask(
        self, request: str, *, progress: OnProgress | None = None, **fields: Any
    ) -> dict[str, Any]:
        """The result of one request of `engine.data.worker`; `progress` gets its reports.

        Cancelling the caller cancels the request. Raises the UserError that the process answers,
        WorkError where it cannot be started or ends before it answers.
        """
        child = await self._running()
        assert child.stdin is not None
        self._last_id += 1
        request_id = self._last_id
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = (answer, progress)
        try:
            self._send(child, {"id": request_id, "request": request, **fields})
            return await answer
        except asyncio.CancelledError:
            self._send(child, {"cancel": request_id})
            raise
        finally:
            self._waiting.pop(request_id, None)

    async def close(self) -> None:
        """Ends the process; what waits for it gets a sentence."""
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            assert child.stdin is not None
            child.stdin.close()
            try:
                await asyncio.wait_for(child.wait(), _END_SECONDS)
            except TimeoutError:
                child.kill()
                await child.wait()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    @property
    def process_id(self) -> int | None:
        """Of the process that serves now; None before the first request and after its end."""
        alive = self._child is not None and self._child.returncode is None
        return self._child.pid if alive and self._child else None

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._child is None or self._child.returncode is not None:
                await asyncio.gather(*self._tasks, return_exceptions=True)
                self._child = await self._start()
            return self._child

    async def _start(self) -> asyncio.subprocess.Process:
        self._last_words = ""
        try:
            child = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=child_environment(),
                limit=_LINE_BYTES,
                start_new_session=True,  # ctrl+c in the terminal is for the wizard alone
            )
        except OSError as error:
            raise WorkError(
                "The process that reads the data could not be started.",
                f"{error.strerror or error}.",
                "Free memory or processes on this computer and try again.",
            ) from error
        self._tasks = [
            asyncio.create_task(self._listen(child)),
            asyncio.create_task(self._hear_errors(child)),
        ]
        return child

    def _send(self, child: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
        # A pipe that is closed already is answered by `_listen`, with how the process ended.
        assert child.stdin is not None
        if not child.stdin.is_closing():
            child.stdin.write(json.dumps(message).encode() + b"\n")

    async def _listen(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None
        try:
            async for line in child.stdout:
                self._take(json.loads(line))
        except ValueError:  # no JSON, or a line over the limit: the answers after it are lost too
            child.kill()
        status = await child.wait()
        for answer, _ in list(self._waiting.values()):
            if not answer.done():
                answer.set_exception(_ended(status, self._last_words))

    def _take(self, answer: dict[str, Any]) -> None:
        waiting, progress = self._waiting.get(answer["id"], (None, None))
        if waiting is None or waiting.done():
            return
        if "result" in answer:
            waiting.set_result(answer["result"])
        elif "error" in answer:
            waiting.set_exception(UserError(**answer["error"]))
        elif "cancelled" in answer:
            waiting.cancel()
        elif progress is not None and "progress" in answer:
            progress(answer["progress"])

    async def _hear_errors(self, child: asyncio.subprocess.Process) -> None:
        """Keeps the last line that the process complains with, and the pipe empty."""
        assert child.stderr is not None
        with suppress(ValueError):
            async for line in child.stderr:
                if words := line.decode("utf-8", "replace").strip():
                    self._last_words = visible(words[:200], one_line=True)


def _ended(status: int, last_words: str) -> WorkError:
    how = f"It was stopped by signal {-status}" if status < 0 else f"It left with status {status}"
    return WorkError(
        "The process that reads the data ended.",
        f"{how}{': ' + last_words if last_words else ''}.",
        "Press r to try again; it is started anew. Out of memory is the usual reason.",
    )

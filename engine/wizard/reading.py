"""Rows that a step asks for: as work for any printer, and what is read in this process."""

from functools import partial
from typing import TYPE_CHECKING, Any

from engine.data.requests import CheckRows, PreviewRows, Progress, ReadShape
from engine.pace import every
from engine.wizard.question import Progress as Tell
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

    def _answer(self, request: ReadShape | CheckRows | PreviewRows, tell: Tell) -> Any:
        # Imported here: the tokenizer takes seconds to load, and a screen never loads it.
        from engine.data.worker import Reader

        self._reader = self._reader or Reader()
        due = every(_SECONDS)

        def report(progress: Progress | None) -> None:
            if progress is None:
                return
            if progress.phase == "tokenizer":
                tell("Opening the tokenizer of the model.")
            elif due():
                tell(f"{progress.rows:,} rows so far.")

        return self._reader.answer(request, report)

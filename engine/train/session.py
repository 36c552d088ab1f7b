"""What ties a training process to its run folder: events out, commands and signals in.

The loop asks three things of it between two steps: is there a pause, a wish, or an end.
"""

import time
from collections.abc import Callable
from pathlib import Path

from engine.events import Ack, Event, EventWriter, Note, NoteLevel, Phase
from engine.pace import every
from engine.runs import Command, ControlReader, Request, RunFolder, StopSignals

PAUSE_POLL_SECONDS = 0.2
PROGRESS_SECONDS = 0.5
"""Between two reports on downloading, tokenizing or loading."""


class Session:
    """One launch of a run, inside its lock."""

    def __init__(
        self,
        run: RunFolder,
        events: EventWriter,
        control: ControlReader,
        signals: StopSignals,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.run = run
        self.base_folder: Path = run.path
        """Folder of the base model, known once it is located."""
        self._events, self._control, self._signals, self._sleep = events, control, signals, sleep
        self.doing = ""
        """Name of the newest phase."""
        self.paused = False
        """Whether a command asked to wait between two steps."""
        self._stop_asked = False
        self._wishes: dict[Request, list[Command]] = {}

    def emit(self, event: Event) -> None:
        """Write one event. At each phase commands are taken in too: loading can take minutes."""
        self._events.emit(event)
        if isinstance(event, Phase):
            self.doing = event.name
            self.read()

    def note(self, level: NoteLevel, sentence: str | None) -> None:
        """Write a sentence for the person, where there is one."""
        if sentence:
            self.emit(Note(level, sentence))

    def progress(self, phase: str) -> Callable[[int, int], None]:
        """Called with bytes done and bytes in all, it emits `phase` now and then."""
        due = every(PROGRESS_SECONDS)

        def report(done: int, total: int) -> None:
            if due():
                self.emit(Phase(phase, done, total, "bytes"))

        return report

    @property
    def stopping(self) -> bool:
        """Whether a command or a signal asked to save and end."""
        return self._stop_asked or self._signals.requested

    def read(self) -> None:
        """Take in the commands written since the last call and acknowledge what needs no work."""
        for command in self._control.read():
            if command.command in ("save", "sample"):
                self._wishes.setdefault(command.command, []).append(command)
                continue
            if command.command == "stop":
                self._stop_asked = True
            else:
                self.paused = command.command == "pause"
            self.emit(Ack(command.id, command.command, "done"))

    def rest(self) -> None:
        """Let a paused run wait a moment before it reads again."""
        self._sleep(PAUSE_POLL_SECONDS)

    def wished(self, word: Request) -> bool:
        """Whether somebody asked for `word` (save or sample) since it was granted last."""
        return bool(self._wishes.get(word))

    def grant(self, word: Request) -> None:
        """Acknowledge that what was asked for by `word` is done."""
        for command in self._wishes.pop(word, ()):
            self.emit(Ack(command.id, command.command, "done"))

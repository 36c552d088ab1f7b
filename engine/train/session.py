"""What ties a process that trains to its run's folder: events out, commands and signals in.

Of several ranks each has a `Session`, and what one of them is asked for holds for all of them from
the same step on.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.events import Ack, Event, EventWriter, Note, NoteLevel, Phase, Saved
from engine.pace import every
from engine.runs import Command, ControlReader, Request, RunFolder, StopAsked, StopSignals
from engine.runs.listing import keep_history
from engine.train.ranks import LONE, Ranks

WISHES: tuple[Request, ...] = ("save", "sample")
"""Commands that take work, between two steps."""
AGREED: tuple[Request, ...] = ("stop", "pause", *WISHES)
"""What ranks agree on before each step."""
PROGRESS_SECONDS = 0.5
"""Between two reports on downloading, tokenizing or loading."""


class Session:
    """One launch of a run, inside its lock.

    Of several ranks each has one, and the first one's alone writes events and reads commands.
    """

    def __init__(
        self,
        run: RunFolder,
        events: EventWriter,
        control: ControlReader,
        signals: StopSignals,
        sleep: Callable[[float], None] = time.sleep,
        ranks: Ranks = LONE,
    ) -> None:
        self.run, self.ranks = run, ranks
        self.base_folder: Path = run.path
        """Folder of the base model, known once it is located."""
        self._events, self._control, self._signals, self.sleep = events, control, signals, sleep
        self.doing = ""
        """Name of the newest phase."""
        self.training = False
        """Whether steps began, between which a run stops; until then it does at any phase."""
        self.fitted: set[str] = set()
        """Keys that were changed where memory ran out, which was said then."""
        self._stop_asked = self._pause_asked = False
        self._wishes: dict[Request, list[Command]] = {}
        self._agreed = dict.fromkeys(AGREED, False)

    def emit(self, event: Event) -> None:
        """Write one event. At each phase commands are taken in too: loading can take minutes.

        Raises StopAsked where one asks to end before the first step.
        """
        if self.ranks.is_first:
            self._events.emit(event)
            if isinstance(event, Saved):
                keep_history(self.run)
        if isinstance(event, Phase):
            self.doing = event.name
            self.read()
            if self._leaving and self.ranks.is_alone and not self.training:
                raise StopAsked

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
        """Whether a command, or a signal to any rank, asked to save and end."""
        return self._agreed["stop"]

    @property
    def paused(self) -> bool:
        """Whether a command asked to wait between two steps."""
        return self._agreed["pause"]

    @property
    def _leaving(self) -> bool:
        return self._stop_asked or self._signals.requested

    def agree(self) -> None:
        """Take in commands and signals; what was asked for then holds for all ranks until the next
        call, so that they obey at the same step. Every rank calls it."""
        self.read()
        asked = [
            self._leaving,
            self._pause_asked,
            *(bool(self._wishes.get(word)) for word in WISHES),
        ]
        heard = self.ranks.max(torch.tensor(asked, dtype=torch.int32)).bool().tolist()
        self._agreed = dict(zip(AGREED, heard, strict=True))

    def agree_to_go_on(self) -> None:
        """Raises StopAsked on all ranks where a command or a signal asked to end before the first
        step; one alone does so at any phase."""
        self.agree()
        if self.stopping and not self.training:
            raise StopAsked

    def read(self) -> None:
        """Take in the commands written since the last call and acknowledge what needs no work."""
        for command in self._control.read() if self.ranks.is_first else ():
            if command.command in WISHES:
                self._wishes.setdefault(command.command, []).append(command)
                continue
            if command.command == "stop":
                self._stop_asked = True
            else:
                self._pause_asked = command.command == "pause"
            self.emit(Ack(command.id, command.command, "done"))

    def wished(self, word: Request) -> bool:
        """Whether somebody asked for `word` (save or sample) since it was granted last."""
        return self._agreed[word]

    def grant(self, word: Request) -> None:
        """Acknowledge that what was asked for by `word` is done."""
        for command in self._wishes.pop(word, ()):
            self.emit(Ack(command.id, command.command, "done"))

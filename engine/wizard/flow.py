"""The six steps over one draft: which is asked, what is worked out first, where an answer leads."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from engine.errors import UserError, WorkError
from engine.hardware import Machine
from engine.report import Line
from engine.report.run import way_back
from engine.runs import list_runs, status
from engine.wizard.data import DataStep
from engine.wizard.draft import Draft
from engine.wizard.machine import MachineStep
from engine.wizard.model import ModelStep
from engine.wizard.plan import PlanStep
from engine.wizard.preview import PreviewStep
from engine.wizard.question import Confirm, Progress, Question, Step, Work
from engine.wizard.reading import Read
from engine.wizard.review import ReviewStep
from engine.wizard.start import find_machine


class Wizard:
    """Six steps, at the first one, or at Review where the draft is of an opened config.

    `new` and `out` are ReviewStep's.
    """

    def __init__(
        self,
        draft: Draft,
        *,
        home: Path | None = None,
        read: Callable[[], Machine] | None = None,
        new: bool = False,
        out: Path | None = None,
    ) -> None:
        self.draft = draft
        self.home = home
        self.machine = MachineStep(draft, read or partial(find_machine, None))
        self.model = ModelStep(draft)
        rows = Read()
        self.data = DataStep(draft, rows)
        self.preview = PreviewStep(draft, rows)
        self.plan = PlanStep(draft, rows)
        self.review = ReviewStep(draft, rows, home, new=new, out=out)
        self.steps: tuple[Step, ...] = (
            *(self.machine, self.model, self.data),
            *(self.preview, self.plan, self.review),
        )
        self.at = len(self.steps) - 1 if draft.opened else 0

    @property
    def step(self) -> Step:
        return self.steps[self.at]

    def work(self) -> Work | None:
        return self.step.work()

    def receive(self, work: Work, result: object) -> bool:
        """Take in what `work` gave; whether it was still asked for."""
        if work != self.step.work():
            return False
        self.step.receive(work, result)
        return True

    def question(self) -> Question:
        return self.step.question()

    def confirm(self, key: str, text: str = "") -> Confirm | None:
        return self.step.confirm(key, text)

    def take(self, key: str, text: str = "") -> bool:
        """Take an answer, and go on where the step is answered with it; whether it was the last.

        Raises UserError for one that cannot be taken: then all is as before.
        """
        if not self.step.take(key, text):
            return False
        is_last = self.step is self.review
        self.forward()
        return is_last

    def forward(self) -> None:
        """To the step after; the last one stays."""
        self.at = min(self.at + 1, len(self.steps) - 1)

    def back(self) -> None:
        """To what was asked before; at the first step it stays."""
        if not self.step.back():
            self.at = max(0, self.at - 1)


def live_runs(home: Path | None = None) -> list[Line]:
    """Who trains or is paused already, and the way back to each."""
    lines = []
    for run in list_runs(home):
        with suppress(WorkError):  # a folder that cannot be read is no reason to ask nothing
            word = status(run)
            if word != "waiting" and (way := way_back(run, word)):
                lines.append(Line("▶", "", f"{run.name} is {way}"))
    return lines


def perform(work: Work, progress: Progress) -> object:
    """Do `work` in this process: its result, or the UserError that ended it."""
    try:
        return work.run(progress)
    except UserError as error:
        return error

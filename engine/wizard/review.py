"""The last step: the very file that is run, and what to do with it."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from engine.config import RunConfig, parse_config
from engine.errors import UserError
from engine.report import Line
from engine.runs import RunFolder
from engine.units import gib
from engine.wizard.draft import Draft, count_work, draft_from, next_count, take_answer
from engine.wizard.question import Choice, Confirm, Question, Step, Work
from engine.wizard.reading import Read
from engine.wizard.start import free_config_path, save_config, start_run, why_not

START: Final = "start"
SAVE: Final = "save"
SHOW: Final = "show"
NAME: Final = "name"
LEAVE: Final = "leave"
"""A config that was written is not run now."""
EDIT: Final = "edit"
"""An edited config, as the text."""
STARTING: Final = Line("▶", "starting", "the trainer loads its libraries, which takes some seconds")
_FAULT: Final = "# ✗ "
"""Begins the lines that name the fault of an edited config above its text."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A config that was written, and what it is for."""

    path: Path
    planned: bool
    """For a device that is not here."""

    def lines(self) -> tuple[Line, ...]:
        where = shlex.quote(self.path.name if self.planned else str(self.path))
        line = Line("✓", "saved", f"{self.path}; run it with: windtunnel train {where}")
        there = Line("·", "planned", "first copy it to the machine that has the card")
        return (line, there) if self.planned else (line,)


class ReviewStep(Step):
    """Start, save, name or edit. `outcome` is what has come of it, None before.

    Where the config is what is wanted (`new`), it is written first, to `out` unless another path
    is named, and the start is offered after it.
    """

    title = "Review"

    def __init__(
        self,
        draft: Draft,
        read: Read,
        home: Path | None = None,
        *,
        new: bool = False,
        out: Path | None = None,
    ) -> None:
        self._draft = draft
        self._read = read
        self._home = home
        self._new = new
        self._out = out
        self._edited = ""
        self._fault: UserError | None = None
        self._shows = False
        self._written: RunConfig | None = None
        self.outcome: RunFolder | Saved | None = None

    @property
    def saved(self) -> Saved | None:
        """What was written, for as long as the answers are still those."""
        saved = self.outcome if isinstance(self.outcome, Saved) else None
        return saved if saved and self._written == self._draft.config() else None

    def work(self) -> Work | None:
        return count_work(self._draft, self._read)

    def receive(self, _work: Work, result: object) -> None:
        take_answer(self._draft, result)

    def question(self) -> Question:
        """Start it where it can be, else save it; the reason stands beside the start."""
        draft = self._draft
        refused, usual = why_not(draft), str(self._out or free_config_path(draft))
        place = f"on {draft.device.name}; " if draft.device else ""
        start = Choice(
            START,
            "start now",
            f"{refused.what} {refused.fix}" if refused else f"{place}goes on if this window closes",
            reason=self._downloads(),
            refusal=refused.what if refused else "",
        )
        save = Choice(
            SAVE,
            "save only",
            f"{usual}, to run it headless",
            reason="A config with a reason beside each value, for windtunnel train.",
            asks=f"path, Enter for {usual}",
            completes="path",
            usual=usual,
        )
        shown = Choice(SHOW, "show the config", "the file with a reason beside each value")
        now = f"now {draft.run_name()}"
        name = Choice(NAME, "name", now, reason="Of the run and its folder.", asks=f"name, {now}")
        config = Line("", "", "\n" + draft.config_text().rstrip())
        facts = (config,) if self._shows else ()
        if self._new and isinstance(self.outcome, Saved):
            leave = Choice(LEAVE, "not now", "the config is written")
            return Question(
                self.verdict(), (start, leave), int(refused is not None), self.outcome.lines()
            )
        if self._new:
            return Question(self.verdict(), (replace(save, label="save"), shown, name), 0, facts)
        if (saved := self.saved) and saved.planned:
            save = replace(save, note=saved.lines()[1].text)
        choices = (start, save, shown, name)
        return Question(self.verdict(), choices, int(refused is not None), facts)

    def verdict(self) -> Line:
        """Whether it can start, and what it needs; where it was written, once it was."""
        draft = self._draft
        if not self._new and (saved := self.saved):
            return saved.lines()[0]
        needs, refused, device = draft.advice().estimate, why_not(draft), draft.device
        over = "" if needs.verdict == "fits" else f"{needs.verdict}: "
        amounts = f"{over}{gib(needs.device_bytes)} of {gib(needs.can_give_bytes)}"
        if draft.uncounted:
            amounts += f"{'' if draft.statistics else ' for full rows'}; {draft.uncounted}"
        else:
            amounts += f", up to {gib(needs.disk_bytes)} written"
        if refused is None:
            return Line("✓", "ready to start", amounts)
        if device is not None and device.planned:
            text = f"{amounts}; {device.name} is planned, not here"
            return Line("·", "ready to save", text)
        return Line("✗", "cannot start", refused.what)

    def confirm(self, key: str, text: str) -> Confirm | None:
        if key != SAVE or not Path(text).expanduser().exists():
            return None
        return Confirm(
            f"replace {text}?",
            "It is there already.",
            "writes over it",
            "takes another name",
            is_usual=False,
        )

    def take(self, key: str, text: str) -> bool:
        """Start the run, save the config to the path of the text, name the run, or show the file.

        Starting takes seconds. Raises UserError where it cannot be done; all answers stay.
        """
        self._shows = key == SHOW
        if key == START:
            self.outcome = start_run(self._draft, home=self._home)
        elif key == SAVE:
            path = Path(text) if text else free_config_path(self._draft)
            written = save_config(self._draft, path)
            device = self._draft.device
            self.outcome = Saved(written, device is not None and device.planned)
            self._written = self._draft.config()
        elif key == NAME:
            self._draft.name = text or self._draft.name
            self._written = None
        elif key == EDIT:
            self._edit(text)
        return key in (START, LEAVE) or (key == SAVE and not self._new)

    def back(self) -> bool:
        """To another place for a config that was written."""
        written, self.outcome = self.outcome is not None, None
        return written

    def edit_text(self) -> str:
        """The config for an editor; an edited one that could not be taken comes again, its fault
        named above."""
        if self._fault is None:
            return self._draft.config_text()
        sentences = (self._fault.what, self._fault.why, self._fault.fix)
        above = "".join(
            f"{_FAULT}{line}\n" for each in sentences for line in each.splitlines() if line
        )
        return above + self._edited

    def _edit(self, text: str) -> None:
        draft = self._draft
        text = "".join(
            line for line in text.splitlines(keepends=True) if not line.startswith(_FAULT)
        )
        if text == draft.config_text():
            self._edited, self._fault = "", None
            return
        try:
            edited = draft_from(parse_config(text, "config.yml"), Path.cwd())
            edited.machine, edited.device, edited.name = draft.machine, draft.device, draft.name
            edited.statistics, edited.counted = draft.statistics, draft.counted
            next_count(edited)
            edited.advice()
        except UserError as error:
            self._edited, self._fault = text, error
            raise
        self._edited, self._fault = "", None
        draft.take(edited)

    def _downloads(self) -> str:
        architecture = self._draft.architecture()
        made_here = architecture.card is not None and not architecture.card.repositories
        if made_here or architecture.folder:
            return "All it needs is here."
        return "Weights that are not here are downloaded from huggingface.co first."

"""The last page: the very file that is run, and what to do with it.

It starts nothing by itself: `engine.wizard.start` does.
"""

import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar, Final

from textual import work
from textual.app import ComposeResult, SuspendNotSupported
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import Static

from engine.errors import UserError
from engine.runs import RunFolder
from engine.visible import visible
from engine.wizard.machine import named_cards
from engine.wizard.plan import plan_command
from engine.wizard.question import Question
from engine.wizard.review import EDIT, NAME, SAVE, START, STARTING, ReviewStep
from tui.page import Key, Page
from tui.widgets.choices import Choices
from tui.widgets.pane import Pane, Prompt

_KEYS: Final = (START, SAVE)
"""Of the answers that stand in the list; the others have keys of their own."""
_KEPT: Final = "All answers stay as they are."


class ReviewPage(Page):
    """config.yml as it will be written, and start or save."""

    STEP = "Review"
    KEYS: ClassVar[tuple[Key, ...]] = (
        Key("enter", "do it", 9),
        Key("e", "edit", 6),
        Key("n", "name", 5),
        Key("y", "copy the command", 3),
        Key("esc", "back", 9),
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "edit", "edit the config in your editor", show=False),
        Binding("n", "name", "name the run", show=False),
    ]
    CSS = """
    ReviewPage #config { height: 1fr; }
    ReviewPage #text { width: 100%; height: auto; text-wrap: nowrap; text-overflow: ellipsis; }
    ReviewPage #now { height: 4; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._question: Question | None = None
        self._starting = False

    def compose_body(self) -> ComposeResult:
        with Pane(title="config.yml", id="config", can_focus=True):
            yield Static(id="text", markup=False)
        yield Prompt()
        with Pane(title="what now", id="now"):
            yield Choices(id="choices")

    def on_mount(self) -> None:
        self.part(Choices).focus()

    def on_rows_counted(self) -> None:
        if not self._starting:
            self.refresh_from_draft()

    def refresh_from_draft(self) -> None:
        self.app.count_rows()
        draft = self.app.draft
        try:
            text = draft.config_text()
        except UserError as error:
            self.say("✗", "no plan", f"{error.what} {error.fix}")
            self.show_problem(error)
            return
        pane = self.query_one("#config", Pane)
        pane.show_subtitle(visible(draft.run_name(), one_line=True))
        self.query_one("#text", Static).update(_coloured(text))
        self._question = self._step.question()
        self._show_choices(self._question)
        self._show_verdict()

    def _show_verdict(self) -> None:
        device = self.app.draft.device
        line = self._step.verdict()
        self.say(line.mark, line.label, line.text)
        self.show_title(named_cards(device) if device else "")

    def _show_choices(self, question: Question) -> None:
        choices = self.part(Choices)
        offered = [question.choice(key) for key in _KEYS]
        choices.show_lines(
            [
                Content.assemble(
                    (f"{each.label:<14}", "$faint" if each.refusal else ""),
                    (visible(each.note, one_line=True), "$muted"),
                )
                for each in offered
            ]
        )
        if offered[choices.cursor].refusal:
            choices.cursor = _KEYS.index(SAVE)
        self._show_command()

    def on_choices_moved(self) -> None:
        self._show_command()

    @property
    def _key(self) -> str:
        return _KEYS[self.part(Choices).cursor]

    def _show_command(self) -> None:
        if self._question is None:
            return
        draft, path = self.app.draft, self._question.choice(SAVE).usual
        saved = self._step.saved
        if self._key == START or saved:
            self.show_command(["train", str(saved.path) if saved else path])
            return
        words = plan_command(draft)
        self.show_command([*words, "-o", path] if words and draft.own is None else [])

    @property
    def _step(self) -> ReviewStep:
        return self.app.wizard.review

    # --- keys

    def action_accept(self) -> None:
        if self._starting or self._question is None:
            return
        if self._key == SAVE:
            self._save()
            return
        self._starting = True
        self.say(STARTING.mark, STARTING.label, STARTING.text)
        self._start()

    def _save(self) -> None:
        try:
            self._step.take(SAVE, "")
        except UserError as error:
            self.show_problem(error, kept=_KEPT)
            return
        self.refresh_from_draft()

    @work(thread=True, exclusive=True)
    def _start(self) -> None:
        """In a thread: a trainer takes seconds until it holds its lock."""
        try:
            self._step.take(START, "")
        except UserError as error:
            self.app.call_from_thread(self._could_not_start, error)
        else:
            self.app.call_from_thread(self._started)

    def _could_not_start(self, error: UserError) -> None:
        self._starting = False
        self._show_verdict()
        self.show_problem(error, kept=_KEPT)

    def _started(self) -> None:
        self._starting = False
        assert isinstance(self._step.outcome, RunFolder)
        self.app.open_run(self._step.outcome, fresh=True)

    def action_name(self) -> None:
        self.part(Prompt).ask(NAME, "name of the run", self.app.draft.run_name())

    def on_prompt_answered(self, message: Prompt.Answered) -> None:
        self._step.take(NAME, message.text)
        self.refresh_from_draft()

    def action_edit(self) -> None:
        """The config in the person's own editor; what comes back counts as theirs."""
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
        if not editor:
            self.show_problem(
                UserError(
                    "There is no editor to open.",
                    "Neither VISUAL nor EDITOR is set.",
                    "Set one, such as EDITOR=nano, or save the file and change it elsewhere.",
                )
            )
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yml"
            path.write_text(self._step.edit_text(), "utf-8")
            try:
                with self.app.suspend():
                    subprocess.run([*shlex.split(editor), str(path)], check=False)
            except (OSError, ValueError, SuspendNotSupported) as error:
                self.show_problem(
                    UserError(
                        f"The editor {editor} could not be opened.",
                        f"The system says: {error}.",
                        "Correct EDITOR, or save the file and change it elsewhere.",
                    )
                )
                return
            text = path.read_text("utf-8")
        self.take_text(text)

    def take_text(self, text: str) -> None:
        """Take an edited config over into the draft, or say what is wrong with it."""
        try:
            self._step.take(EDIT, text)
        except UserError as error:
            kept = "Your edits: e opens them again, with this above them."
            self.show_problem(error, kept=kept)
            return
        self.refresh_from_draft()


def _coloured(text: str) -> Content:
    """Keys and values as they are, the reasons behind them fainter."""
    lines = []
    for line in visible(text).splitlines():
        value, mark, reason = line.partition("  #")
        if line.startswith("#"):
            lines.append(Content.styled(line, "$muted"))
        else:
            lines.append(Content.assemble(value, (mark + reason, "$muted")))
    return Content("\n").join(lines)

"""The last page: the very file that is run, and what to do with it.

It starts nothing by itself: `engine.wizard.start` does.
"""

import os
import shlex
import subprocess
import tempfile
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final

from textual import work
from textual.app import ComposeResult, SuspendNotSupported
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import Input, Static

from engine.errors import UserError
from engine.runs import RunFolder
from engine.units import gib
from engine.visible import visible
from engine.wizard.commands import plan_command
from engine.wizard.reading import Read
from engine.wizard.review import EDIT, ReviewStep
from engine.wizard.start import free_config_path, save_config, start_run, why_not
from tui.page import Key, Page
from tui.widgets.choices import Choices
from tui.widgets.pane import Pane

_START: Final = 0
_SAVE: Final = 1


class NameField(Input):
    """The run's name; Escape leaves it as it was."""

    DEFAULT_CSS = "NameField { height: 1; border: none; padding: 0 1; background: $surface; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "screen.keep_name", "leave the field", show=False)
    ]


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
    ReviewPage NameField { display: none; }
    ReviewPage NameField.-open { display: block; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._refused: UserError | None = None
        self._starting = False

    def compose_body(self) -> ComposeResult:
        with Pane(title="config.yml", id="config", can_focus=True):
            yield Static(id="text", markup=False)
        yield NameField(placeholder="name of the run")
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
        self._refused = why_not(draft)
        pane = self.query_one("#config", Pane)
        pane.show_subtitle(visible(draft.run_name(), one_line=True))
        self.query_one("#text", Static).update(_coloured(text))
        self._show_choices()
        self._say()

    def _say(self) -> None:
        draft = self.app.draft
        needs = draft.advice().estimate
        over = "" if needs.verdict == "fits" else f"{needs.verdict}: "
        amounts = f"{over}{gib(needs.device_bytes)} of {gib(needs.can_give_bytes)}"
        if draft.uncounted:
            amounts += f"{'' if draft.statistics else ' for full rows'}; {draft.uncounted}"
        else:
            amounts += f", up to {gib(needs.disk_bytes)} written"
        device = draft.device
        if self._refused is None:
            self.say("✓", "ready to start", amounts)
        elif device and device.planned:
            self.say("·", "ready to save", f"{amounts}; {device.name} is planned, not here")
        else:
            self.say("✗", "cannot start", self._refused.what)
        self.show_title(device.name if device else "")

    def _show_choices(self) -> None:
        device = self.app.draft.device
        place = visible(device.name, one_line=True) if device else ""
        start = Content.assemble(
            f"{'start now':<14}", (f"on {place}; goes on if this window closes", "$muted")
        )
        if self._refused:
            why = visible(f"{self._refused.what} {self._refused.fix}", one_line=True)
            start = Content.assemble((f"{'start now':<14}", "$faint"), (why, "$muted"))
        where = visible(str(free_config_path(self.app.draft)), one_line=True)
        save = Content.assemble(f"{'save only':<14}", (f"{where}, to run it headless", "$muted"))
        choices = self.part(Choices)
        choices.show_lines([start, save])
        if self._refused and choices.cursor == _START:
            choices.cursor = _SAVE
        self._show_command()

    def on_choices_moved(self) -> None:
        self._show_command()

    def _show_command(self) -> None:
        draft = self.app.draft
        path = str(free_config_path(draft))
        if self.part(Choices).cursor == _START:
            self.show_command(["train", path])
            return
        words = plan_command(draft)
        self.show_command([*words, "-o", path] if words and draft.own is None else [])

    # --- keys

    def action_accept(self) -> None:
        if self._starting:
            return
        if self.part(Choices).cursor == _SAVE:
            self._save()
        elif self._refused:
            self.show_problem(self._refused, kept="All answers stay as they are.")
        else:
            self._starting = True
            self.say("▶", "starting", "the trainer loads its libraries, which takes some seconds")
            self._start()

    def _save(self) -> None:
        try:
            path = save_config(self.app.draft, free_config_path(self.app.draft))
        except UserError as error:
            self.show_problem(error, kept="All answers stay as they are.")
            return
        where = shlex.quote(str(path))
        self.say("✓", "saved", f"{path}; run it with: windtunnel train {where}")
        self.show_command(["train", str(path)])

    @work(thread=True, exclusive=True)
    def _start(self) -> None:
        """Apart from the screen: a trainer takes seconds until it holds its lock."""
        try:
            run = start_run(self.app.draft)
        except UserError as error:
            self.app.call_from_thread(self._could_not_start, error)
        else:
            self.app.call_from_thread(self._started, run)

    def _could_not_start(self, error: UserError) -> None:
        self._starting = False
        self._say()
        self.show_problem(error, kept="All answers stay as they are.")

    def _started(self, run: RunFolder) -> None:
        self._starting = False
        self.app.open_run(run, fresh=True)

    def action_name(self) -> None:
        field = self.part(NameField)
        field.value = self.app.draft.run_name()
        field.add_class("-open")
        field.focus()

    def action_keep_name(self) -> None:
        self.part(NameField).remove_class("-open")
        self.part(Choices).focus()

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        self.app.draft.name = message.value.strip() or None
        self.action_keep_name()
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

    @cached_property
    def _step(self) -> ReviewStep:
        return ReviewStep(self.app.draft, Read())


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

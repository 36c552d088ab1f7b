"""`windtunnel new`: the wizard's questions one after another in the terminal, without a screen.

Arrows choose and the reason of what they point at stands below; Escape goes back, ctrl+c leaves.
What was answered stays above, as in any other command's output.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import questionary
from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter
from prompt_toolkit.formatted_text import (
    AnyFormattedText,
    StyleAndTextTuples,
    to_formatted_text,
)
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
from prompt_toolkit.styles import Style
from questionary.prompts.common import InquirerControl
from rich.console import Console
from rich.text import Text

from engine.errors import UserError
from engine.report import Line
from engine.report.plan import Role, bar_parts, legend, stretches
from engine.runs import RunFolder
from engine.visible import fold, visible
from engine.wizard.draft import Draft
from engine.wizard.flow import Wizard, perform
from engine.wizard.question import Choice, Confirm, Question
from tui.line import to_ascii
from tui.plain import Dialogue, Leave, follow_run

_STYLE: Final = Style.from_dict(
    {
        "qmark": "#ff8205 bold",
        "question": "bold",
        "pointer": "#ff8205 bold",
        "highlighted": "#ffd84d bold",
        "answer": "#ffd84d",
        "note": "#9aa5b1",
        "instruction": "#9aa5b1",
        "disabled": "#9aa5b1 italic",
    }
)
_MARK_STYLES: Final = {"✓": "green", "!": "yellow", "✗": "bold red", "?": "yellow"}
_BAR_STYLES: Final[dict[Role, str]] = {
    "weights": "#ff8205",
    "trainable": "#ffa02e",
    "activations": "#ffc04f",
    "process": "dim",
    "spare": "green",
    "over": "bold red",
    "kept": "dim",
}
_LEARNED_STYLES: Final = {"+ ": "#ffd84d", "- ": "dim"}
"""Of a previewed row's lines: the same marks as in `windtunnel preview`, and colour beside them."""
_MOST_CELLS: Final = 100
_HOW: Final = "(arrows choose, enter takes it, esc goes back, ctrl+c leaves)"
_TYPE: Final = "(esc goes back)"
_DESCRIPTION: Final = "  Description: "
_INDENT: Final = "   "
_ESCAPE_SECONDS: Final = 0.1


class _Back:
    """What a question gives where the person goes to the one before."""


_BACK: Final = _Back()


def run_inline(draft: Draft, dialogue: Dialogue, *, out: Path | None = None) -> None:
    """Ask for a new config, write it, and follow the run where one is started.

    Raises UserError for a run that failed, KeyboardInterrupt at ctrl+c.
    """
    wizard = Wizard(draft, new=True, out=out)
    Inline(wizard, Console(highlight=False), ascii_only=dialogue.ascii_only).run()
    if isinstance(wizard.review.outcome, RunFolder):
        try:
            follow_run(wizard.review.outcome, dialogue)
        except Leave as left:
            dialogue.say(str(left))


class Inline:
    """Asks the steps of a wizard with questionary and prints what they say with rich."""

    def __init__(self, wizard: Wizard, console: Console, *, ascii_only: bool = False) -> None:
        self._wizard = wizard
        self._console = console
        self._drawn: Callable[[str], str] = to_ascii if ascii_only else str
        self._spinner = "line" if ascii_only else "dots"

    def run(self) -> None:
        """Ask until the wizard has its last answer. Raises KeyboardInterrupt at ctrl+c."""
        over = False
        while not over:
            try:
                self._work()
                over = self._ask()
            except UserError as error:
                self._refuse(error)
                self._wizard.back()

    def _work(self) -> None:
        while work := self._wizard.work():
            waiting = visible(work.waiting, one_line=True)
            with self._console.status(waiting, spinner=self._spinner) as status:

                def show(done: str, status: Any = status) -> None:
                    status.update(visible(done, one_line=True))

                self._wizard.receive(work, perform(work, show))

    def show(self, question: Question) -> None:
        """What stands above the choices: the answer of the step, what to know, the memory bar."""
        place = f"{self._wizard.at + 1} of {len(self._wizard.steps)}  "
        self._console.print()
        self._print((place, "dim"), _line(question.headline))
        for fact in question.facts:
            for line in _one_a_row(fact):
                style = _LEARNED_STYLES.get(line.text[:2], "") if not line.mark else ""
                self._print(_line(line), style=style)
        if self._wizard.step is self._wizard.plan:
            self._draw_memory()

    def _ask(self) -> bool:
        question = self._wizard.question()
        self.show(question)
        choices = _choices(question, self._console.width, self._drawn)
        asked = questionary.select(
            self._wizard.step.title,
            choices,
            default=_first_allowed(choices, question.recommended),
            instruction=_HOW,
            pointer=self._drawn("❯"),
            style=_STYLE,
        )
        _say_reasons_plainly(asked)
        key = _answer(asked)
        if isinstance(key, _Back):
            self._wizard.back()
            return False
        return self._take(question.choice(key))

    def _take(self, choice: Choice) -> bool:
        while True:
            text = _typed(choice) if choice.asks else ""
            if isinstance(text, _Back):
                return False
            try:
                asked = self._wizard.confirm(choice.key, text)
                return (asked is None or self._agrees(asked)) and self._wizard.take(
                    choice.key, text
                )
            except UserError as error:
                self._refuse(error)
                if not choice.asks:
                    return False

    def _agrees(self, asked: Confirm) -> bool:
        self._print(visible(asked.text))
        return (
            _answer(
                questionary.confirm(
                    visible(asked.title, one_line=True),
                    default=asked.is_usual,
                    instruction=f"(y {asked.yes}, n {asked.no})",
                    style=_STYLE,
                )
            )
            is True
        )

    def _draw_memory(self) -> None:
        needs, device = self._wizard.draft.advice().estimate, self._wizard.draft.device
        assert device is not None
        cells = min(self._console.width, _MOST_CELLS)
        parts = bar_parts(needs, device)
        self._print(
            *(
                (text, _BAR_STYLES[part.role] if part else "bold")
                for part, text in stretches(parts, cells)
            )
        )
        named = [
            piece
            for part, text in legend(parts, cells)
            for piece in ((part.glyph, _BAR_STYLES[part.role]), f"{text}  ")
        ]
        self._print(*named)

    def _print(self, *parts: str | tuple[str, str] | Text, style: str = "") -> None:
        """One line; `to_ascii` keeps its length, and so the places of its styles."""
        text = Text.assemble(*parts)
        self._console.print(Text(self._drawn(text.plain), spans=text.spans), style=style)

    def _refuse(self, error: UserError) -> None:
        self._print(_line(Line("✗", "", error.what)))
        for part in (error.why, error.fix):
            self._print(f"  {visible(part, one_line=True)}")


def _one_a_row(line: Line) -> list[Line]:
    """A text of several lines, such as a config, as one line each."""
    first, *rest = line.text.split("\n")
    return [replace(line, text=first), *(Line("", "", text) for text in rest)]


def _line(line: Line) -> Text:
    mark = (f"{line.mark} ", _MARK_STYLES.get(line.mark, "")) if line.mark else ""
    name = visible(line.label, one_line=True)
    label = (f"{name}  " if line.text else name, "bold") if name else ""
    return Text.assemble(mark, label, visible(line.text, one_line=True))


def _first_allowed(choices: list[questionary.Choice], recommended: int) -> questionary.Choice:
    """The recommended choice, or the next one that may be taken: questionary stands on no other."""
    order = [*choices[recommended:], *choices[:recommended]]
    return next((each for each in order if not each.disabled), order[0])


def _choices(
    question: Question, columns: int, drawn: Callable[[str], str]
) -> list[questionary.Choice]:
    """The lines of the list: label, verdict and figures; the reason of the lit one stands below."""
    labels = [visible(each.label, one_line=True) for each in question.choices]
    verdicts = [
        f"{each.verdict.mark} {each.verdict.label}" if each.verdict else ""
        for each in question.choices
    ]
    label_cells, verdict_cells = max(map(len, labels)), max(map(len, verdicts))
    found = []
    for choice, label, verdict in zip(question.choices, labels, verdicts, strict=True):
        title = [("class:text", f"{label:<{label_cells}}  ")]
        title += [("class:text", f"{verdict:<{verdict_cells}}  ")] if verdict_cells else []
        note = visible(choice.note, one_line=True)
        title.append(("class:note", note))
        below = visible(choice.reason).splitlines()
        if sum(len(text) for _, text in title) + len(_INDENT) > columns:
            below.insert(0, note)  # the list cuts it at the edge
        reason = [part for line in below for part in fold(line, columns - len(_INDENT))]
        found.append(
            questionary.Choice(
                [(style, drawn(text)) for style, text in title],
                value=choice.key,
                disabled=drawn(visible(choice.refusal, one_line=True)) or None,
                description=drawn(f"\n{_INDENT}".join(reason)) or None,
            )
        )
    return found


def _say_reasons_plainly(asked: questionary.Question) -> None:
    """questionary writes `Description: ` before the reason of what is pointed at."""
    for control in asked.application.layout.find_all_controls():
        if isinstance(control, InquirerControl):
            control.text = partial(_reworded, control.text)


def _reworded(written: AnyFormattedText) -> StyleAndTextTuples:
    return [
        ("class:note", _INDENT + text.removeprefix(_DESCRIPTION))
        if text.startswith(_DESCRIPTION)
        else (style, text)
        for style, text, *_ in to_formatted_text(written)
    ]


def _typed(choice: Choice) -> str | _Back:
    """What is typed for a choice that asks for a text; Enter alone is what is usual there."""
    asked = questionary.text(
        visible(choice.asks, one_line=True),
        default=choice.usual,
        completer=_completer(choice),
        instruction=_TYPE,
        style=_STYLE,
    )
    text: str | _Back = _answer(asked)
    return text


def _completer(choice: Choice) -> Completer | None:
    match choice.completes:
        case "path":
            return PathCompleter(expanduser=True)
        case "gpu":
            from engine.hardware import listed_gpus

            return WordCompleter(
                [gpu.name for gpu in listed_gpus()], sentence=True, ignore_case=True
            )
        case "model":
            return PathCompleter(expanduser=True, only_directories=True)
        case _:
            return None


def _answer(question: questionary.Question) -> Any:
    """Ask; Escape gives _BACK. Raises KeyboardInterrupt at ctrl+c."""
    keys = KeyBindings()

    @keys.add("escape", eager=True)
    def _back(event: KeyPressEvent) -> None:
        event.app.exit(result=_BACK)

    application = question.application
    application.key_bindings = merge_key_bindings([application.key_bindings or KeyBindings(), keys])
    # Escape is the beginning of an arrow's sequence, too: those come within milliseconds.
    application.ttimeoutlen = application.timeoutlen = _ESCAPE_SECONDS
    return question.unsafe_ask()

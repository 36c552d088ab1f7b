"""The wizard without a screen: the same six questions as numbered lines, over the same draft.

For `--plain`, a dumb terminal and a screen reader: it uses neither cursor movement nor colour.
Whatever it writes is made safe for a terminal here, once for all questions.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

from engine.errors import UserError
from engine.interrupt import wait_for_line
from engine.report import Line
from engine.report.run import SpacedLines, require_end, state_lines, way_back
from engine.runs import RunFolder, follow, status
from engine.visible import fold, visible
from engine.wizard.draft import Draft
from engine.wizard.flow import Wizard, live_runs, perform
from engine.wizard.question import Choice, Confirm, Step

BACK, LEAVE, EXPLAIN = "b", "q", "?"


class Back(Exception):
    """The person goes to the question before; carries no message because nobody reads one."""


class Leave(Exception):
    """The person leaves; carries the line to part with."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One numbered answer, and what `?` says of it."""

    label: str
    explanation: str = ""
    key: str = ""
    """Takes it too."""


def read_line(prompt: str) -> str:
    """As `input` at a terminal, only that ctrl+c right after the prompt is not lost."""
    print(prompt, end="", flush=True)
    wait_for_line(sys.stdin)
    return input()


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Where lines go and where answers come from."""

    read: Callable[[str], str] = read_line
    write: Callable[[str], None] = print
    ascii_only: bool = False

    def say(self, *lines: str) -> None:
        """Each line, made safe and folded to the terminal."""
        drawn: Callable[[str], str] = str
        if self.ascii_only:
            from tui.line import to_ascii as drawn
        columns = shutil.get_terminal_size().columns if os.isatty(1) else None
        for line in lines:
            for part in fold(visible(line, one_line=True), columns):
                self.write(drawn(part))

    def refuse(self, error: UserError) -> None:
        self.say(*(f"  {part}" for part in (error.what, error.why, error.fix) if part))

    def answer(self, prompt: str = "> ") -> str:
        """One line without the blanks around it. Raises Back, and Leave for q and ctrl+d."""
        while True:
            try:
                text = self.read(visible(prompt, one_line=True)).strip()
                text.encode()
                if "\0" in text:
                    raise UnicodeError
            except EOFError:
                self.write("")
                raise Leave("The answers ended (ctrl+d). No run was started.") from None
            except UnicodeError:
                self.say("  That is no text. Type it again.")
                continue
            if text == BACK:
                raise Back
            if text == LEAVE:
                raise Leave("Left. No run was started.")
            return text

    def choose(
        self,
        answers: Sequence[Answer],
        marked: int = 0,
        before: Collection[str] = (),
        *,
        typed: bool = False,
    ) -> int | str:
        """The index of the chosen answer; Enter takes the marked one. Raises as `answer`.

        Lines that are in `before` are not said again. Where other text is an answer too, `typed`,
        that is given.
        """
        self.say(*(line for line in numbered(answers, marked) if line not in before))
        while True:
            text = self.answer()
            explained = text.startswith(EXPLAIN)
            index = _index(text.removeprefix(EXPLAIN), answers, marked)
            if index is not None and explained:
                about = answers[index].explanation or answers[index].label
                self.say(*(f"  {line}" for line in about.split("\n")))
            elif index is not None:
                return index
            elif typed and not explained:
                return text
            else:
                self.say(
                    f"  {text} is no answer here: 1 to {len(answers)} chooses, Enter takes"
                    f" {marked + 1}, ? explains it, ? 2 explains 2."
                )


def numbered(answers: Sequence[Answer], marked: int) -> list[str]:
    """A line an answer, the one that Enter takes with a star."""
    return [
        f"  {'*' if number == marked + 1 else ' '} {number:>2}  {each.label}"
        for number, each in enumerate(answers, 1)
    ]


def stream_dialogue(*, ascii_only: bool) -> Dialogue:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Dialogue(ascii_only=ascii_only)


def _index(text: str, answers: Sequence[Answer], otherwise: int) -> int | None:
    """The place of an answer by its number or its key; None for any other text, `otherwise` for
    none."""
    text = text.strip()
    if not text:
        return otherwise
    # int() takes more than a number is here, such as 1_0.
    if text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= len(answers):
        return int(text) - 1
    return next((place for place, each in enumerate(answers) if each.key == text), None)


def ask(dialogue: Dialogue, step: Step) -> None:
    """Ask one step until it is answered. Lets Back and Leave through.

    What is asked again shows only the lines that have changed.
    """
    before: Collection[str] = ()
    while True:
        while work := step.work():
            dialogue.say(f"  {work.waiting}")
            step.receive(work, perform(work, lambda done: dialogue.say(f"  {done}")))
        question = step.question()
        about = (question.headline, *question.facts)
        lines = [f"  {each}" for line in about for each in str(line).splitlines()]
        dialogue.say(*(line for line in lines if line not in before))
        answers = [_answer(choice) for choice in question.choices]
        try:
            typed = bool(question.typed)
            answer = dialogue.choose(answers, question.recommended, before, typed=typed)
            text = answer if isinstance(answer, str) else ""
            choice = question.choice(question.typed) if text else question.choices[int(answer)]
            if take(dialogue, step, choice, text):
                return
        except Back:
            if not step.back():
                raise
        before = {*lines, *numbered(answers, question.recommended)}


def take(dialogue: Dialogue, step: Step, choice: Choice, typed: str = "") -> bool:
    """Take an answer, its text typed where it asks for one; whether the step is answered."""
    while True:
        text = typed
        try:
            if choice.asks and not typed:
                text = dialogue.answer(f"  {choice.asks}: ") or choice.usual
            asked = step.confirm(choice.key, text)
            if asked and not agrees(dialogue, asked):
                return False
            return step.take(choice.key, text)
        except Back:
            return False
        except UserError as error:
            dialogue.refuse(error)
            if typed or not choice.asks:
                return False


def agrees(dialogue: Dialogue, asked: Confirm) -> bool:
    """Ask again; whether the person agrees."""
    dialogue.say(f"  {asked.title} {asked.text}")
    answers = [Answer(f"yes: {asked.yes}"), Answer(f"no: {asked.no}")]
    return dialogue.choose(answers, int(not asked.is_usual)) == 0


def _answer(choice: Choice) -> Answer:
    verdict = choice.verdict or Line("", "", "")
    beside = ", ".join(filter(None, (f"{verdict.mark} {verdict.label}".strip(), choice.note)))
    label = f"{choice.label}: {beside}" if beside else choice.label
    return Answer(label, choice.reason or beside, choice.key)


def follow_run(
    run: RunFolder, dialogue: Dialogue, clock: Callable[[], float] = time.monotonic
) -> None:
    """The run in lines to its end or until ctrl+c.

    Raises Leave at ctrl+c, and the sentence of a run that failed (exit status 1).
    """
    name = visible(run.name, one_line=True)
    dialogue.say(f"Started {name}. ctrl+c leaves it running; back to it: windtunnel watch {name}")
    lines, last = SpacedLines(clock), None
    try:
        for recorded in follow(run):
            last = recorded.event
            if line := lines.line(last):
                dialogue.say(str(line))
    except KeyboardInterrupt:
        raise Leave(f"{name} is {way_back(run, status(run)) or 'done'}") from None
    require_end(run, last)
    dialogue.say(*map(str, state_lines(run)))


def run_plain(
    draft: Draft,
    dialogue: Dialogue,
    *,
    home: Path | None = None,
    new: bool = False,
    out: Path | None = None,
) -> None:
    """Ask the questions, then start the run and follow it, or save the config.

    A draft of an opened config is asked at Review; `new` and `out` are ReviewStep's. Raises
    UserError for a run that failed.
    """
    wizard = Wizard(draft, home=home, new=new, out=out)
    dialogue.say(
        "Windtunnel. Enter takes the answer marked *, a number chooses, ? explains,"
        " b goes back, q leaves.",
        *(str(line) for line in live_runs(home)),
    )
    try:
        while (outcome := wizard.review.outcome) is None:
            _ask_step(wizard, dialogue)
        if isinstance(outcome, RunFolder):
            follow_run(outcome, dialogue)
        elif not new:  # who asks for a new config has read it
            dialogue.say(*(f"  {line}" for line in outcome.lines()))
    except Leave as left:
        dialogue.say(str(left))


def _ask_step(wizard: Wizard, dialogue: Dialogue) -> None:
    place, of = wizard.at + 1, len(wizard.steps)
    dialogue.say("", f"{place} of {of}  {wizard.step.title}")
    try:
        ask(dialogue, wizard.step)
        wizard.forward()
    except Back:
        wizard.back()
    except UserError as error:
        dialogue.refuse(error)
        wizard.back()

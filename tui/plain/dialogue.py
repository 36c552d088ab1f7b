"""One question after another on plain lines: what is written, what is read, what an answer means.

It uses neither cursor movement nor colour, so that it works on a dumb terminal and with a screen
reader. Whatever it writes is made safe for a terminal here, once for all questions.
"""

import os
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from io import TextIOWrapper

from engine.errors import UserError
from engine.interrupt import wait_for_line
from engine.visible import fold, visible

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
        columns = shutil.get_terminal_size().columns if os.isatty(1) else None
        for line in lines:
            for part in fold(visible(line, one_line=True), columns):
                self.write(_in_ascii(part) if self.ascii_only else part)

    def refuse(self, error: UserError) -> None:
        """What, why and what to do, a line each."""
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
    """A dialogue over the standard streams; what the terminal's encoding lacks becomes `?`."""
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


def _in_ascii(text: str) -> str:
    from tui.line import to_ascii

    return to_ascii(text)

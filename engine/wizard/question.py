"""What a person is asked and what is worked out before, as values for any printer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from engine.errors import UserError
from engine.report import Line

Progress: TypeAlias = Callable[[str], object]
"""Gets what is done so far, in words."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer. Where `asks` is not empty, a text is typed once it is chosen."""

    key: str
    """Names it for `take`; the same however often the question is asked."""
    label: str
    note: str = ""
    """Beside the label: its figures, or what it is good for."""
    verdict: Line | None = None
    """What it comes to, where that is judged."""
    reason: str = ""
    """Why this one, or why not, in whole sentences; a line each."""
    refusal: str = ""
    """Why it cannot be taken; empty where it can."""
    asks: str = ""
    """The prompt for what is typed."""
    completes: Literal["path", "model", "gpu", ""] = ""
    """What the text that is typed names."""
    usual: str = ""
    """The text that Enter alone stands for."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked now. `recommended` is the place of the choice that Enter takes."""

    headline: Line
    choices: tuple[Choice, ...]
    recommended: int = 0
    facts: tuple[Line, ...] = ()
    """What to know before one chooses, the worst first."""
    typed: str = ""
    """The key of the choice that a text stands for which is typed at once; empty where none is."""

    def choice(self, key: str) -> Choice:
        """The choice of that key. Raises UserError where the question has none."""
        for choice in self.choices:
            if choice.key == key:
                return choice
        raise UserError(
            f"{key} is no answer here.",
            "The question has changed, or never had it.",
            f"Choose one of: {', '.join(choice.key for choice in self.choices)}.",
        )


@dataclass(frozen=True, slots=True)
class Confirm:
    """Asked again before an answer is taken. `yes` and `no` say what each does."""

    title: str
    text: str
    yes: str
    no: str
    is_usual: bool = True
    """Whether Enter means yes."""


@dataclass(frozen=True, slots=True)
class Work:
    """What takes longer than a key may. Two are the same where their names and keys are."""

    name: str
    key: tuple[object, ...]
    waiting: str = field(compare=False)
    """What is waited for, in words."""
    run: Callable[[Progress], object] = field(compare=False, repr=False)
    """Does it in this process; raises UserError where it cannot."""
    request: Any = field(default=None, compare=False, repr=False)
    """The same for `DataWorker.ask`, where rows are read; None where it is no such work."""


class Step(Protocol):
    """One of the six: state, and what an answer makes of it."""

    title: str

    def work(self) -> Work | None:
        """What has to be known before the question can be asked; None where all is."""

    def receive(self, work: Work, result: object) -> None:
        """Take in what `work` gave: its result, or the UserError that ended it."""

    def question(self) -> Question:
        """What is asked. Raises UserError where an answer of an earlier step is missing."""

    def confirm(self, key: str, text: str) -> Confirm | None:
        """What is asked again before `take`. Raises what `take` would of a wrong text."""
        return None

    def take(self, key: str, text: str) -> bool:
        """Write an answer into the draft; whether the step is answered with it.

        Raises UserError for one that cannot be taken, and leaves all as it was.
        """

    def back(self) -> bool:
        """Undo what was begun in this step; whether there was anything."""
        return False

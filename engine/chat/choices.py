"""Multiple choice: options that stand in a row beside the question, and which of them is right.

A set of questions with options says the right one by its index, its letter or its text. Learning
"2" or "B" without the options in sight teaches a guess; here they are listed after the question,
and the answer is the option itself.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Final

from engine.chat.conversation import RowProblem, describe
from engine.chat.written import parse_json

_NAME_KEYS: Final = ("label", "key", "id")
_LETTER: Final = re.compile(r"\(?([A-Za-z0-9])[).:]?\Z")


@dataclass(frozen=True, slots=True)
class Choices:
    """The options of a question; `names` are the row's own for them, else letters."""

    column: str
    texts: tuple[str, ...]
    names: tuple[str, ...]
    are_named: bool = False
    """Whether the row names them itself: a number is a name then, and counts nothing."""

    def list_after(self, question: str) -> str:
        """The question and, unless it holds them already, the options, one a line."""
        if all(text in question for text in self.texts):
            return question
        return f"{question}\n\n" + "\n".join(map(self.show, range(len(self.texts))))

    def show(self, index: int) -> str:
        """An option behind its name, as `B. Food increased.`"""
        name, text = self.names[index], self.texts[index]
        return text if re.match(rf"\(?{re.escape(name)}\s*[).:]", text) else f"{name}. {text}"

    def find(self, answer: object, column: str) -> int | None:
        """The index of the option that an answer names; None for an answer in words of its own.

        Raises RowProblem where it names none or could mean two of them.
        """
        written = str(answer).strip() if not isinstance(answer, bool) else ""
        letter = _LETTER.match(written)
        found = {i for i, text in enumerate(self.texts) if text.strip() == written}
        if letter is not None:
            found |= {i for i, name in enumerate(self.names) if name.upper() == letter[1].upper()}
        if not self.are_named and written.isdecimal() and int(written) < len(self.texts):
            found.add(int(written))
        if len(found) == 1:
            return found.pop()
        if isinstance(answer, str) and letter is None and written and not found:
            return None
        wrong = "could be two of the choices" if found else "is none of the choices"
        raise RowProblem(
            f"The {column} {wrong}.",
            f"It is {describe(answer)}, and {self.column} holds {len(self.texts)}, of which a"
            " number counts from 0 and a letter from A.",
            'Write the choices as {"text": ["Paris", "Rome"], "label": ["1", "2"]}, and the label'
            f" of the right one in {column}."
            if found
            else f"Write the right choice's own text in {column}, or name another column in"
            " field_answer.",
        )


def read_choices(column: str, value: object) -> Choices | None:
    """The options in a column's value: texts, texts by their letters, or texts and labels, also as
    JSON text; None where it holds something else."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = parse_json(value, column)
        except RowProblem:
            return None
    names: Sequence[object] = ()
    texts: object = value
    if isinstance(value, Mapping):
        if "text" in value:
            names, texts = value.get("label") or (), value["text"]
        else:
            names, texts = list(value), list(value.values())
            if not all(isinstance(name, str) and _LETTER.match(name) for name in names):
                return None
    elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        rows = [each for each in value if isinstance(each, Mapping)]
        key = next((key for key in _NAME_KEYS if key in rows[0]), "label")
        names, texts = [row.get(key) for row in rows], [row.get("text") for row in rows]
    if not isinstance(texts, list | tuple) or not 1 < len(texts) <= len(ascii_uppercase):
        return None
    if not all(isinstance(text, str) and text for text in texts):
        return None
    named = len(names) == len(texts) and all(isinstance(name, str) for name in names)
    letters = tuple(ascii_uppercase[: len(texts)])
    return Choices(column, tuple(texts), tuple(map(str, names)) if named else letters, named)

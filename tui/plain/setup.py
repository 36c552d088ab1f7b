"""What the later questions share, until each of them is asked by the wizard."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine.chat.tokenizer_file import tokenizer_name
from engine.errors import UserError
from engine.wizard.draft import Draft
from engine.wizard.flow import Wizard
from tui.plain.dialogue import Back, Dialogue

if TYPE_CHECKING:
    from engine.chat.tokenizer import ChatTokenizer
    from engine.data.statistics import Checkup


@dataclass(slots=True)
class Setup:
    """What the questions share: the draft, the person, and what was found in the rows."""

    draft: Draft
    dialogue: Dialogue
    wizard: Wizard
    home: Path | None = None
    """Folder that holds runs/, None for the usual one."""
    found: "Checkup | None" = None
    """Of the draft's datasets under the model's tokenizer and the switches."""
    _tokenizers: dict[str, "ChatTokenizer"] = field(default_factory=dict)

    def tokenizer(self) -> "ChatTokenizer":
        """Of the draft's model; opening one takes seconds, so each is kept.

        Raises UserError where it cannot be read.
        """
        from engine.chat.tokenizer import open_tokenizer

        name = tokenizer_name(self.draft.config())
        if name not in self._tokenizers:
            self.dialogue.say(f"  Opening the tokenizer of {name}.")
            self._tokenizers[name] = open_tokenizer(name, Path.cwd())
        return self._tokenizers[name]


def ask_text(dialogue: Dialogue, prompt: str, take: Callable[[str], None]) -> bool:
    """Ask until `take` accepts what was typed, or raises UserError; False where b was."""
    while True:
        try:
            take(dialogue.answer(prompt))
        except UserError as error:
            dialogue.refuse(error)
        except Back:
            return False
        else:
            return True

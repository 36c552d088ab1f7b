"""Facts become lines: one wording for every printer, and nothing is drawn here.

A module a subject: machine, data, plan and run. This package itself holds the line, so that the
first frame of the wizard waits for none of them; how a mark looks where there is no colour or no
letter for it is the printers' to say.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from engine.plan import Verdict

_SENTENCE_END: Final = re.compile(r"[.?!]( \([^()]*\))?\Z")
"""Also before a place in brackets."""

Mark = Literal["✓", "!", "✗", "·", "▶", "❚❚", "◌", "?", ""]
"""Good, with care, not possible, a remark; of a run: it works, holds, loads, is silent.

Empty for a line that judges nothing.
"""

VERDICT_MARKS: Final[Mapping["Verdict", Mark]] = {"fits": "✓", "tight": "!", "does not fit": "✗"}
SEVERITY_MARKS: Final[Mapping[str, Mark]] = {
    "error": "✗",
    "warning": "!",
    "note": "·",
    "info": "",
}
"""Of a problem of the machine and of a note in the events."""


@dataclass(frozen=True, slots=True)
class Line:
    """`✓ fits: needs 9.5 GiB`: the mark never stands without the word that it stands for.

    What strangers wrote is in it as it is: whoever prints makes it visible.
    """

    mark: Mark
    label: str
    """What is judged or where it stands, in a word or two: fits, step 60 of 99; may be empty."""
    text: str
    detail: str = ""
    """More for whoever has room: what a change costs, why a row is bad and how it is repaired."""

    def __str__(self) -> str:
        """All but the detail as plain text."""
        words = f"{self.label}: {self.text}" if self.label and self.text else self.label + self.text
        return f"{self.mark} {words}" if self.mark else words

    @property
    def whole(self) -> str:
        """The line with its detail."""
        gap = " " if _SENTENCE_END.search(self.text) else ", "
        return f"{self}{gap}{self.detail}" if self.detail else str(self)

"""Questions with a few answers each, one a line: the one taken is marked, the others beside it.

One widget for all lines, so that it is one stop of the tab key, and nothing in it is text to type:
letters stay actions of the page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message

from engine.wizard.switches import Switch
from tui.widgets.choices import Lines

_NAME_CELLS: Final = 13


class Switches(Lines):
    """Posts Turned when another answer is taken; whoever owns it shows the new state."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space,right,l", "turn(1)", "turn the switch", show=False),
        Binding("left,h", "turn(-1)", "turn it back", show=False),
    ]

    @dataclass
    class Turned(Message):
        """The person took `answer` for the question `name`."""

        name: str
        answer: str

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 (Textual's name)
        super().__init__(id=id)
        self._switches: Sequence[Switch] = ()

    @property
    def switches(self) -> Sequence[Switch]:
        return self._switches

    def show_switches(self, switches: Sequence[Switch]) -> None:
        self._switches = switches
        self.show_count(len(switches), self.cursor)

    def line(self, place: int, cursor: Content) -> Content:
        switch, here = self._switches[place], place == self.cursor and self.has_focus
        name = (f"{switch.name:<{_NAME_CELLS}}", "$lit" if here else "")
        return Content.assemble(cursor if self.has_focus else "  ", name, *self._answers(switch))

    def _answers(self, switch: Switch) -> list[tuple[str, str]]:
        if switch.locked:
            return [(f"- {switch.locked}", "$muted")]
        parts = []
        for number, answer in enumerate(switch.answers):
            chosen = number == switch.chosen
            parts.append(("(•) " if chosen else "( ) ", "$accent" if chosen else "$faint"))
            gap = "  " if number + 1 < len(switch.answers) else ""
            parts.append((f"{answer}{gap}", "$foreground" if chosen else "$muted"))
        return parts

    def action_turn(self, step: int) -> None:
        if not self._switches:
            return
        switch = self._switches[self.cursor]
        if not switch.locked and len(switch.answers) > 1:
            answer = switch.answers[(switch.chosen + step) % len(switch.answers)]
            self.post_message(self.Turned(switch.name, answer))

    def click(self) -> None:
        self.action_turn(1)

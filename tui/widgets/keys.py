"""The last two rows of a page: the command that does the same without a screen, and the keys."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from engine.visible import visible


@dataclass(frozen=True, slots=True)
class Key:
    """One hint of the bottom row."""

    key: str
    """As it is printed: enter, space, F1, n/p."""
    label: str
    priority: int = 0
    """Where there is no room, hints of a lower priority go first."""


HELP_KEY: Final = Key("F1", "help")
_KEPT: Final = frozenset({"enter", "esc", "escape", "f1"})
_GAP: Final = "   "


def fit_keys(keys: Sequence[Key], width: int) -> list[Key]:
    """The hints that fit into `width` cells, in their order.

    Hints are left out whole, those of a low priority first, among equals those nearest the middle
    of the row, unless they are short enough; enter, escape and F1 always stay.
    """
    middle = (len(keys) - 1) / 2
    places = range(len(keys))
    shown = {place for place in places if keys[place].key.lower() in _KEPT}
    for place in sorted(places, key=lambda at: (-keys[at].priority, -abs(at - middle), at)):
        tried = [keys[at] for at in sorted(shown | {place})]
        if _width(tried) <= width:
            shown.add(place)
    return [keys[place] for place in sorted(shown)]


def _width(keys: Sequence[Key]) -> int:
    return sum(len(key.key) + 1 + len(key.label) for key in keys) + len(_GAP) * (len(keys) - 1)


class KeyRow(Widget):
    """The page's keys; F1 is added to every page."""

    def __init__(self, keys: Sequence[Key]) -> None:
        super().__init__()
        self._keys: Sequence[Key] = keys

    @property
    def keys(self) -> Sequence[Key]:
        return self._keys

    def show_keys(self, keys: Sequence[Key]) -> None:
        self._keys = keys
        self.refresh()

    def render(self) -> RenderResult:
        keys = list(self._keys)
        if not any(key.key == HELP_KEY.key for key in keys):
            keys.append(HELP_KEY)
        parts = [
            Content.assemble((key.key, "bold $accent"), f" {key.label}")
            for key in fit_keys(keys, self.size.width)
        ]
        return Content(_GAP).join(parts)


class CommandLine(Widget):
    """`$ windtunnel ...`: the equivalent of what the page is about to do."""

    def __init__(self) -> None:
        super().__init__()
        self.command = ""
        """As it can be pasted into a shell; empty where nothing is equivalent."""

    def show_command(self, words: Sequence[str]) -> None:
        self.command = shlex.join(["windtunnel", *words]) if words else ""
        self.refresh()

    def render(self) -> RenderResult:
        if not self.command:
            return Content()
        return Content.assemble(("$ ", "$primary"), visible(self.command, one_line=True))

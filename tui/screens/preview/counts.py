"""How much is learned, of the row that is shown and of all rows, as a small table."""

from collections.abc import Mapping
from typing import Final

from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from engine.chat.render import LabelRule
from engine.report.data import learned_text
from engine.wizard.judging import GroupCount, count_groups

_NAME_CELLS: Final = 14
_STYLES: Final = {"thinking": "$think", "answers": "$answer", "tool calls": "$call"}

Counts = Mapping[int, int]
"""Tokens by stored kind."""


class LearnedCounts(Widget):
    """Two columns of counts; in a tall pane each group of tokens has a line."""

    def __init__(self) -> None:
        super().__init__()
        self._here: Counts = {}
        self._all: Counts | None = None
        self._heading = ""
        self._rule = LabelRule()

    def show_counts(
        self, here: Counts, everywhere: Counts | None, rule: LabelRule, heading: str
    ) -> None:
        """`everywhere` is None while the rows are still being counted."""
        self._here, self._all, self._rule, self._heading = here, everywhere, rule, heading
        self.refresh()

    def render(self) -> RenderResult:
        here = count_groups(self._here, self._rule)
        rest = None if self._all is None else count_groups(self._all, self._rule)
        heading = f"{'':<{_NAME_CELLS}}{'this row':>11}{self._heading:>14}"
        lines = [Content.styled(heading, "$muted")]
        tall = self.size.height > 8
        for learned in (True, False):
            name = "┃ learned" if learned else "┊ only read"
            style = "bold $lit" if learned else "$read"
            lines.append(_line(name, here, rest, list(here), learned, style))
            for group in here if tall else ():
                if _tokens(here, group, learned) or (rest and _tokens(rest, group, learned)):
                    mark = "┃" if learned else "┊"
                    style = _STYLES.get(group, "$lit") if learned else "$muted"
                    lines.append(_line(f"{mark}  {group}", here, rest, [group], learned, style))
        if tall and rest:
            lines += self._bar(rest)
        return Content("\n").join(lines)

    def _bar(self, rest: Mapping[str, GroupCount]) -> list[Content]:
        learned, total = _sum(rest, list(rest), True), _total(rest)
        if not total:
            return []
        width = self.size.width
        full = round(width * learned / total)
        return [
            Content(""),
            Content.assemble(("━" * full, "$primary"), ("┈" * (width - full), "$faint")),
            Content(learned_text(learned, total)),
        ]


def say_images(counts: Counts) -> str:
    """How many of the tokens are of images; empty where none is."""
    tokens = count_groups(counts, LabelRule())["images"].total
    return f"{tokens:,} are of images" if tokens else ""


def _line(
    name: str,
    here: Mapping[str, GroupCount],
    rest: Mapping[str, GroupCount] | None,
    groups: list[str],
    learned: bool,
    style: str,
) -> Content:
    text = f"{name:<{_NAME_CELLS}}{_cell(here, groups, learned, 6)}"
    text += _cell(rest, groups, learned, 9) if rest is not None else f"{'…':>9}"
    return Content.styled(text, style)


def _cell(found: Mapping[str, GroupCount], groups: list[str], learned: bool, width: int) -> str:
    tokens, total = _sum(found, groups, learned), _total(found)
    shown = f"{tokens:,}" if len(f"{tokens:,}") <= width else f"{tokens / 1e6:,.0f}M"
    share = f"{tokens / total:.0%}" if total else ""
    return f"{shown:>{width}}{share:>5}"


def _tokens(found: Mapping[str, GroupCount], group: str, learned: bool) -> int:
    count = found[group]
    return count.learned if learned else count.total - count.learned


def _sum(found: Mapping[str, GroupCount], groups: list[str], learned: bool) -> int:
    return sum(_tokens(found, group, learned) for group in groups)


def _total(found: Mapping[str, GroupCount]) -> int:
    return sum(count.total for count in found.values())

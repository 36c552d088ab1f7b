"""What stands beside the settings: the rungs that make a plan fit, and other GPUs for it.

Pure: from a draft to lines. The page shows them in panes where there is room, and over the settings
when asked for.
"""

from typing import Final

from textual.content import Content

from engine.plan import Alternative, Device, Estimate
from engine.report import VERDICT_MARKS
from engine.units import GIB
from engine.visible import fold
from engine.wizard.draft import Draft
from engine.wizard.plan import Card, faster_sentence
from tui.line import MARK_STYLES

_INDENT: Final = "    "


def roomy_lines(draft: Draft, columns: int) -> list[Content]:
    """What is said of a plan that fits: what the room that is left could be used for."""
    faster = faster_sentence(draft)
    more = fold(faster, columns) if faster else []
    return [Content("it fits as it is"), *map(Content, more)]


def rung_lines(rungs: tuple[Alternative, ...], columns: int | None = None) -> list[Content]:
    """One line a rung: what changes, what is then needed, and the cost.

    In `columns` the cost stands below, in lines of its own that are broken between words.
    """
    lines = []
    for rung in rungs:
        mark, style = _mark(rung.estimate)
        below = fold(rung.trade, columns and columns - len(_INDENT))
        cost = f"  {rung.trade}" if columns is None else "".join(f"\n{_INDENT}{x}" for x in below)
        lines.append(
            Content.assemble(
                f"{rung.name:<34}{rung.estimate.device_bytes / GIB:>6.1f} ",
                (mark, style),
                (cost, "$muted"),
            )
        )
    return lines


def card_lines(cards: list[Card], here: Device) -> list[Content]:
    """One line a card: what it can give, the verdict, what is left or missing."""
    lines = []
    for card in cards:
        mark, style = _mark(card.needs)
        spare = card.needs.spare_bytes / GIB
        name = f"{card.device.name:<24}"
        lines.append(
            Content.assemble(
                (name, "$lit" if card.device.name == here.name else ""),
                f"{card.device.can_give_bytes / GIB:>6.1f} ",
                (mark, style),
                (f"{spare:>+8.1f}", "$muted"),
            )
        )
    return lines


def _mark(needs: Estimate) -> tuple[str, str]:
    mark = VERDICT_MARKS[needs.verdict]
    return mark, MARK_STYLES[mark]

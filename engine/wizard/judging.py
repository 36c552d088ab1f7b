"""What a checkup means for the preview: one verdict, the rows to look at, tokens by group.

Pure functions of the worker's answer and the switches, so that turning one is answered at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from engine.chat.render import WITHHELD, Kind, LabelRule, count_learned
from engine.data.statistics import Checkup
from engine.report import Mark
from engine.units import counted

GROUPS: Final = {
    "thinking": (Kind.THINK,),
    "answers": (Kind.TEXT, Kind.EOS),
    "tool calls": (Kind.CALL,),
    "prompts": (Kind.BOS, Kind.SYSTEM, Kind.TOOLS, Kind.SETTINGS, Kind.USER),
    "tool results": (Kind.TOOL_RESULT,),
    "images": (Kind.IMAGE,),
}
"""The words of the count -> the kinds that they add up."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Mark, word and sentence; `stops` where going on would train nothing."""

    mark: Mark
    word: str
    text: str
    stops: bool = False


@dataclass(frozen=True, slots=True)
class OddRow:
    """A row to look at, and why."""

    number: int
    why: str


@dataclass(frozen=True, slots=True)
class GroupCount:
    """Tokens of one group: learned, and all."""

    learned: int
    total: int


def count_groups(kind_counts: Mapping[int, int], rule: LabelRule) -> dict[str, GroupCount]:
    """Each of GROUPS in a count of stored kinds."""
    found = {}
    for name, kinds in GROUPS.items():
        here = {kind: n for kind, n in kind_counts.items() if kind & ~WITHHELD in kinds}
        found[name] = GroupCount(count_learned(here, rule) if here else 0, sum(here.values()))
    return found


def judge(found: Checkup, rule: LabelRule, sequence_len: int, excess: str) -> Verdict:
    """The worst thing about the rows under these switches, or that all is well.

    `excess` is excess_length_strategy: what happens to rows longer than `sequence_len`.
    """
    if not found.usable:
        rows = counted(found.rows, "row")
        return Verdict("✗", "stop", f"none of {rows} can be used", stops=True)
    assert found.tokens is not None
    counts = found.tokens.kind_counts
    if not count_learned(counts, rule):
        if count_learned(counts, LabelRule(inputs=rule.inputs)):
            text = "no token is learned: every answer is only thinking; turn thinking on"
        else:
            text = "no token is learned in any row: all answers are kept out of the loss"
        return Verdict("✗", "stop", text, stops=True)
    for text in _complaints(found, rule, sequence_len, excess):
        return Verdict("!", "look", text)
    longest = found.tokens.row_length.max
    return Verdict(
        "✓",
        "good",
        f"every row learns something; longest {longest:,} of {sequence_len:,} tokens",
    )


def _complaints(found: Checkup, rule: LabelRule, sequence_len: int, excess: str) -> list[str]:
    assert found.tokens is not None
    assert found.odd is not None
    nothing = found.odd.learns_nothing_count
    nothing += 0 if rule.thinking else found.odd.only_thinking_count
    against = sum(f.rows for f in found.findings if f.id == _AGAINST_EFFORT)
    cut = sum(tokens > sequence_len for tokens in found.tokens.longest_rows)
    fate = {"truncate": "cut", "raise": "which the run refuses"}.get(excess, "left out")
    told = []
    if against:
        rows = counted(against, "row")
        told.append(f"effort is none over thinking in {rows}: space on reasoning")
    if nothing:
        told.append(f"nothing to learn in {counted(nothing, 'row')}, left out: w shows them")
    if cut:
        rows = counted(cut, "row")
        told.append(f"over {sequence_len:,} tokens in {rows}, {fate}: w shows them")
    if found.bad_rows:
        told.append(f"an error in {counted(found.bad_rows, 'row')}, left out: w shows them")
    return told


_AGAINST_EFFORT: Final = "effort_contradicts_thinking"
_SUPERLATIVES: Final = 3


def list_odd_rows(found: Checkup, rule: LabelRule, sequence_len: int) -> list[OddRow]:
    """Rows to look at in their order, each once with its first reason.

    Where there is no problem the longest and the least learned rows are still worth a look.
    """
    why: dict[int, str] = {}
    for group in found.groups:
        for number in group.rows:
            why.setdefault(number, f"cannot be used: {group.first.what}")
    assert found.tokens is not None
    assert found.odd is not None
    only_thinking = () if rule.thinking else found.odd.only_thinking
    for number in (*found.odd.learns_nothing, *only_thinking):
        why.setdefault(number, "learns nothing")
    longest = list(zip(found.odd.longest, found.tokens.longest_rows, strict=True))
    for number, tokens in longest:
        if tokens > sequence_len:
            why.setdefault(number, f"{tokens:,} tokens, over {sequence_len:,}")
    for finding in found.findings:
        if finding.id != "nothing_learned":
            for number in finding.numbers:
                why.setdefault(number, finding.text)
    for number, tokens in longest[:_SUPERLATIVES]:
        why.setdefault(number, f"among the longest: {tokens:,} tokens")
    for number, tokens, learned in found.odd.least_learned[:_SUPERLATIVES]:
        why.setdefault(number, f"among the least learned: {learned:,} of {tokens:,} tokens")
    return [OddRow(number, why[number]) for number in sorted(why)]

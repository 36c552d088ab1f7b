"""Which rows a person should look at: those that learn nothing, the longest, the least learned.

Fed one rendered row after another by `checkup`. Both answers to "learn thinking?" are kept, so
that turning that switch asks for no second pass.
"""

from array import array
from dataclasses import dataclass, field, replace

import numpy as np

from engine.chat.render import LabelRule, Rendered, learned

# As many as a person scrolls through; the counts beside the lists are whole.
_LISTED = 100
LISTED_LONGEST = 1000


@dataclass(frozen=True, slots=True)
class OddRows:
    """Numbers of rows, counted from 1 over all rows, bad ones too.

    `learns_nothing` are rows without a learned token; `only_thinking` those that join them once
    thinking is not learned. The first 100 of each are listed beside their count. `longest` are
    the 1,000 longest rows, longest first; `least_learned` holds (row, tokens, learned).
    """

    learns_nothing: tuple[int, ...]
    learns_nothing_count: int
    only_thinking: tuple[int, ...]
    only_thinking_count: int
    longest: tuple[int, ...]
    least_learned: tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class OddRowFinder:
    """Four numbers a row of all usable rows."""

    rule: LabelRule
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    with_thinking: "array[int]" = field(default_factory=lambda: array("q"))
    without_thinking: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, number: int, rendered: Rendered) -> None:
        self.numbers.append(number)
        self.lengths.append(len(rendered))
        for thinking, counts in ((True, self.with_thinking), (False, self.without_thinking)):
            flags = learned(rendered.kinds, replace(self.rule, thinking=thinking))
            counts.append(int(np.count_nonzero(flags)))

    def report(self) -> OddRows:
        numbers, lengths, always, answers = (
            np.array(values, dtype=np.int64)
            for values in (self.numbers, self.lengths, self.with_thinking, self.without_thinking)
        )
        nothing = numbers[always == 0]
        only_thinking = numbers[(answers == 0) & (always > 0)]
        longest = np.argsort(-lengths, kind="stable")[:LISTED_LONGEST]
        learned_here = always if self.rule.thinking else answers
        shares = learned_here / np.maximum(lengths, 1)
        least = np.argsort(np.where(learned_here > 0, shares, 1.0), kind="stable")[:_LISTED]
        return OddRows(
            tuple(nothing[:_LISTED].tolist()),
            len(nothing),
            tuple(only_thinking[:_LISTED].tolist()),
            len(only_thinking),
            tuple(numbers[longest].tolist()),
            tuple(
                zip(
                    *(values[least].tolist() for values in (numbers, lengths, learned_here)),
                    strict=True,
                )
            ),
        )

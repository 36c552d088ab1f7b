from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.chat.render import WITHHELD, Kind, LabelRule, Rendered
from engine.data.checkup import LISTED_LONGEST, OddRowFinder


def found_in(*rows: Sequence[int], thinking: bool = True):
    finder = OddRowFinder(LabelRule(thinking=thinking))
    for number, kinds in enumerate(rows, start=1):
        count = len(kinds)
        rendered = Rendered(
            np.zeros(count, np.uint32), np.array(kinds, np.uint8), np.zeros(count, np.int32)
        )
        finder.add(number, rendered)
    return finder.report()


def test_rows_that_learn_nothing_are_told_from_rows_that_only_think():
    odd = found_in([Kind.USER], [Kind.THINK], [Kind.TEXT], [Kind.TEXT | WITHHELD])
    assert (odd.learns_nothing, odd.learns_nothing_count) == ((1, 4), 2)
    assert (odd.only_thinking, odd.only_thinking_count) == ((2,), 1)


def test_both_answers_to_the_thinking_switch_are_known_whichever_was_asked():
    rows = ([Kind.THINK], [Kind.TEXT])
    assert found_in(*rows, thinking=False).only_thinking == (1,)
    assert found_in(*rows, thinking=True).only_thinking == (1,)


def test_the_longest_come_first_and_the_least_learned_have_learned_something():
    odd = found_in([Kind.TEXT], [Kind.USER] * 8 + [Kind.TEXT], [Kind.USER] * 3 + [Kind.TEXT])
    assert odd.longest == (2, 3, 1)
    assert odd.least_learned[0] == (2, 9, 1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_the_longest_are_sorted(lengths):
    odd = found_in(*([Kind.TEXT] * length for length in lengths))
    shown = [lengths[number - 1] for number in odd.longest]
    assert shown == sorted(lengths, reverse=True)[:LISTED_LONGEST]

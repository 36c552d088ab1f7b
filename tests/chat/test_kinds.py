"""Labels and truncation over arrays alone."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.chat.render import WITHHELD, Kind, LabelRule, Rendered, learned, truncate

WORDS = [
    *("bos", "system", "tools", "settings", "user", "image", "tool_result", "text"),
    *("think", "call", "eos"),
]


def rendered(*kinds: int) -> Rendered:
    ids = np.arange(len(kinds), dtype=np.uint32)
    return Rendered(ids, np.array(kinds, np.uint8), np.zeros(len(kinds), np.int32))


def test_kinds_are_the_words_of_the_contract_in_their_order() -> None:
    assert [kind.word for kind in Kind] == WORDS


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LabelRule(), "text think call eos"),
        (LabelRule(thinking=False), "text call eos"),
        (LabelRule(inputs=True), "system tools settings user tool_result text think call eos"),
    ],
)
def test_a_rule_learns_its_kinds_and_nothing_withheld(rule: LabelRule, expected: str) -> None:
    kinds = np.array(list(Kind), np.uint8)
    assert [kind.word for kind, kept in zip(Kind, learned(kinds, rule), strict=True) if kept] == (
        expected.split()
    )
    assert not learned(kinds | np.uint8(WITHHELD), rule).any()


USER_THEN_TEXT = (Kind.BOS, Kind.USER, Kind.TEXT, Kind.TEXT, Kind.EOS)


def test_a_row_within_the_limit_is_not_copied() -> None:
    row = rendered(*USER_THEN_TEXT)
    assert truncate(row, 5) is row


def test_the_tail_is_cut() -> None:
    cut = truncate(rendered(*USER_THEN_TEXT), 3)
    assert cut is not None
    assert cut.input_ids.tolist() == [0, 1, 2]
    assert len(cut.kinds) == len(cut.sources) == 3


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_nothing_remains_where_nothing_learned_remains(limit: int) -> None:
    assert truncate(rendered(*USER_THEN_TEXT), limit) is None


def test_what_remains_is_judged_by_the_rule() -> None:
    row = rendered(Kind.BOS, Kind.USER, Kind.THINK, Kind.TEXT)
    assert truncate(row, 3) is not None
    assert truncate(row, 3, LabelRule(thinking=False)) is None
    assert truncate(rendered(Kind.BOS, Kind.TEXT | WITHHELD), 2) is None


IMAGE_RUNS = (
    *(Kind.BOS, Kind.TEXT, *[Kind.IMAGE] * 4, Kind.USER),
    *(*[Kind.IMAGE | WITHHELD] * 3, Kind.EOS),
)


@given(limit=st.integers(0, len(IMAGE_RUNS) + 2))
def test_a_cut_never_leaves_a_part_of_an_image(limit: int) -> None:
    cut = truncate(rendered(*IMAGE_RUNS), limit)
    if cut is not None:
        assert len(cut) <= limit
        images = np.count_nonzero((cut.kinds & ~np.uint8(WITHHELD)) == Kind.IMAGE)
        assert images in (0, 4, 7)


def test_labels_need_no_tokenizer() -> None:
    """The trainer reads prepared arrays; mistral-common stays out of its start."""
    code = "import sys, engine.chat.render; print('mistral_common' in sys.modules)"
    run: Any = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"

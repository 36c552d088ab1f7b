import errno
import os
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.chat.conversation import Conversation
from engine.chat.render import WITHHELD, Kind, LabelRule, Rendered
from engine.data import prepared as module
from engine.data.arrays import ArrayWriter, Interval, block_of
from engine.data.checkup import Notebook
from engine.data.prepared import (
    ARRAYS,
    META,
    WINDOW_ROWS,
    LengthStrategy,
    Prepared,
    efficiency,
    pack,
    shuffle_order,
)
from engine.data.rows import RenderedRow
from engine.errors import UserError, WorkError
from engine.files import SUMS

U, T, H, E, I = Kind.USER, Kind.TEXT, Kind.THINK, Kind.EOS, Kind.IMAGE  # noqa: E741
RULE = LabelRule()


def make(folder, rows: list[list[int]], seeds: list[int] | None = None) -> Prepared:
    """Arrays of rows given by their kinds; rows with the same seed have the same ids."""
    writer = ArrayWriter(folder, Interval())
    for number, kinds in enumerate(rows, start=1):
        seed = number if seeds is None else seeds[number - 1]
        rendered = Rendered(
            np.arange(len(kinds), dtype=np.uint32) + 1000 * seed,
            np.array(kinds, dtype=np.uint8),
            np.zeros(len(kinds), dtype=np.int32),
        )
        row = RenderedRow(number, number, "f", 0, 0, None, Conversation(()), rendered)
        writer.add(block_of([row]))
    writer.finish("key")
    return Prepared(folder)


class TestLearnedLengths:
    @settings(deadline=None)  # a disk decides how long it takes
    @given(
        st.lists(
            st.lists(st.sampled_from([U, T, H, E, T | WITHHELD]), min_size=1, max_size=20),
            min_size=1,
            max_size=30,
        ),
        st.booleans(),
        st.integers(1, 40),
    )
    def test_they_are_the_same_in_pieces_of_any_size(self, tmp_path_factory, rows, thinking, piece):
        prepared = make(tmp_path_factory.mktemp("arrays"), rows)
        rule = LabelRule(thinking=thinking)
        expected = [sum(kind in (T, E) or (kind == H and thinking) for kind in row) for row in rows]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_SCAN_TOKENS", piece)
            assert prepared.learned_lengths(rule).tolist() == expected
        assert prepared.learned_tokens(rule) == sum(expected)

    def test_tokens_by_kind_count_withheld_ones_too(self, tmp_path):
        prepared = make(tmp_path / "a", [[U, T, E], [U, T | WITHHELD, E | WITHHELD]])
        assert prepared.tokens_by_kind() == {"user": 2, "text": 2, "eos": 2}
        assert prepared.learned_tokens(RULE) == 2


class TestSelect:
    ROWS: ClassVar[list[list[int]]] = [
        [U, T, E],
        [U, U, U, T, T, E],
        [U, U, U, U, U, T],
        [U, T | WITHHELD],
    ]

    def test_drop_leaves_out_long_rows_and_rows_that_teach_nothing(self, tmp_path):
        found = make(tmp_path / "a", self.ROWS).select(RULE, 5, "drop")
        assert (found.rows.tolist(), found.lengths.tolist()) == ([0], [3])
        assert (found.too_long, found.truncated, found.nothing_learned) == (2, 0, 1)

    def test_truncate_cuts_and_leaves_out_what_teaches_nothing_then(self, tmp_path):
        found = make(tmp_path / "a", self.ROWS).select(RULE, 5, "truncate")
        assert (found.rows.tolist(), found.lengths.tolist()) == ([0, 1], [3, 5])
        assert (found.too_long, found.truncated, found.nothing_learned) == (2, 1, 2)

    @settings(deadline=None)
    @given(
        rows=st.lists(
            st.lists(st.sampled_from([U, T, H, T | WITHHELD]), min_size=1, max_size=8),
            min_size=1,
            max_size=8,
        ),
        truncates=st.booleans(),
        thinking=st.booleans(),
    )
    def test_a_checkup_counts_what_is_left_out(self, tmp_path_factory, rows, truncates, thinking):
        rows = [[U, T, E], *rows]
        prepared, rule = make(tmp_path_factory.mktemp("arrays"), rows), LabelRule(thinking=thinking)
        notebook = Notebook(rule, limit=4, truncates=truncates)
        notebook.take(
            [
                RenderedRow(at, at, "f", 0, 0, None, Conversation(()), prepared.rendered(at))
                for at in range(len(rows))
            ]
        )
        strategy: LengthStrategy = "truncate" if truncates else "drop"
        selection = prepared.select(rule, 4, strategy)
        left = prepared.left_out(selection, strategy)
        assert notebook.report(True, 4).left_out == left
        assert left.count == len(rows) - len(selection.rows)

    def test_truncate_never_cuts_an_image(self, tmp_path):
        found = make(tmp_path / "a", [[U, T, I, I, I, T, E]]).select(RULE, 4, "truncate")
        assert found.lengths.tolist() == [2]

    def test_raise_names_the_longest_row(self, tmp_path):
        prepared = make(tmp_path / "a", self.ROWS)
        with pytest.raises(UserError, match="2 of 4 rows are longer") as caught:
            prepared.select(RULE, 5, "raise")
        assert "line 2 of f with 6 tokens" in caught.value.why
        assert len(prepared.select(RULE, 6, "raise").rows) == 3

    def test_a_switch_changes_the_selection_without_other_arrays(self, tmp_path):
        prepared = make(tmp_path / "a", [[U, H], [U, T]])
        assert len(prepared.select(RULE, 9).rows) == 2
        assert prepared.select(LabelRule(thinking=False), 9).rows.tolist() == [1]

    def test_nothing_left_is_refused(self, tmp_path):
        prepared = make(tmp_path / "a", [[U, H], [U, H, H]])
        with pytest.raises(UserError, match="turn train_on_thinking on"):
            prepared.select(LabelRule(thinking=False), 9)
        with pytest.raises(UserError, match="the longest row has 3 tokens"):
            prepared.select(RULE, 1)


class TestSplit:
    @pytest.fixture(scope="class")
    def hundred(self, tmp_path_factory) -> Prepared:
        """A hundred rows, of which the last twenty repeat the first twenty."""
        folder = tmp_path_factory.mktemp("split") / "a"
        return make(folder, [[U, T, E]] * 100, [n % 80 for n in range(100)])

    @given(st.floats(0.001, 0.999) | st.integers(2, 200), st.integers(0, 2**40))
    def test_no_row_is_lost_and_duplicates_stay_together(self, hundred, size, seed):
        train, validation = hundred.split(size, seed)
        assert sorted([*train, *validation]) == list(range(100))
        assert len(validation) >= 1
        assert len(train) >= 1
        assert not set(train % 80) & set(validation % 80)
        expected = size if size >= 2 else size * 100
        assert abs(len(validation) - min(max(1, expected), 99)) <= 1

    @given(st.integers(0, 2**40))
    def test_it_follows_from_content_and_seed(self, hundred, seed):
        first, second = (hundred.split(0.3, seed)[1].tolist() for _ in range(2))
        assert first == second

    def test_another_seed_gives_another_split(self, hundred):
        assert len({tuple(hundred.split(0.3, seed)[1]) for seed in range(10)}) == 10

    def test_the_order_of_the_rows_does_not_matter(self, tmp_path):
        forward = make(tmp_path / "a", [[U, T]] * 50, list(range(50)))
        backward = make(tmp_path / "b", [[U, T]] * 50, list(range(50))[::-1])
        held_out = {tuple(forward.ids(row)) for row in forward.split(0.2, 1)[1]}
        assert held_out == {tuple(backward.ids(row)) for row in backward.split(0.2, 1)[1]}

    def test_only_the_given_rows_are_split(self, hundred):
        train, validation = hundred.split(0.5, 1, np.arange(10))
        assert sorted([*train, *validation]) == list(range(10))

    def test_nothing_is_held_out_without_a_size_or_a_second_conversation(self, hundred, tmp_path):
        assert hundred.split(0, 1)[1].size == 0
        assert hundred.split(0.5, 1, np.array([3]))[1].size == 0
        assert hundred.split(0.5, 1, np.array([3, 83]))[1].size == 0

    def test_one_of_two_rows_is_held_out_even_for_a_tiny_share(self, hundred):
        assert hundred.split(0.001, 1, np.array([3, 4]))[1].size == 1


class TestLinkInto:
    @pytest.fixture
    def prepared(self, tmp_path) -> Prepared:
        return make(tmp_path / "store", [[U, T, E], [U, T]])

    def test_the_run_gets_links_and_reads_the_same(self, prepared, tmp_path):
        run = tmp_path / "run" / "data"
        for _ in range(2):
            prepared.link_into(run)
            assert {path.name for path in run.iterdir()} == {*ARRAYS, META, SUMS}
        for name in ARRAYS:
            assert (run / name).stat().st_ino == (prepared.folder / name).stat().st_ino
        assert Prepared(run).ids(1).tolist() == prepared.ids(1).tolist()

    def test_where_links_are_impossible_it_gets_copies(self, prepared, tmp_path, monkeypatch):
        def refuse(source, target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refuse)
        prepared.link_into(tmp_path / "run")
        assert (tmp_path / "run" / "ids").stat().st_ino != (prepared.folder / "ids").stat().st_ino
        assert Prepared(tmp_path / "run").ids(1).tolist() == prepared.ids(1).tolist()

    def test_a_full_disk_is_said_and_leaves_no_half_file(self, prepared, tmp_path, monkeypatch):
        def refuse(source, target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(module, "_link_or_copy", refuse)
        with pytest.raises(WorkError, match="No space left on device"):
            prepared.link_into(tmp_path / "run")
        assert list((tmp_path / "run").iterdir()) == []


CAPACITY = 512
lengths_of_rows = st.lists(st.integers(1, CAPACITY), max_size=400)


@given(lengths_of_rows, st.integers(0, 2**63), st.integers(0, 100))
def test_every_row_is_in_exactly_one_bin_and_no_bin_overflows(lengths, seed, epoch):
    bins = pack(lengths, CAPACITY, seed, epoch)
    rows = [row for members in bins for row in members.tolist()]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in members) <= CAPACITY for members in bins)


@given(lengths_of_rows, st.integers(0, 2**31), st.integers(0, 100))
def test_packing_follows_from_seed_and_epoch_alone(lengths, seed, epoch):
    first, second = (pack(lengths, CAPACITY, seed, epoch) for _ in range(2))
    assert [members.tolist() for members in first] == [members.tolist() for members in second]


@given(lengths_of_rows)
def test_no_two_bins_could_have_been_one(lengths):
    sums = sorted(sum(lengths[row] for row in members) for members in pack(lengths, CAPACITY, 1, 0))
    assert len(sums) < 2 or sums[0] + sums[1] > CAPACITY


def test_two_epochs_pack_differently():
    lengths = np.random.default_rng(0).integers(20, 400, 1000)
    assert [list(rows) for rows in pack(lengths, 1024, 7, 0)] != [
        list(rows) for rows in pack(lengths, 1024, 7, 1)
    ]


def test_conversations_of_usual_lengths_fill_99_percent_of_the_places():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.6, 0.7, 3 * WINDOW_ROWS), 8, 2048).astype(int)
    assert efficiency(pack(lengths, 2048, 1, 0), lengths, 2048) > 0.99


def test_nothing_packs_into_nothing():
    assert pack([], 100, 1, 0) == []
    assert efficiency([], [], 100) == 1.0


def test_a_row_longer_than_the_bin_is_refused():
    with pytest.raises(ValueError, match="101 tokens cannot enter a bin of 100"):
        pack([3, 101], 100, 1, 0)


@given(st.integers(0, 500), st.integers(0, 2**63), st.integers(0, 100))
def test_the_order_is_a_permutation(count, seed, epoch):
    assert sorted(shuffle_order(count, seed, epoch).tolist()) == list(range(count))


def test_the_order_is_the_same_on_every_machine_and_differs_by_seed_and_epoch():
    # The figures are part of the contract with runs that are resumed after an upgrade.
    assert shuffle_order(10, 42, 0).tolist() == [1, 9, 7, 0, 2, 8, 4, 6, 3, 5]
    orders = {tuple(shuffle_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25

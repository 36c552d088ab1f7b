"""Which rows a step holds: all of them once an epoch, in an order that can be made again."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from engine.catalog import read_architecture
from engine.chat.images import ImageSpec, pixels
from engine.chat.render import WITHHELD, Kind, LabelRule
from engine.config import RunConfig
from engine.data.prepared import StoredImage
from engine.errors import UserError
from engine.plan.trainer import refuse_unread
from engine.train.batches import (
    PAD,
    ImagePixels,
    Order,
    Rows,
    StepBatch,
    collate,
    deal,
    evaluation_micros,
    join,
    pad,
)
from engine.train.ranks import Ranks
from tests.support.pictured_rows import SPEC, Pictured, picture, seeing, stored, write_pictured
from tests.support.tiny import (
    MINISTRAL3,
    MakeRows,
    edit_config,
    row,
    settings,
    write_model,
    write_rows,
)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Forty rows of 6 to 45 tokens."""
    rows = [row(3, 1 + n, seed=n) for n in range(40)]
    return write_rows(tmp_path_factory.mktemp("rows") / "many", rows)


def walk(order: Order) -> list[tuple[int, ...]]:
    return [batch.rows for _, batch in order.steps(0)]


CUTS = {
    "one by one": {},
    "micro-batches": {"micro_batch_size": 3},
    "accumulated": {"micro_batch_size": 2, "gradient_accumulation_steps": 3},
    "packed": {"sample_packing": True, "sequence_len": 96},
    "packed, accumulated": {
        "sample_packing": True,
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 3,
    },
}


@pytest.mark.parametrize("keys", CUTS.values(), ids=CUTS)
class TestOrder:
    def test_every_row_comes_once_an_epoch(self, many: Rows, keys: dict[str, Any]) -> None:
        order = Order(many, settings(num_epochs=2, **keys))
        steps = walk(order)
        for start in (0, order.steps_per_epoch()):
            epoch = steps[start : start + order.steps_per_epoch()]
            assert sorted(r for rows in epoch for r in rows) == list(range(len(many)))
        assert len(steps) == order.total_steps == 2 * order.steps_per_epoch()

    def test_made_again_it_is_the_same(self, many: Rows, keys: dict[str, Any]) -> None:
        config = settings(num_epochs=2, **keys)
        assert walk(Order(many, config)) == walk(Order(many, config))

    def test_seed_and_epoch_change_the_order(self, many: Rows, keys: dict[str, Any]) -> None:
        order = Order(many, settings(num_epochs=2, **keys))
        steps, other = walk(order), walk(Order(many, settings(seed=6, num_epochs=2, **keys)))
        assert steps != other
        assert steps[: order.steps_per_epoch()] != steps[order.steps_per_epoch() :]

    def test_step_does_not_depend_on_earlier_ones(self, many: Rows, keys: dict[str, Any]) -> None:
        config = settings(num_epochs=3, **keys)
        steps = walk(Order(many, config))
        jumping = Order(many, config)
        for number in (len(steps), 1, len(steps) // 2, len(steps) // 2 + 1, len(steps), 2):
            assert jumping.step(number).rows == steps[number - 1]
            assert [b.rows for _, b in Order(many, config).steps(number)] == steps[number:]

    def test_the_epoch_counts_up_to_whole_ones(self, many: Rows, keys: dict[str, Any]) -> None:
        order = Order(many, settings(num_epochs=2, **keys))
        epochs = [batch.epoch for _, batch in order.steps(0)]
        assert epochs == sorted(epochs)
        assert epochs[0] == pytest.approx(1 / order.steps_per_epoch())
        assert (epochs[order.steps_per_epoch() - 1], epochs[-1]) == (1.0, 2.0)


class TestHowLong:
    @pytest.mark.parametrize(
        ("epochs", "steps"), [(0.001, 1), (0.25, 10), (1, 40), (1.1, 44), (1.5, 60), (2.26, 91)]
    )
    def test_part_of_an_epoch_is_part_of_steps(self, many: Rows, epochs: float, steps: int) -> None:
        order = Order(many, settings(num_epochs=epochs))
        whole = walk(Order(many, settings(num_epochs=3)))
        assert order.total_steps == steps
        assert walk(order) == whole[:steps]

    @pytest.mark.parametrize("epochs", [0.5, 1, 3])
    @pytest.mark.parametrize("steps", [1, 39, 40, 41, 95])
    def test_max_steps_overrides_num_epochs(self, many: Rows, epochs: float, steps: int) -> None:
        order = Order(many, settings(num_epochs=epochs, max_steps=steps))
        assert order.total_steps == steps
        assert walk(order) == walk(Order(many, settings(num_epochs=3)))[:steps]


class TestFingerprint:
    """A checkpoint fits only the order it was made in."""

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ({}, {"seed": 6}),
            ({}, {"sample_packing": True}),
            ({}, {"micro_batch_size": 2}),
            ({}, {"gradient_accumulation_steps": 2}),
            ({"sample_packing": True}, {"sample_packing": True, "sequence_len": 127}),
        ],
    )
    def test_changed_by(self, many: Rows, before: dict[str, Any], after: dict[str, Any]) -> None:
        left, right = (Order(many, settings(**keys)) for keys in (before, after))
        assert left.fingerprint() != right.fingerprint()

    @pytest.mark.parametrize(
        "keys",
        [
            {"learning_rate": 1e-3},
            {"num_epochs": 3},
            {"max_steps": 7},
            {"sequence_len": 127},
            {"lora_r": 4},
            {"eval_sample_packing": True},
            {"optimizer": "adamw_torch"},
            {"activation_offloading": True, "gradient_checkpointing": True},
        ],
        ids=str,
    )
    def test_it_does_not_change_with_anything_else(self, many: Rows, keys: dict[str, Any]) -> None:
        assert Order(many, settings(**keys)).fingerprint() == Order(many, settings()).fingerprint()

    @pytest.mark.parametrize("packs", [False, True])
    @pytest.mark.parametrize("product", [1, 4, 6, 12])
    def test_cut_of_a_step_changes_nothing(self, many: Rows, packs: bool, product: int) -> None:
        orders = [
            Order(
                many,
                settings(
                    micro_batch_size=size,
                    gradient_accumulation_steps=product // size,
                    sample_packing=packs,
                    sequence_len=96 if packs else 128,
                    num_epochs=2.5,
                ),
            )
            for size in range(1, product + 1)
            if product % size == 0
        ]
        steps = [walk(order) for order in orders]
        assert all(each == steps[0] for each in steps)
        assert len({order.fingerprint() for order in orders}) == 1

    def test_it_changes_with_the_rows_and_with_where_they_are_cut(self, many: Rows) -> None:
        rule = LabelRule()
        variants = [
            many,
            many.first(39),
            Rows(many.prepared, many.chosen[::-1].copy(), many.lengths[::-1].copy()),
            Rows(many.prepared, many.chosen, np.minimum(many.lengths, 30)),
            *(
                Rows(many.prepared, found.rows, found.lengths)
                for found in [many.prepared.select(rule, 40)]
            ),
        ]
        found = {Order(rows, settings()).fingerprint() for rows in variants}
        assert len(found) == len(variants)

    def test_equal_rows_have_it_wherever_they_lie(self, many: Rows, tmp_path: Path) -> None:
        copy = write_rows(tmp_path / "copy", [row(3, 1 + n, seed=n) for n in range(40)])
        assert Order(copy, settings()).fingerprint() == Order(many, settings()).fingerprint()


class TestCollate:
    def test_ids_labels_and_positions_of_two_packed_rows(self, make_rows: MakeRows) -> None:
        first = [(1, Kind.BOS), (30, Kind.USER), (31, Kind.TEXT), (2, Kind.EOS)]
        second = [(1, Kind.BOS), (40, Kind.USER), (41, Kind.THINK), (42, Kind.TEXT), (2, Kind.EOS)]
        rows = make_rows([first, second])
        micro = collate(rows, [[1, 0]], LabelRule(thinking=False))
        found = {name: tensor.tolist() for name, tensor in micro.tensors.items()}
        assert found == {
            "input_ids": [[1, 40, 41, 42, 2, 1, 30, 31, 2]],
            "labels": [[-100, -100, -100, 42, 2, -100, -100, 31, 2]],
            "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2, 3]],
        }
        assert (micro.rows, micro.tokens, micro.learned_tokens) == ((1, 0), 9, 4)

    def test_padding_is_never_learned(self, make_rows: MakeRows) -> None:
        rows = make_rows([row(1, 1, seed=1), row(1, 4, seed=2)])
        micro = collate(rows, [[0], [1]], LabelRule())
        assert micro.tensors["input_ids"][0, 4:].tolist() == [PAD] * 3
        assert micro.tensors["labels"][0, 4:].tolist() == [-100] * 3
        # Counting on from the row: a second zero would start another row.
        assert micro.tensors["position_ids"].tolist() == [list(range(7))] * 2
        assert micro.tokens == 4 + 7

    def test_a_message_that_the_row_withholds_is_not_learned(self, make_rows: MakeRows) -> None:
        held = [(1, Kind.BOS), (30, Kind.TEXT | WITHHELD), (31, Kind.TEXT), (2, Kind.EOS)]
        micro = collate(make_rows([held]), [[0]], LabelRule(inputs=True))  # type: ignore[list-item]
        assert micro.tensors["labels"].tolist() == [[-100, -100, 31, 2]]

    def test_a_row_that_is_cut_ends_where_it_is_cut(self, many: Rows) -> None:
        cut = Rows(many.prepared, many.chosen, np.minimum(many.lengths, 5))
        micro = collate(cut, [[7, 8]], LabelRule())
        assert micro.tokens == 10
        assert micro.tensors["position_ids"].tolist() == [[0, 1, 2, 3, 4] * 2]

    def test_prepared_rows_stay_as_they_are(self, many: Rows) -> None:
        before = many.ids(3).tolist()
        micro = collate(many, [[3]], LabelRule(inputs=True))
        micro.tensors["input_ids"].zero_()
        assert many.ids(3).tolist() == before


@examples(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 40),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 5),
    st.floats(0.05, 3),
    st.integers(0, 2**31),
)
def test_any_cut_loses_no_token(
    many: Rows, rows: int, packs: bool, micro: int, accumulated: int, epochs: float, seed: int
) -> None:
    chosen = many.first(rows)
    keys: dict[str, Any] = {"sample_packing": packs, "micro_batch_size": micro, "seed": seed}
    config = settings(gradient_accumulation_steps=accumulated, num_epochs=epochs, **keys)
    order = Order(chosen, config)
    seen = Counter(row for rows in walk(order) for row in rows)
    # Rows of finished epochs were seen that often, the others once more or not.
    assert set(seen.values()) <= {math.floor(epochs), math.floor(epochs) + 1, math.ceil(epochs)}
    for _, batch in order.steps(max(0, order.total_steps - 2)):
        assert batch.tokens == sum(int(chosen.lengths[row]) for row in batch.rows)
        assert len(batch.micros) <= accumulated
        assert all(len(m.tensors["input_ids"]) <= micro for m in batch.micros)


def of_ranks(rows: Rows, config: RunConfig, count: int, number: int) -> list[StepBatch]:
    """One optimizer step as each of `count` ranks has it."""
    ranks = [Ranks(rank, count) for rank in range(count)]
    return [Order(rows, config, each).step(number) for each in ranks]


class TestRanks:
    @given(st.lists(st.floats(1, 1e6), min_size=1, max_size=40), st.integers(1, 9))
    def test_each_batch_is_one_ranks_in_equal_rounds(self, costs: list[float], count: int) -> None:
        dealt, waiting = deal(costs, count)
        assert {len(own) for own in dealt} == {-(-len(costs) // count)}
        given = [number for own in dealt for number in own if number is not None]
        assert sorted(given) == list(range(len(costs)))
        assert 0.0 <= waiting < 1.0

    def test_the_most_alike_share_a_round(self) -> None:
        assert deal([1.0, 9.0, 2.0, 8.0], 2) == ([[1, 0], [3, 2]], 1 - 20 / 22)
        assert deal([5.0, 1.0, 4.0], 1) == ([[0, 1, 2]], 0.0)
        assert deal([5.0, 1.0, 4.0], 2)[0] == [[0, None], [2, 1]]

    @pytest.mark.parametrize("packs", [False, True])
    def test_configs_of_equal_product_learn_the_same_rows(self, many: Rows, packs: bool) -> None:
        def config(accumulated: int) -> RunConfig:
            return settings(sample_packing=packs, gradient_accumulation_steps=accumulated)

        alone = Order(many, config(8))
        whole = alone.step(1)
        for count in (2, 4, 8):
            shared = of_ranks(many, config(8 // count), count, 1)
            assert sorted(row for each in shared for row in each.rows) == sorted(whole.rows)
            for each in shared:
                assert each.tokens == whole.tokens
                assert each.learned_tokens == whole.learned_tokens
                assert each.passes == whole.passes
            order = Order(many, config(8 // count), Ranks(0, count))
            assert order.fingerprint() == alone.fingerprint()
            assert order.total_steps == alone.total_steps

    def test_a_rank_without_rows_takes_part_with_padding(self, many: Rows) -> None:
        first, second = of_ranks(many.first(3), settings(gradient_accumulation_steps=2), 2, 1)
        assert [len(micro.rows) for micro in first.micros + second.micros].count(0) == 1
        last = second.micros[-1] if not second.micros[-1].rows else first.micros[-1]
        assert (last.tokens, last.learned_tokens) == (0, 0)
        assert last.tensors["input_ids"].tolist() == [[PAD, PAD]]

    def test_every_rank_calls_the_tower_alike_and_decodes_its_own_images(self, mixed: Rows) -> None:
        shared = of_ranks(mixed, settings(gradient_accumulation_steps=2), 3, 1)
        calls = [[micro.tower_calls for micro in each.micros] for each in shared]
        assert calls == [[1, 1]] * 3, "the text and the padding beside the last image too"
        for own in shared:
            for micro in own.micros:
                images = sum(len(mixed.images(row)) for row in micro.rows)
                assert len(micro.tensors.get("image_sizes", ())) == images
                assert micro.tower_calls >= (images > 0)


class TestEvaluation:
    def test_ranks_share_the_rows(self, many: Rows) -> None:
        config = settings(micro_batch_size=3)
        shared = [list(evaluation_micros(many, config, Ranks(rank, 4))) for rank in range(4)]
        assert len({len(micros) for micros in shared}) == 1
        rows = [row for micros in shared for micro in micros for row in micro.rows]
        assert sorted(rows) == list(range(len(many)))

    @pytest.mark.parametrize("packs", [False, True])
    def test_every_row_is_scored_once(self, many: Rows, packs: bool) -> None:
        config = settings(eval_sample_packing=packs, micro_batch_size=3)
        micros = list(evaluation_micros(many, config))
        assert sorted(row for micro in micros for row in micro.rows) == list(range(len(many)))
        assert (len(micros[0].rows) > 3) is packs

    @pytest.mark.parametrize(
        ("training", "evaluation", "packs"),
        [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
    )
    def test_it_packs_as_the_config_says_else_as_training_does(
        self, many: Rows, training: bool, evaluation: bool | None, packs: bool
    ) -> None:
        config = settings(sample_packing=training, eval_sample_packing=evaluation)
        first = next(evaluation_micros(many, config))
        assert (len(first.rows) > 1) is packs


def test_a_row_is_named_by_file_and_line(many: Rows) -> None:
    assert many.place(7) == "rows.jsonl line 8"


def test_rows_that_are_left_out_are_named(make_rows: MakeRows) -> None:
    rows = make_rows([row(3, 2, n) for n in range(6)])
    assert rows.left_out_places() == ""
    one, many = (
        Rows(rows.prepared, np.array(kept), rows.lengths[kept]).left_out_places()
        for kept in ([0, 2, 3, 4, 5], [1])
    )
    assert one == "rows.jsonl line 2"
    assert many == "rows.jsonl line 1, rows.jsonl line 3, rows.jsonl line 4 and others"


IMAGES = [stored(picture(28 * (n + 1), 28, seed=n), n) for n in range(4)]
"""One, two, three and four tokens wide; a token is 28 x 28 pixels of three float32 numbers."""
TOKEN_BYTES = 28 * 28 * 3 * 4


class TestDecoding:
    def test_the_pixels_are_those_of_the_grid(self) -> None:
        for image in IMAGES:
            expected = pixels(image.content, image.rows, image.columns, SPEC)
            assert np.array_equal(ImagePixels(SPEC).read(image), expected)
            assert expected.shape == (3, 28, 28 * image.columns)

    @pytest.mark.parametrize("ahead", [[], IMAGES], ids=["read", "prefetched"])
    def test_an_image_is_decoded_once(self, ahead: list[StoredImage]) -> None:
        decoded = ImagePixels(SPEC)
        decoded.prefetch(ahead)
        first = [decoded.read(image) for image in IMAGES]
        assert all(decoded.read(i) is found for i, found in zip(IMAGES, first, strict=True))

    def test_the_least_recently_used_goes_when_there_is_no_room(self) -> None:
        decoded = ImagePixels(SPEC, cache_bytes=6 * TOKEN_BYTES)
        one, two = (decoded.read(image) for image in IMAGES[:2])
        assert decoded.read(IMAGES[0]) is one
        decoded.read(IMAGES[3])
        assert decoded.read(IMAGES[0]) is one
        again = decoded.read(IMAGES[1])
        assert again is not two
        assert np.array_equal(again, two)

    def test_an_image_beyond_all_room_is_decoded_all_the_same(self) -> None:
        decoded = ImagePixels(SPEC, cache_bytes=1)
        decoded.prefetch(IMAGES)
        assert decoded.read(IMAGES[3]).shape == (3, 28, 112)

    def test_a_damaged_image_is_a_sentence(self) -> None:
        broken = StoredImage(bytes(IMAGES[3].content)[:300], 1, 4, 9)
        with pytest.raises(UserError, match="image"):
            ImagePixels(SPEC).read(broken)


class TestJoin:
    def test_images_lie_behind_one_another_and_are_padded_with_zeros(self) -> None:
        chance = np.random.default_rng(1)
        flat, high = (chance.random((3, *size), np.float32) for size in ((28, 56), (56, 28)))
        found = join([flat, high])
        assert found["pixels"].shape == (2 * 3 * 28 * 56,)
        assert found["image_sizes"].tolist() == [[28, 56], [56, 28]]
        assert found["image_sizes"].dtype == torch.int64
        padded = pad(found["pixels"], found["image_sizes"].tolist())
        assert padded.shape == (2, 3, 56, 56)
        for place, image in zip(padded.numpy(), (flat, high), strict=True):
            own = place[:, : image.shape[1], : image.shape[2]]
            assert np.array_equal(own, image)
            assert place.sum() == pytest.approx(own.sum())

    def test_one_image_is_read_where_it_lies(self) -> None:
        found = join([np.ones((3, 28, 56), np.float32)])
        padded = pad(found["pixels"], found["image_sizes"].tolist())
        assert padded.shape == (1, 3, 28, 56)
        assert padded.data_ptr() == found["pixels"].data_ptr()

    def test_without_images_there_is_nothing(self) -> None:
        assert join([]) == {}


class TestRefusal:
    def refuse(self, folder: Path, config: dict[str, Any], **keys: object) -> None:
        rows = write_pictured(folder / "rows", [Pictured((picture(28, 28),))])
        model = write_model(folder / "model", config)
        if keys:
            edit_config(model, **keys)
        refuse_unread(read_architecture(model), rows.prepared.image_spec)

    def test_a_model_that_reads_its_images_is_taken(self, tmp_path: Path) -> None:
        self.refuse(tmp_path, seeing(MINISTRAL3))

    def test_a_text_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="this model reads none"):
            self.refuse(tmp_path, MINISTRAL3)

    @pytest.mark.parametrize("keys", [{"spatial_merge_size": 1}, {"image_token_index": 14}])
    def test_other_patch_sizes_are_refused(self, tmp_path: Path, keys: dict[str, object]) -> None:
        with pytest.raises(UserError, match="do not cut images alike"):
            self.refuse(tmp_path, seeing(MINISTRAL3), **keys)

    def test_images_beyond_the_towers_positions_are_refused(self, tmp_path: Path) -> None:
        assert SPEC.longest == 112
        with pytest.raises(UserError, match="up to 112 pixels") as error:
            self.refuse(tmp_path, seeing(MINISTRAL3, image_size=90))
        assert "image_size: 84" in error.value.fix

    def test_rows_without_images_are_taken_by_any_model(self, tmp_path: Path) -> None:
        rows = write_pictured(tmp_path / "rows", [Pictured(())])
        architecture = read_architecture(write_model(tmp_path / "m", MINISTRAL3))
        refuse_unread(architecture, rows.prepared.image_spec)


def test_a_spec_of_another_patch_makes_other_pixels() -> None:
    image = IMAGES[0]
    assert ImagePixels(ImageSpec(16, 112, 2)).read(image).shape == (3, 32, 32)

"""How the loss is computed is planned: what a chunk of logits takes, and how large it may be."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.config import RunConfig, require_supported
from engine.plan import Alternative, Device, changed, estimate, make_fit
from engine.plan.memory import moment_parts
from engine.plan.trainer import CHUNK_BYTES, PRICE, SMALLEST_CHUNK_BYTES, chunk_rows, names_cut_loss
from engine.train.loss import _ChunkedCrossEntropy
from engine.units import GIB
from tests.support.card_bytes import CardBytes, as_on_cuda
from tests.support.machines import at, card, config, cpu, sized

TOKENS = 2048
TRAINED_HEAD = {"lora_modules_to_save": ["lm_head", "embed_tokens"]}
KEYS: dict[str, Any] = {
    "sequence_len": TOKENS,
    "micro_batch_size": 2,
    "sample_packing": True,
    "gradient_checkpointing": True,
    "bf16": True,
}
SMALL = "ministral-3-3b"
START = config(
    **KEYS
    | {
        "adapter": "qlora",
        "sequence_len": 512,
        "micro_batch_size": 1,
        "optimizer": "paged_adamw_8bit",
        "peft_autocast_adapter_dtype": False,
        "gradient_accumulation_steps": 8,
        "lora_r": 64,
        "offload_embeddings": True,
        "activation_offloading": True,
        "layer_offloading": True,
    }
)
"""Everything that can be offloaded is: the head comes for the loss, beside the gradients."""


def planned(device: Device, **keys: Any) -> int:
    return estimate(config(**KEYS | keys), at(SMALL, device)).loss_chunk_bytes


def measured(dtype: torch.dtype, chunk_bytes: int, *, trained: bool) -> int:
    """What the loss of one sequence takes at its peak, by the trainer's own code without values."""
    vocabulary, width = 131_072, 3072
    counter = CardBytes()
    with as_on_cuda(TOKENS, 1), FakeTensorMode(allow_non_fake_inputs=True), counter:
        head = torch.empty(vocabulary, width, dtype=dtype, requires_grad=trained)
        hidden = torch.empty(TOKENS + 1, width, dtype=dtype, requires_grad=True)
        keep, targets = torch.arange(TOKENS), torch.zeros(TOKENS, dtype=torch.int64)
        before = counter.now
        states = hidden.index_select(0, keep)
        rows = chunk_rows(chunk_bytes, vocabulary)
        loss: Any = _ChunkedCrossEntropy.apply(states, head, targets, rows)
        del states
        loss.backward()
    return counter.peak - before


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES[0], SMALLEST_CHUNK_BYTES])
def test_a_chunk_takes_what_is_planned_for_it(chunk_bytes: int, bf16: bool, trained: bool) -> None:
    keys = KEYS | {"micro_batch_size": 1, "bf16": bf16} | (TRAINED_HEAD if trained else {})
    device = card("H200") if chunk_bytes == CHUNK_BYTES[0] else cpu()
    loss = moment_parts(config(**keys), at(SMALL, device), "loss")["loss"]
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert loss == pytest.approx(measured(dtype, chunk_bytes, trained=trained), rel=0.02)


def test_a_chunk_shrinks_before_a_plan_stops_to_fit() -> None:
    start = changed(START, {"micro_batch_size": 4})
    least, most = (estimate(start, at(SMALL, device)) for device in (sized(0), card("H200")))
    assert least.moment == most.moment == "loss"
    assert (least.verdict, most.verdict) == ("does not fit", "fits")
    assert (least.loss_chunk_bytes, most.loss_chunk_bytes) == (CHUNK_BYTES[-1], CHUNK_BYTES[0])
    found = []
    for step in range(21):
        needed = least.device_bytes + (most.device_bytes - least.device_bytes) * step // 20
        plan = estimate(start, at(SMALL, replace(sized(0), can_give_bytes=GIB + needed)))
        assert plan.verdict == "fits"
        found.append(plan.loss_chunk_bytes)
    assert found == sorted(found)
    assert set(found) == set(CHUNK_BYTES)


def test_a_chunk_stays_large_where_it_is_not_what_is_in_the_way() -> None:
    needs = estimate(config(**KEYS), at(SMALL, sized(0)))
    assert (needs.moment, needs.verdict) == ("backward pass", "does not fit")
    assert CHUNK_BYTES[0] >= needs.loss_chunk_bytes > SMALLEST_CHUNK_BYTES
    assert needs.moments["loss"] <= needs.moments["backward pass"]


def test_a_cpu_and_a_kernel_have_the_smallest() -> None:
    assert planned(cpu()) == SMALLEST_CHUNK_BYTES
    assert planned(card("H200"), cut_cross_entropy=True) == SMALLEST_CHUNK_BYTES


PLUGIN = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({}, False),
        ({"plugins": [PLUGIN]}, True),
        ({"plugins": [PLUGIN], "cut_cross_entropy": False}, False),
        ({"cut_cross_entropy": True}, True),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, False),
    ],
)
def test_a_config_asks_for_cut_cross_entropy_plugin(keys: dict[str, Any], named: bool) -> None:
    assert names_cut_loss(config(**keys)) is named


def test_the_kernel_is_counted_only_where_it_can_run() -> None:
    def loss(device: Device, **keys: Any) -> int:
        return moment_parts(config(**KEYS | keys), at(SMALL, device), "loss")["loss"]

    asked = {"plugins": [PLUGIN]}
    assert loss(sized(1), **asked) < loss(sized(1)) - 64 * 2**20
    for keys in ({"bf16": False}, TRAINED_HEAD):
        assert loss(sized(1), **keys | asked) == loss(sized(1), **keys)
    turing = replace(sized(1), compute_capability=(7, 5))
    assert loss(turing, **asked) == loss(turing)


class TestTheRung:
    """Cut-cross-entropy is one of the last to be proposed, and says what it costs."""

    def short_by(self, size: int) -> Device:
        """A card that lacks so many bytes for `START`, whose loss is its fullest moment."""
        needs = estimate(START, at(SMALL, sized(0)))
        assert needs.moment == "loss"
        return replace(sized(0), can_give_bytes=needs.device_bytes + GIB - size)

    def rungs(self, start: RunConfig = START, **other: Any) -> tuple[Alternative, ...]:
        return make_fit(start, at(SMALL, replace(self.short_by(40 * 2**20), **other)))

    def test_it_is_taken_where_only_the_chunk_is_missing(self) -> None:
        (rung,) = self.rungs()
        assert rung.name == "cut cross-entropy"
        assert rung.trade == PRICE
        assert "2.2 %" in PRICE
        assert rung.estimate.verdict == "fits"
        made = changed(START, rung.changes)
        require_supported(made)
        assert made.plugins == [PLUGIN]

    @pytest.mark.parametrize(
        "other",
        [{"compute_capability": (7, 5)}, {"stack": {"torch": "2.13.0", "cut-cross-entropy": None}}],
        ids=["no bfloat16", "not installed"],
    )
    def test_it_is_not_proposed_where_it_cannot_run(self, other: dict[str, Any]) -> None:
        assert "cut cross-entropy" not in [r.name for r in self.rungs(planned=False, **other)]

    def test_nor_to_someone_who_switched_it_off(self) -> None:
        start = changed(START, {"cut_cross_entropy": False})
        assert "cut cross-entropy" not in [rung.name for rung in self.rungs(start)]

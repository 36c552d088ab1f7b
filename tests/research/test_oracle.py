"""The plan against the oracle, and the oracle against steps that really run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.catalog import read_architecture
from engine.plan import estimate
from engine.plan.memory import moment_parts
from engine.train.loss import Loss
from engine.train.model import load_base
from engine.train.run import put_on_training
from engine.train.weights import trained_parameters
from tests.research.oracle import Run, dry_run, make_batch, passes
from tests.support.card_bytes import CardBytes
from tests.support.machines import card, config, cpu, model
from tests.support.tiny import MINISTRAL3, settings, write_model

LENGTH = 2048
QLORA: dict[str, Any] = {
    "adapter": "qlora",
    "lora_r": 32,
    "sequence_len": LENGTH,
    "sample_packing": True,
    "gradient_checkpointing": True,
    "optimizer": "adamw_bnb_8bit",
    "bf16": True,
}
SMALL_4: dict[str, Any] = {"quantize_moe_experts": True, "lora_target_modules": ["o_proj"]}
EXPERTS = {"lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


KEPT: dict[str, Any] = {"gradient_checkpointing": False}
"""No layer is computed a second time."""
LORA: dict[str, Any] = {"adapter": "lora", "load_in_4bit": False}
FULL: dict[str, Any] = {
    **{"adapter": None, "load_in_4bit": False, "lora_target_linear": False},
    "gradient_accumulation_steps": 2,
}
NARROW: dict[str, Any] = {
    **LORA,
    **{"peft_autocast_adapter_dtype": False, "lora_r": 256, "gradient_accumulation_steps": 2},
}
"""A large adapter in bfloat16."""


def compared(name: str, sequences: int, keys: dict[str, Any]) -> tuple[float, Run]:
    """The plan's peak as a share of the oracle's."""
    settings = config(**QLORA | keys | {"micro_batch_size": sequences})
    run = dry_run(
        model(name),
        settings,
        tokens_per_sequence=LENGTH,
        sequences=sequences,
        vision_on_device=False,  # no row has an image
    )
    planned = estimate(settings, model(name), card("H200"))
    return planned.peak_allocated_bytes / run.peak_bytes, run


@pytest.mark.parametrize(
    ("name", "sequences", "keys"),
    [
        ("ministral-3-3b", 2, {}),
        pytest.param("ministral-3-3b", 2, {"cut_cross_entropy": True}, marks=pytest.mark.slow),
        *(
            pytest.param(name, 2, {}, marks=pytest.mark.slow)
            for name in (
                *("ministral-3-8b", "ministral-3-14b", "magistral-small-2506"),
                *("magistral-small-2507", "magistral-small-2509", "mistral-small-3.2"),
                "mistral-medium-3.5",
            )
        ),
        pytest.param("ministral-3-3b", 2, KEPT, marks=pytest.mark.slow),
        ("ministral-3-3b", 2, {"checkpointed_layers": 13}),
        *(
            pytest.param("ministral-3-8b", 2, keys, marks=pytest.mark.slow)
            for keys in (LORA | KEPT, LORA | {"checkpointed_layers": 17}, FULL | KEPT)
        ),
        pytest.param("ministral-3-3b", 2, FULL, marks=pytest.mark.slow),
        ("ministral-3-3b", 2, FULL | {"checkpointed_layers": 13}),
        ("ministral-3-3b", 2, NARROW),
        pytest.param("mistral-small-4", 1, SMALL_4, marks=pytest.mark.slow),
        pytest.param("mistral-small-4", 1, SMALL_4 | KEPT, marks=pytest.mark.slow),
        pytest.param("mistral-small-4", 1, SMALL_4 | EXPERTS, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_plan_is_within_3_percent_of_the_dry_run(
    name: str, sequences: int, keys: dict[str, Any]
) -> None:
    share, run = compared(name, sequences, keys)
    assert share == pytest.approx(1, abs=0.03), run


WIDE = MINISTRAL3 | {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers that are wide enough for tensors to weigh more than their granules."""
    return write_model(tmp_path_factory.mktemp("wide") / "wide", WIDE)


def really_run(
    folder: Path, keys: dict[str, Any], tokens: int, sequences: int, rows: int = 1
) -> tuple[int, int]:
    """(kept, peak) over what rests, of the trainer's own model on tensors with contents; each
    sequence is made of `rows`."""
    given = settings(folder, **keys)
    trained = put_on_training(load_base(folder, given), folder, given)
    trained.train()
    counter = CardBytes()
    for tensor in [*trained.parameters(), *trained.buffers()]:
        counter.count(tensor)
    with counter:
        batch = make_batch(tokens, sequences, ())
        batch["position_ids"] %= tokens // rows
        kept, peak = passes(trained, given, batch, counter, Loss())
    gradients = [p.grad for _, p in trained_parameters(trained) if p.grad is not None]
    held = CardBytes()
    for tensor in [*trained.parameters(), *trained.buffers(), *gradients]:
        held.count(tensor)
    return kept - held.now, peak - held.now


@pytest.mark.parametrize(
    "keys",
    [
        {"adapter": "lora", "gradient_checkpointing": True},
        {"adapter": "lora", "gradient_checkpointing": True, "checkpointed_layers": 1},
        {"adapter": "lora", "bf16": True, "lora_dropout": 0.05},
        {"adapter": "qlora", "load_in_4bit": True, "bf16": True, "gradient_checkpointing": True},
        {"bf16": True, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_dry_run_takes_what_the_same_step_takes_when_it_runs(
    wide: Path, keys: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    kept, peak = really_run(wide, keys, 256, 2)
    given = settings(wide, **keys)
    found = dry_run(
        read_architecture(wide), given, tokens_per_sequence=256, sequences=2, cuda=False
    )
    assert found.kept_bytes == pytest.approx(kept, rel=0.05)
    assert found.pass_bytes - found.resting_bytes == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("again", [KEPT, {"checkpointed_layers": 1}, {}], ids=str)
@pytest.mark.parametrize("method", ["lora", None])
def test_packed_rows_under_a_mask_take_what_the_plan_says(
    wide: Path, again: dict[str, Any], method: str | None
) -> None:
    """On a CPU, whose attention turns the mask into numbers for every layer that keeps it."""
    tokens = 1024
    keys = {"adapter": method, "sample_packing": True, "sequence_len": tokens, "bf16": False}
    keys |= {"gradient_checkpointing": True, "gradient_accumulation_steps": 2} | again
    _, peak = really_run(wide, keys, tokens, 1, rows=2)
    architecture = read_architecture(wide)
    planned = moment_parts(settings(wide, **keys), architecture, cpu(64), "backward pass")
    more = sum(planned.get(part, 0) for part in ("activations", "layer", "mask"))
    assert more == pytest.approx(peak, rel=0.1)

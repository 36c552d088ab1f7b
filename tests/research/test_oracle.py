"""The plan against the oracle, and the oracle against steps that really run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.catalog import read_architecture
from engine.plan import estimate
from tests.research.oracle import WIDE, Run, dry_run, really_run
from tests.support.machines import at, config, model
from tests.support.tiny import settings, write_model

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
    planned = estimate(settings, at(name, "H200"))
    return planned.peak_allocated_bytes / run.peak_bytes, run


@pytest.mark.parametrize(
    ("name", "sequences", "keys"),
    [
        ("ministral-3-3b", 2, {}),
        ("ministral-3-3b", 2, {"cut_cross_entropy": True}),
        *(
            (name, 2, {})
            for name in (
                *("ministral-3-8b", "ministral-3-14b", "magistral-small-2506"),
                *("magistral-small-2507", "magistral-small-2509", "mistral-small-3.2"),
                "mistral-medium-3.5",
            )
        ),
        ("ministral-3-3b", 2, KEPT),
        ("ministral-3-3b", 2, {"checkpointed_layers": 13}),
        *(
            ("ministral-3-8b", 2, keys)
            for keys in (LORA | KEPT, LORA | {"checkpointed_layers": 17}, FULL | KEPT)
        ),
        ("ministral-3-3b", 2, FULL),
        ("ministral-3-3b", 2, FULL | {"checkpointed_layers": 13}),
        ("ministral-3-3b", 2, NARROW),
        ("mistral-small-4", 1, SMALL_4),
        ("mistral-small-4", 1, SMALL_4 | KEPT),
        ("mistral-small-4", 1, SMALL_4 | EXPERTS),
    ],
    ids=str,
)
def test_the_plan_is_near_the_dry_run(name: str, sequences: int, keys: dict[str, Any]) -> None:
    share, run = compared(name, sequences, keys)
    assert share == pytest.approx(1, abs=0.03), run


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("wide") / "wide", WIDE)


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
def test_a_dry_run_takes_what_the_real_step_takes(wide: Path, keys: dict[str, Any]) -> None:
    torch.manual_seed(0)
    kept, peak = really_run(wide, keys, 256, 2)
    given = settings(wide, **keys)
    found = dry_run(
        read_architecture(wide), given, tokens_per_sequence=256, sequences=2, cuda=False
    )
    assert found.kept_bytes == pytest.approx(kept, rel=0.05)
    assert found.pass_bytes - found.resting_bytes == pytest.approx(peak, rel=0.05)

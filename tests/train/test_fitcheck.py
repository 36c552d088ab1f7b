"""What `fit` measures on a CPU, against the formula and against allocations that are known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.catalog import module_table, read_architecture
from engine.config import write_config
from engine.hardware import read_machine
from engine.plan import cpu_device, estimate
from engine.plan.measured import Measurement, step_bytes
from engine.runs import RunFolder
from engine.train.fitcheck import check
from engine.train.fitcheck.gauges import CpuGauge
from engine.train.fitcheck.reduced import shrink
from tests.plan.machines import MODELS, model
from tests.train.tiny import MINISTRAL3, settings, write_model

# Wide enough for its tensors to weigh more than what Python's bookkeeping takes.
WIDE = MINISTRAL3 | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
}
STEP = {"micro_batch_size": 2, "sequence_len": 512, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("wide") / "wide", WIDE)


def fitted(folder: Path, scratch: Path, **keys: Any) -> Mapping[str, Any]:
    """The record of a measurement, without a process of its own."""
    run = RunFolder(scratch / "run")
    run.path.mkdir()
    write_config(settings(folder, **STEP | keys), {}, run.config)
    told: list[Mapping[str, Any]] = []
    check(run, 2, told.append)
    (record,) = [each["fitted"] for each in told if "fitted" in each]
    return record


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora"},
    "lora, checkpointed": {"adapter": "lora", "gradient_checkpointing": True},
    "lora, packed": {"adapter": "lora", "gradient_checkpointing": True, "sample_packing": True},
    "lora, rank 64": {"adapter": "lora", "lora_r": 64, "gradient_checkpointing": True},
    "lora, 8-bit states": {"adapter": "lora", "optimizer": "adamw_bnb_8bit"},
    "qlora": {"adapter": "qlora", "load_in_4bit": True, "gradient_checkpointing": True},
    "full": {"gradient_checkpointing": True},
    "full, kept": {},
}


QUICK = ("lora, checkpointed", "qlora", "full")


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(keys, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, keys in METHODS.items()
    ],
)
def test_the_measured_peak_is_within_10_percent_of_the_formula(
    wide: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    record = fitted(wide, tmp_path, **keys)
    assert record["whole"]
    peak = record["measurement"]["peak_allocated_bytes"]
    assert peak == pytest.approx(record["estimate"]["step_bytes"], rel=0.10)
    assert all(torch.isfinite(torch.tensor(record["losses"])))
    found = Measurement(**record["measurement"])
    assert found.tokens_per_second > 0
    assert json.loads(json.dumps(record)) == record


def test_the_gauge_counts_what_lives_and_what_a_kernel_takes_inside() -> None:
    gauge, mib = CpuGauge(), 2**20
    with gauge.measure("held"):
        held = torch.zeros(8 * mib, dtype=torch.uint8)
    with gauge.measure("for a while"):
        torch.zeros(4 * mib, dtype=torch.uint8)
        torch.zeros(2 * mib, dtype=torch.uint8)
    with gauge.measure("inside"):  # logsumexp makes a tensor of its input's size
        torch.logsumexp(held.view(torch.float32), 0)
    del held
    found = {name: peak.allocated_bytes / mib for name, peak in gauge.peaks.items()}
    assert found["held"] == pytest.approx(8, rel=0.01)
    assert found["for a while"] == pytest.approx(12, rel=0.01)
    assert found["inside"] == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize("factor", [1, 4, 16])
@pytest.mark.parametrize("name", [name for name in MODELS if "demo" not in name])
def test_a_smaller_model_is_of_the_same_make(name: str, factor: int) -> None:
    content = shrink(model(name).config, 2, factor)
    small, large = module_table(content), model(name).table
    assert small.class_name == large.class_name
    assert {p.group for p in small.parameters} == {p.group for p in large.parameters}
    assert small.total_parameters < large.total_parameters
    for row in small.parameters:
        if row.quantizable and row.group in ("attention", "mlp"):
            assert all(side % 64 == 0 for side in row.shape), row.name


def test_what_is_measured_is_what_the_formula_is_asked_for(wide: Path, tmp_path: Path) -> None:
    record = fitted(wide, tmp_path, adapter="lora", lora_r=4)
    given = settings(wide, **STEP, adapter="lora", lora_r=4)
    needs = estimate(given, read_architecture(wide), cpu_device(read_machine()))
    assert record["measurement"]["formula_bytes"] == step_bytes(needs)

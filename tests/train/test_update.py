"""What an optimizer's step takes, against what torch's allocator is asked for."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from engine.catalog import ModuleTable, read_architecture
from engine.config import RunConfig
from engine.plan.memory.moments import CPU_BYTES, FOREACH_BYTES, update_bytes
from engine.plan.memory.step import make_step
from engine.plan.targets import adapter_parameters, choose_targets, largest_trainable
from engine.train.batches import Rows
from engine.train.fitcheck import CpuPeakMemory
from engine.train.optim import build_optimizer, take_step
from tests.support import tiny
from tests.support.machines import card, cpu
from tests.support.tiny import MISTRAL4, describe, settings, training, write_model

OPTIMIZERS = sorted(set(CPU_BYTES) - {"adamw_torch_8bit", "adamw_8bit"})  # torchao's; another name
LOOSE = {
    ("adamw_torch", None): 0.34,  # the quotient of the tensor before is smaller than the largest
    ("adamw_torch_fused", "lora"): 0.11,  # all factors are widened, none yet rounded
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full in bfloat16": {"bf16": True},
    "adapter": {"adapter": "lora", "lora_r": 64, "lora_target_linear": True},
    "bfloat16 adapter": {
        "adapter": "lora",
        "lora_r": 64,
        "lora_target_linear": True,
        "peft_autocast_adapter_dtype": False,
        "bf16": True,
    },
}


def parameters(table: ModuleTable, config: RunConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, made of zeros."""
    kind = torch.bfloat16 if config.bf16 else torch.float32
    if not config.adapter:
        for row in table.parameters:
            if not row.tied:
                yield row.name, nn.Parameter(torch.zeros(row.shape, dtype=kind))
        return
    targets = choose_targets(table, config)
    for row in table.parameters:
        if row.module in targets:
            outputs, inputs = row.shape
            for name, shape in (("A", (config.lora_r, inputs)), ("B", (outputs, config.lora_r))):
                yield f"{row.module}.lora_{name}.w", nn.Parameter(torch.zeros(shape, dtype=kind))


def taken_bytes(
    named: Iterable[tuple[str, nn.Parameter]],
    build: Callable[[list[tuple[str, nn.Parameter]]], Optimizer],
) -> int:
    """By the third step beyond what was there before it."""
    memory = CpuPeakMemory()
    with memory.measure("before"):
        trainable = list(named)
        optimizer = build(trainable)
        for number in range(3):
            for _, parameter in trainable:
                parameter.grad = torch.ones_like(parameter)
            if number < 2:
                take_step(optimizer)
    with memory.measure("at rest"):
        pass
    with memory.measure("step"):
        take_step(optimizer)
    return memory.peaks["step"].allocated_bytes - memory.peaks["at rest"].allocated_bytes


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_takes_the_planned_memory(tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    architecture = read_architecture(describe(tmp_path / "model", tiny.WIDE))
    config = settings(tmp_path / "model", optimizer=name, **keys)
    step = make_step(config, architecture, cpu())
    if config.adapter:
        made = sum(p.numel() for _, p in parameters(architecture.table, config))
        assert made == adapter_parameters(architecture.table, config)
    taken = taken_bytes(
        parameters(architecture.table, config), lambda named: build_optimizer(named, config)
    )
    counted = update_bytes(step)
    assert taken == pytest.approx(counted, rel=LOOSE.get((name, config.adapter), 0.001), abs=2**10)
    assert taken <= 1.001 * counted + 2**10


def test_on_a_gpu_the_plain_one_takes_the_roots_of_all_second_moments(tmp_path: Path) -> None:
    """Which it does wherever it moves many tensors in one call, as it does on every GPU."""
    architecture = read_architecture(describe(tmp_path / "model", tiny.WIDE))
    named = list(parameters(architecture.table, settings(tmp_path)))
    taken = taken_bytes(named, lambda named: torch.optim.AdamW([p for _, p in named], foreach=True))
    numbers = sum(parameter.numel() for _, parameter in named)
    assert taken == pytest.approx(FOREACH_BYTES * numbers, rel=0.02)


def test_on_a_gpu_only_that_and_what_is_widened_count(tmp_path: Path) -> None:
    architecture = read_architecture(describe(tmp_path / "model", tiny.WIDE))

    def counted(name: str, **keys: Any) -> tuple[float, int, int]:
        config = settings(tmp_path / "model", optimizer=name, **keys)
        step = make_step(config, architecture, card("H100 80GB"))
        return update_bytes(step), step.trainable, largest_trainable(step.table, config)

    for keys in KINDS.values():
        plain, numbers, largest = counted("adamw_torch", **keys)
        for name in set(CPU_BYTES) - {"adamw_torch"}:
            kernel, _, _ = counted(name, **keys)
            widened = {"full in bfloat16": 2, "bfloat16 adapter": 4}
            more = next((size for kind, size in widened.items() if KINDS[kind] is keys), 0)
            cut = {0: 0, 2: 4, 4: 12}[more] * largest
            assert kernel == more * numbers + cut
            assert plain == more * numbers + max(cut, 4 * numbers)


@pytest.mark.parametrize(
    "keys",
    [
        {"adapter": "lora", "lora_r": 8, "lora_target_linear": True},
        {
            "adapter": "lora",
            "lora_r": 8,
            "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "lora_dropout": 0.0,
        },
        {"adapter": "lora", "lora_r": 8, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
        {},
    ],
    ids=["linears", "experts", "saved", "full"],
)
def test_largest_trainable_tensor(tmp_path: Path, uneven: Rows, keys: dict[str, Any]) -> None:
    base = write_model(tmp_path / "model", MISTRAL4)
    config = settings(base, **keys)
    model = training(base, config, uneven).model
    made = max(p.numel() for p in model.parameters() if p.requires_grad)
    assert largest_trainable(read_architecture(base).table, config) == made

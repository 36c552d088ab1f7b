"""The device and the precision of a run are those of its plan, or the run does not begin."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.errors import UserError, WorkError
from engine.hardware import assume
from engine.plan import best_device, cpu_device
from engine.runs import RunFolder
from engine.train import attention
from engine.train.attention import Segments, attend_row_by_row, attend_stock, needs_equal_heads
from engine.train.device import pick_dtype, require_planned_device
from engine.train.optim import BITSANDBYTES
from tests.support.machines import config

CUDA = torch.device("cuda", 0)
OWN = "aaaa-1"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """What torch answers of a card; `is_bf16_supported` is its own."""

    def put_in(major: int, minor: int) -> None:
        properties = SimpleNamespace(major=major, minor=minor, uuid=OWN)
        answers: dict[str, Any] = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_name": lambda _: "A card",
            "get_device_capability": lambda _: (major, minor),
            "get_device_properties": lambda _: properties,
            "_check_bf16_tensor_supported": lambda _: True,  # any card can make such a tensor
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    return put_in


@pytest.mark.parametrize(
    ("capability", "bf16", "dtype"),
    [
        ((7, 5), "auto", torch.float32),
        ((7, 5), False, torch.float32),
        ((8, 0), "auto", torch.bfloat16),
        ((8, 6), True, torch.bfloat16),
        ((12, 0), "auto", torch.bfloat16),
        ((9, 0), False, torch.float32),
    ],
)
def test_bfloat16_is_what_the_card_has_itself(
    card: Callable[[int, int], None], capability: tuple[int, int], bf16: Any, dtype: torch.dtype
) -> None:
    card(*capability)
    assert torch.cuda.is_bf16_supported(), "by emulation too, which is no measure"
    assert pick_dtype(config(bf16=bf16), CUDA) == dtype


def test_bfloat16_is_refused_where_it_would_be_emulated(card: Callable[[int, int], None]) -> None:
    card(7, 5)
    with pytest.raises(UserError, match=r"bf16: true cannot be used on A card") as refusal:
        pick_dtype(config(bf16=True), CUDA)
    assert refusal.value.fix.startswith("Write bf16: auto")


def test_torch_agrees(card: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    card(7, 5)  # as torch sees it
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(WorkError, match="does not compute in bfloat16 on A card"):
        pick_dtype(config(), CUDA)


def planned(folder: Path, **device: object) -> RunFolder:
    run = RunFolder(folder)
    if device:
        run.plan.write_text(json.dumps({"device": device}), "utf-8")
    return run


H100 = best_device(assume("H100"))
CPU = cpu_device(assume("H100"))


@pytest.mark.parametrize(
    ("device", "other"),
    [
        ({"kind": "cuda", "uuid": f"GPU-{OWN}"}, False),
        ({"kind": "cuda", "uuid": "GPU-bbbb-2"}, True),
        ({"kind": "cuda", "uuid": "MIG-cccc-3"}, False),
        ({"kind": "cuda", "uuid": None}, False),
        ({}, False),
    ],
)
def test_a_card_other_than_the_planned_one_is_named(
    card: Callable[[int, int], None], tmp_path: Path, device: dict[str, object], other: bool
) -> None:
    card(9, 0)
    warning = require_planned_device(planned(tmp_path, **device), replace(H100, uuid="GPU-dddd-4"))
    assert bool(warning) == other
    if warning:
        assert "GPU-bbbb-2" in warning
        assert f"GPU-{OWN}" in warning


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch computes on a card here")
def test_without_a_plan_it_is_the_card_that_is_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="planned for H100 80GB HBM3, and no GPU can"):
        require_planned_device(planned(tmp_path), H100)
    assert require_planned_device(planned(tmp_path), CPU) is None
    assert require_planned_device(planned(tmp_path, kind="cpu"), H100) is None


def test_the_plan_knows_the_same_optimizers_of_bitsandbytes() -> None:
    from engine.config import SHARDED_OPTIMIZERS

    assert set(SHARDED_OPTIMIZERS) == set(BITSANDBYTES) - {"adamw_torch_8bit"}


def test_float32_on_a_card_gets_a_head_of_keys_for_each_of_queries() -> None:
    """There its one kernel that keeps no scores takes no grouped heads: torch would keep them."""
    with FakeTensorMode():
        for place, dtype, equal in (
            ("cuda", torch.float32, True),
            ("cuda", torch.bfloat16, False),
            ("cpu", torch.float32, False),
        ):
            assert needs_equal_heads(torch.empty(1, device=place, dtype=dtype)) == equal


def by_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows = Segments(torch.tensor([0, 5, 12], dtype=torch.int32), 7)
    return attend_row_by_row(query, key, value, rows)


def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    states = [state.transpose(0, 1)[None] for state in (query, key, value)]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True  # type: ignore[assignment]
    return attend_stock(module, *states, None)[0][0]


@pytest.mark.parametrize("attend", [by_row, whole])
def test_repeated_heads(attend: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[tuple[int, int]] = []
    stock = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        heads.append((query.shape[1], key.shape[1]))
        return stock(query, key, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    found = []
    for equal in (False, True):
        monkeypatch.setattr(attention, "needs_equal_heads", lambda _, equal=equal: equal)
        torch.manual_seed(0)
        states = [torch.randn(12, n, 16, requires_grad=True) for n in (8, 2, 2)]
        mixed = attend(*states)
        mixed.square().sum().backward()
        found.append([mixed, *(state.grad for state in states)])
    for grouped, repeated in zip(*found, strict=True):
        torch.testing.assert_close(grouped, repeated)
    half = len(heads) // 2
    assert set(heads[half:]) == {(8, 8)}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {}),
    ],
)
def test_a_persons_allocator_settings_are_kept(given: dict[str, str], kept: dict[str, str]) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    program = "import engine.train, os, json; print(json.dumps({n: os.environ[n] for n in "
    program += f"{names} if n in os.environ}}))"
    environment = {name: value for name, value in os.environ.items() if name not in names}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment | given, capture_output=True, check=True
    )
    assert json.loads(printed.stdout) == given | kept

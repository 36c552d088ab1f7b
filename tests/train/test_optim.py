"""The learning rate of every step, and which parameters the optimizer pulls towards zero."""

import ctypes
import math
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from engine.errors import UserError
from engine.train import optim
from engine.train.optim import (
    build_optimizer,
    free_paged_state,
    join,
    learning_rate,
    round_at_random,
    set_learning_rate,
    split,
    take_step,
    warmup_steps,
)
from tests.support.tiny import settings

PEAK = 0.01


def rates(total: int, **keys: Any) -> list[float]:
    config = settings(learning_rate=PEAK, **keys)
    return [learning_rate(step, total, config) for step in range(1, total + 1)]


class TestSchedule:
    @pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
    def test_the_warmup_rises_in_equal_steps_up_to_the_peak(self, schedule: str) -> None:
        found = rates(20, lr_scheduler=schedule, warmup_steps=4)
        assert found[:5] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK, PEAK])

    def test_cosine_falls_through_the_half_to_almost_nothing_or_its_floor(self) -> None:
        found = rates(104, lr_scheduler="cosine", warmup_steps=4)
        assert found[4 + 50] == pytest.approx(PEAK / 2)
        assert found[4 + 25] == pytest.approx(PEAK * (1 + math.sqrt(0.5)) / 2)
        assert 0 < found[-1] < PEAK * 0.001
        assert found[4:] == sorted(found[4:], reverse=True)
        found = rates(100, lr_scheduler="cosine", warmup_steps=0, cosine_min_lr_ratio=0.1)
        assert found[0] == PEAK
        assert found[50] == pytest.approx(PEAK * 0.55)
        assert found[-1] == pytest.approx(PEAK * 0.1, rel=0.01)

    def test_linear_falls_in_equal_steps_and_constant_stays(self) -> None:
        """The last step of a linear one still learns."""
        found = rates(10, lr_scheduler="linear", warmup_steps=0)
        assert found == pytest.approx([PEAK * (10 - k) / 10 for k in range(10)])
        assert rates(10, lr_scheduler="constant", warmup_steps=0) == [PEAK] * 10

    @pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
    @pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (3, 3), (3, 50)])
    def test_no_step_of_a_short_run_is_lost(self, schedule: str, total: int, warmup: int) -> None:
        found = rates(total, lr_scheduler=schedule, warmup_steps=warmup)
        assert all(0 < rate <= PEAK for rate in found)

    @pytest.mark.parametrize(
        ("keys", "total", "steps"),
        [
            ({"warmup_steps": 7}, 10, 7),
            ({"warmup_steps": 0}, 1000, 0),
            ({"warmup_ratio": 0.1}, 45, 5),
            ({}, 100, 3),
            ({}, 10, 1),
            ({}, 1_000_000, 100),
        ],
    )
    def test_the_length_of_the_warmup(self, keys: dict[str, Any], total: int, steps: int) -> None:
        assert warmup_steps(settings(**keys), total) == steps


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64, bias=False))


ALL = [
    *("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"),
    *("paged_adamw_8bit", "paged_adamw_32bit"),
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
class TestEveryOptimizer:
    def test_matrices_decay_and_vectors_do_not(self, name: str) -> None:
        model = network()
        config = settings(optimizer=name, weight_decay=0.1, learning_rate=0.5)
        optimizer = build_optimizer(model.named_parameters(), config)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for key, parameter in model.named_parameters():
            share = 0.95 if parameter.ndim > 1 else 1.0
            torch.testing.assert_close(parameter.detach(), before[key] * share, msg=key)

    def test_a_step_on_a_cpu_goes_downhill(self, name: str) -> None:
        model = network()
        config = settings(optimizer=name, learning_rate=1e-3)
        optimizer = build_optimizer(model.named_parameters(), config)
        inputs = torch.randn(8, 64)
        found = []
        for _ in range(5):
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert found == sorted(found, reverse=True)
        assert found[-1] < 0.9 * found[0]


def test_adamw_has_the_configs_arguments() -> None:
    config = settings(learning_rate=0.3, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-5)
    optimizer = build_optimizer(network().named_parameters(), config)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.9), 1e-5)
    assert optimizer.defaults["fused"]


def test_eight_bits_are_eight_bits() -> None:
    model = network()
    optimizer = build_optimizer(model.named_parameters(), settings(optimizer="adamw_bnb_8bit"))
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    matrix = next(model.parameters())
    assert optimizer.state[matrix]["state1"].dtype == torch.uint8


def test_nothing_to_decay_leaves_no_empty_group() -> None:
    norms = nn.LayerNorm(8)
    groups = build_optimizer(norms.named_parameters(), settings(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0]


def test_an_unknown_optimizer_is_refused_with_those_there_are() -> None:
    config = settings().model_copy(update={"optimizer": "adafactor"})
    with pytest.raises(UserError, match="adafactor cannot be used") as caught:
        build_optimizer(network().named_parameters(), config)
    assert all(name in caught.value.why for name in ALL)


def test_every_optimizer_of_the_config_is_there() -> None:
    from typing import get_args

    from engine.config.keys import Optimizer

    assert set(get_args(Optimizer)) == set(ALL)


def test_the_rate_is_set_for_every_group() -> None:
    optimizer = build_optimizer(network().named_parameters(), settings(weight_decay=0.1))
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_lora_plus_gives_each_parameter_the_rate_that_peft_gives_it() -> None:
    model = get_peft_model(network(), LoraConfig(r=4, target_modules=["0", "2"]))
    config = settings(adapter="lora", loraplus_lr_ratio=16, learning_rate=1e-3)
    ours = build_optimizer(((n, p) for n, p in model.named_parameters() if p.requires_grad), config)
    set_learning_rate(ours, 1e-3)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.0
    )

    def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
        return {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}

    assert rates(ours) == pytest.approx(rates(theirs))
    assert set(rates(ours).values()) == {1e-3, 16e-3}


class TestBfloat16:
    """bfloat16 weights move as float32 ones do, and only what is shown of them is rounded."""

    STEPS = 300

    def twins(self, name: str, dtype: torch.dtype) -> tuple[nn.Parameter, Any]:
        torch.manual_seed(0)
        start = torch.randn(64, 128).bfloat16()
        weight = nn.Parameter(start.to(dtype))
        config = settings(optimizer=name, learning_rate=1e-5, weight_decay=0.1)
        return weight, build_optimizer([("w", weight)], config)

    def train(self, weight: nn.Parameter, optimizer: Any, steps: int = STEPS) -> None:
        generator = torch.Generator().manual_seed(1)
        gradient = torch.randn(weight.shape, generator=generator)
        for _ in range(steps):
            noise = torch.randn(weight.shape, generator=generator)
            weight.grad = (gradient + noise).bfloat16().to(weight.dtype)
            optimizer.step()
            optimizer.zero_grad()

    @pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit"])
    def test_small_steps_arrive_as_in_float32(self, name: str) -> None:
        narrow, ours = self.twins(name, torch.bfloat16)
        wide, theirs = self.twins(name, torch.float32)
        self.train(narrow, ours)
        self.train(wide, theirs)
        assert narrow.dtype == torch.bfloat16
        exact = join(narrow.detach(), ours.state[narrow]["rest"])
        assert torch.equal(exact, wide.detach())
        torch.testing.assert_close(narrow.float(), wide, rtol=2**-8, atol=0)

    def test_without_the_rest_they_would_be_lost(self) -> None:
        narrow, _ = self.twins("adamw_torch", torch.bfloat16)
        wide, theirs = self.twins("adamw_torch", torch.float32)
        before = wide.detach().clone()
        self.train(wide, theirs)
        self.train(narrow, torch.optim.AdamW([narrow], lr=1e-5, weight_decay=0.1))
        large = before.abs() > 0.5
        expected, found = (wide - before)[large].abs().mean(), (narrow - before)[large].abs().mean()
        assert found < 0.01 * expected

    def test_the_state_is_ten_bytes_a_weight_and_its_moments_are_float32(self) -> None:
        weight, optimizer = self.twins("adamw_torch_fused", torch.bfloat16)
        self.train(weight, optimizer, 2)
        state = {k: v for k, v in optimizer.state[weight].items() if k != "step"}
        assert {k: v.dtype for k, v in state.items()} == {
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
            "rest": torch.int16,
        }
        assert sum(v.nbytes for v in state.values()) == 10 * weight.numel()

    def test_a_weight_without_a_gradient_is_left_alone(self) -> None:
        idle = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = build_optimizer([("a", idle), ("b", weight)], settings(weight_decay=0.5))
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert not optimizer.state.get(idle)
        assert torch.equal(idle, torch.ones_like(idle))

    def test_float32_weights_keep_nothing_beside_them(self) -> None:
        weight, optimizer = self.twins("adamw_torch", torch.float32)
        self.train(weight, optimizer, 1)
        assert "rest" not in optimizer.state[weight]

    def test_a_step_in_parts_is_the_same_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = []
        for most in (2**24, 1000):
            monkeypatch.setattr("engine.train.optim.WIDENED_NUMBERS", most)
            torch.manual_seed(0)
            named = [(f"{n}.lora_A.w", nn.Parameter(torch.randn(32, n + 8))) for n in range(9)]
            named += [(f"{n}.bias", nn.Parameter(torch.randn(40))) for n in range(3)]
            for _, parameter in named[::2]:
                parameter.data = parameter.data.bfloat16()
            optimizer = build_optimizer(named, settings(weight_decay=0.1))
            groups = [list(group["params"]) for group in optimizer.param_groups]
            steps = 0

            def count(*_: Any) -> None:
                nonlocal steps
                steps += 1

            optimizer.register_step_pre_hook(count)
            for _ in range(3):
                for _, parameter in named:
                    parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
                take_step(optimizer)
            assert [group["params"] for group in optimizer.param_groups] == groups
            assert steps == (3 if most > 1000 else 6)
            found.append([parameter.detach().clone() for _, parameter in named])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_split_and_join_are_exact_for_every_number(self) -> None:
        generator = torch.Generator().manual_seed(2)
        bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).int()
        halfway = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 65536 + 0x8000
        numbers = torch.cat([bits, halfway]).view(torch.float32)
        numbers = numbers[numbers.abs() < 3e38]
        weight, rest = split(numbers)
        assert torch.equal(join(weight, rest), numbers)
        nearest = numbers.bfloat16().float()
        assert torch.equal((weight.float() - numbers).abs(), (nearest - numbers).abs())


class TestBfloat16Adapter:
    """An adapter's matrices in bfloat16 keep nothing beside them, and move right on average."""

    def test_steps_far_below_the_spacing_shift_the_mean(self) -> None:
        # Between 1 and 2 two neighbours are 0.0078 apart: 20 steps of 1e-5 are a fortieth of that.
        torch.manual_seed(0)
        start = torch.rand(256, 256).add_(1).bfloat16()
        weight = nn.Parameter(start.clone())
        config = settings(adapter="lora", learning_rate=1e-5, lr_scheduler="constant")
        optimizer = build_optimizer([("q_proj.lora_A.default.weight", weight)], config)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            take_step(optimizer)
        moved = (weight.detach().float() - start.float()).mean()
        assert moved == pytest.approx(-20 * 1e-5, rel=0.1)
        assert (weight != start).float().mean() < 0.05, "most of them have not moved at all"

    @pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit"])
    def test_nothing_is_kept_beside_the_moments(self, name: str) -> None:
        weight = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        config = settings(adapter="lora", optimizer=name)
        optimizer = build_optimizer([("x.lora_B.default.weight", weight)], config)
        weight.grad = torch.ones_like(weight)
        take_step(optimizer)
        assert weight.dtype == torch.bfloat16
        assert "rest" not in optimizer.state[weight]
        moments = [v for k, v in optimizer.state[weight].items() if k in ("exp_avg", "exp_avg_sq")]
        assert {moment.dtype for moment in moments} <= {torch.float32}

    def test_a_number_goes_to_a_neighbour_as_often_as_it_is_near(self) -> None:
        torch.manual_seed(0)
        for value in (1 + 0.25 * 2**-7, -1 - 0.75 * 2**-7, 3e-39):
            rounded = round_at_random(torch.full((200_000,), value)).float()
            assert len(rounded.unique()) == 2
            spacing = float(rounded.unique().diff())
            assert abs(float(rounded.double().mean()) - value) < 0.01 * spacing
        exact = torch.randn(1000).bfloat16()
        assert torch.equal(round_at_random(exact.float()), exact)


LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p


class UnifiedMemory:
    """What bitsandbytes asks for memory, and what CUDA takes it back by."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.waited = False

    def cget_managed_ptr(self, size: ctypes.c_size_t) -> int:
        pointer = int(LIBC.malloc(size))
        self.held[pointer] = size.value
        return pointer

    def cudaFree(self, pointer: ctypes.c_void_p) -> int:
        assert self.waited, "a kernel may still write there"
        assert pointer.value is not None
        del self.held[pointer.value]  # KeyError for what was not handed out, or twice
        LIBC.free(pointer)
        return 0


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> UnifiedMemory:
    stand_in = UnifiedMemory()
    manager = bnb.GlobalPageManager.get_instance()
    monkeypatch.setattr(bnb, "lib", stand_in)
    monkeypatch.setattr(manager, "paged_tensors", [])
    monkeypatch.setattr(optim, "cuda_runtime", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(stand_in, "waited", True))
    return stand_in


def page(numbers: int) -> torch.Tensor:
    """As the optimizer's `get_state_buffer` makes it for a tensor on a card."""
    room: torch.Tensor = bnb.get_paged(numbers, dtype=torch.uint8, device=torch.device("cuda", 0))
    bnb.GlobalPageManager.get_instance().paged_tensors.append(room)
    return room


def test_what_nobody_holds_is_freed_once(memory: UnifiedMemory) -> None:
    state = {"state1": page(4096), "state2": page(8192)}
    state.clear()
    assert sum(memory.held.values()) == 4096 + 8192
    assert free_paged_state() == 4096 + 8192
    assert not memory.held
    assert free_paged_state() == 0


def test_what_lives_on_keeps_its_memory(memory: UnifiedMemory) -> None:
    alive = page(4096).detach()  # another tensor, of the same memory
    page(8192)
    assert free_paged_state() == 8192
    alive.fill_(7)
    assert list(memory.held.values()) == [4096]
    assert int(alive.sum()) == 7 * 4096


def test_a_run_without_them_asks_for_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.GlobalPageManager.get_instance(), "paged_tensors", [])
    monkeypatch.setattr(optim, "cuda_runtime", None)
    assert free_paged_state() == 0

"""The learning rate of every step, and which parameters the optimizer pulls towards zero."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from engine.errors import UserError
from engine.train.optim import build_optimizer, learning_rate, set_learning_rate, warmup_steps
from tests.train.tiny import settings

PEAK = 0.01


def rates(total: int, **keys: Any) -> list[float]:
    config = settings(learning_rate=PEAK, **keys)
    return [learning_rate(step, total, config) for step in range(1, total + 1)]


class TestSchedule:
    def test_the_warmup_rises_in_equal_steps_and_its_last_one_is_the_peak(self) -> None:
        for schedule in ("cosine", "linear", "constant"):
            found = rates(20, lr_scheduler=schedule, warmup_steps=4)
            assert found[:5] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK, PEAK])

    def test_cosine_falls_through_the_half_to_almost_nothing(self) -> None:
        found = rates(104, lr_scheduler="cosine", warmup_steps=4)
        assert found[4 + 50] == pytest.approx(PEAK / 2)
        assert found[4 + 25] == pytest.approx(PEAK * (1 + math.sqrt(0.5)) / 2)
        assert 0 < found[-1] < PEAK * 0.001
        assert found[4:] == sorted(found[4:], reverse=True)

    def test_cosine_stops_at_its_floor(self) -> None:
        found = rates(100, lr_scheduler="cosine", warmup_steps=0, cosine_min_lr_ratio=0.1)
        assert found[0] == PEAK
        assert found[50] == pytest.approx(PEAK * 0.55)
        assert found[-1] == pytest.approx(PEAK * 0.1, rel=0.01)

    def test_linear_falls_in_equal_steps_and_the_last_one_still_moves(self) -> None:
        found = rates(10, lr_scheduler="linear", warmup_steps=0)
        assert found == pytest.approx([PEAK * (10 - k) / 10 for k in range(10)])

    def test_constant_stays(self) -> None:
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
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
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

    def test_a_step_on_a_cpu_goes_down_the_slope(self, name: str) -> None:
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

    from engine.config.training_keys import Optimizer

    assert set(get_args(Optimizer)) == set(ALL)


def test_the_rate_is_set_for_every_group() -> None:
    optimizer = build_optimizer(network().named_parameters(), settings())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]

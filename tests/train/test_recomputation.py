"""Which layers are computed a second time changes time and memory, and no number of a run."""

from collections import Counter
from typing import Any

import pytest
import torch

from engine.train.forward import unwrapped
from engine.train.loop import Training
from engine.train.offload import decoder_layers
from tests.support.offloading import BASES, DEEP_MODELS, OFFLOADS, BeginDeep
from tests.support.tiny import gradients

ALL: dict[str, Any] = {}
NONE: dict[str, Any] = {"gradient_checkpointing": False}
TWO: dict[str, Any] = {"checkpointed_layers": 2}
BASE_KEYS = {
    "float32": BASES["float32"],
    "full": {"adapter": None},
    "DoRA": BASES["float32"] | {"peft_use_dora": True},
    "NF4": BASES["NF4"],
    "NF4 experts": BASES["NF4 experts"],
}


def learned(run: Training) -> tuple[Any, ...]:
    """Loss, norm and every gradient of a step of packed rows."""
    found = run.gradients(run.order.step(1))
    return found, gradients(run.model)


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *((name, "float32") for name in DEEP_MODELS),
        *((name, "full") for name in ("mistral", "ministral3", "mistral4")),
        ("ministral3", "DoRA"),
        ("ministral3", "NF4"),
        ("mistral4", "NF4 experts"),
    ],
)
def test_same_gradients(begin_deep: BeginDeep, architecture: str, method: str) -> None:
    adapted, dora = method != "full", method == "DoRA"
    others = [NONE, {"checkpointed_layers": 1}, TWO, TWO | OFFLOADS["checkpoints"]]
    others += [TWO | OFFLOADS["layers"]] if adapted and not dora else []
    loss, every = None, None
    for number, keys in enumerate((ALL, *others)):
        given = BASE_KEYS[method] | keys
        run = begin_deep(architecture, str(number), **given)
        found, each = learned(run)
        loss, every = loss or found, every or each
        assert found == loss, keys
        assert each.keys() == every.keys()
        assert all(torch.equal(each[name], every[name]) for name in every), keys
    assert every
    assert all(float(gradient.norm()) > 0 for gradient in every.values())


@pytest.mark.parametrize(
    ("keys", "times"),
    [(ALL, [2, 2, 2, 2]), (NONE, [1, 1, 1, 1]), (TWO, [2, 2, 1, 1])],
    ids=["all", "none", "two"],
)
@pytest.mark.parametrize("offloads", [False, True])
def test_layers_computed_again(
    begin_deep: BeginDeep, keys: dict[str, Any], times: list[int], offloads: bool
) -> None:
    more = OFFLOADS["checkpoints"] if offloads and keys != NONE else {}
    run = begin_deep("ministral3", **BASES["float32"], **keys, **more)
    seen: Counter[int] = Counter()
    for number, layer in enumerate(decoder_layers(unwrapped(run.model))):
        norm: Any = layer.input_layernorm
        norm.register_forward_hook(lambda *_, number=number: seen.update([number]))
    step = run.order.step(1)
    run.gradients(step)
    assert [seen[number] // len(step.micros) for number in range(4)] == times

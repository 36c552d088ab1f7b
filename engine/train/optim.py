"""Which optimizer moves the trained parameters, and how fast at each step.

Apart from the loop because the choice is data from the config and because a resumed run must build
the very same thing again. The schedule is a pure function of the step: it has no state to save.
bfloat16 weights are moved in float32, or most small steps would be rounded away.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.config import RunConfig
from engine.errors import UserError

ADAMW = {"adamw_torch": False, "adamw_torch_fused": True}
"""PyTorch's own, by whether the update is one fused kernel."""
BITSANDBYTES = {
    "adamw_bnb_8bit": "AdamW8bit",
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}

DEFAULT_WARMUP_RATIO, DEFAULT_WARMUP_STEPS = 0.03, 100
"""Axolotl's warmup where the config names none."""


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: RunConfig) -> Optimizer:
    """The config's optimizer over `named`, matrices decayed and vectors (norms, biases) not.

    With `loraplus_lr_ratio` the adapter's B matrices are a group of their own. Raises UserError for
    an optimizer that this trainer does not have.
    """
    optimizer = _choose(_groups(named, config), config)
    _move_in_float32(optimizer)
    return optimizer


def _groups(named: Iterable[tuple[str, nn.Parameter]], config: RunConfig) -> list[dict[str, Any]]:
    """Parameter groups by how they decay and how fast they learn; none is empty."""
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        ratio = config.loraplus_lr_ratio if "lora_B" in name else None
        members.setdefault((decay, ratio or 1.0), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_ratio": ratio}
        for (decay, ratio), parameters in members.items()
    ]


def _choose(groups: list[dict[str, Any]], config: RunConfig) -> Optimizer:
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optimizer in ADAMW:
        return torch.optim.AdamW(groups, fused=ADAMW[config.optimizer], **options)
    if config.optimizer in BITSANDBYTES:
        import bitsandbytes

        kind: Callable[..., Optimizer] = getattr(bitsandbytes.optim, BITSANDBYTES[config.optimizer])
        return kind(groups, **options)
    raise UserError(
        f"The optimizer {config.optimizer} cannot be used.",
        f"This trainer has {', '.join([*ADAMW, *BITSANDBYTES])}.",
        "Set `optimizer` to one of them; adamw_torch_fused is the exact one, adamw_bnb_8bit the "
        "small one.",
    )


def _move_in_float32(optimizer: Optimizer) -> None:
    """Let `optimizer` move bfloat16 weights as if they were float32 ones.

    Near 1.0 two neighbours in bfloat16 are 0.0078 apart: a step of 1e-5 would never arrive, and a
    second moment in bfloat16 could not fall by its 0.1 % a step. So each weight keeps the 16 bits
    that bfloat16 cuts off, as the state `rest`: for the length of a step the two are one float32
    number. That is 2 bytes a weight, and the same numbers as a float32 master copy, which takes 4.
    """

    def widen(optimizer: Optimizer, *_: object) -> None:
        for parameter in _moving(optimizer, torch.bfloat16):
            assert parameter.grad is not None
            gradient, rest = parameter.grad.float(), optimizer.state[parameter].pop("rest", None)
            parameter.grad = None
            parameter.data = join(parameter.data, rest)
            parameter.grad = gradient
            widened.append(parameter)

    def narrow(optimizer: Optimizer, *_: object) -> None:
        for parameter in widened:
            parameter.grad = None
            parameter.data, optimizer.state[parameter]["rest"] = split(parameter.data)
        widened.clear()

    widened: list[nn.Parameter] = []
    if any(p.dtype == torch.bfloat16 for group in optimizer.param_groups for p in group["params"]):
        optimizer.register_step_pre_hook(widen)
        optimizer.register_step_post_hook(narrow)


def _moving(optimizer: Optimizer, dtype: torch.dtype) -> list[nn.Parameter]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [p for p in parameters if p.dtype == dtype and p.grad is not None]


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as its nearest bfloat16 one, and the int16 that `join` needs beside it."""
    bits = weight.view(torch.int32)
    high = (bits + 0x8000) >> 16
    rest = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), rest


def join(weight: Tensor, rest: Tensor | None) -> Tensor:
    """The float32 tensor that `split` took apart, bit for bit; without `rest` the plain value."""
    if rest is None:
        return weight.float()
    return ((weight.view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


def warmup_steps(config: RunConfig, total_steps: int) -> int:
    """Steps over which the learning rate rises: as the config says, else 3 %, at most 100."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    if config.warmup_ratio is not None:
        return math.ceil(config.warmup_ratio * total_steps)
    return min(DEFAULT_WARMUP_STEPS, math.ceil(DEFAULT_WARMUP_RATIO * total_steps))


def learning_rate(step: int, total_steps: int, config: RunConfig) -> float:
    """Learning rate of optimizer step `step` (from 1): linear warmup, then the schedule.

    Cosine falls to `cosine_min_lr_ratio` of the peak and linear to 0 one step after the last, so
    that no step is spent at a rate of zero.
    """
    warmup = warmup_steps(config, total_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.lr_scheduler == "constant":
        return config.learning_rate
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler == "linear":
        return config.learning_rate * (1.0 - progress)
    floor = config.cosine_min_lr_ratio or 0.0
    wave = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (floor + (1.0 - floor) * wave)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group the rate, times its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]

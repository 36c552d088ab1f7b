"""Which optimizer moves the trained parameters, and how fast at each step.

Apart from the loop because the choice is data from the config and because a resumed run must build
the very same thing again. The schedule is a pure function of the step: it has no state to save.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
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

    Raises UserError for an optimizer that this trainer does not have.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in named:
        (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
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
    """Give every parameter group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate

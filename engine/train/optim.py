"""Which optimizer updates the trained parameters, and how fast at each step.

The schedule is a pure function of the step: it has no state to save. bfloat16 weights are updated
in float32, or most small steps would be rounded away. Afterwards they keep what was cut off (a full
fine-tune), or are rounded at random (an adapter in bfloat16).
"""

import ctypes
import gc
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer

from engine.config import RunConfig
from engine.errors import UserError
from engine.plan.trainer import WIDENED_NUMBERS

ADAMW = {"adamw_torch": False, "adamw_torch_fused": True}
"""PyTorch's own, by whether the update is one fused kernel."""
BITSANDBYTES = {
    "adamw_bnb_8bit": "AdamW8bit",
    "adamw_8bit": "AdamW8bit",
    "adamw_torch_8bit": "AdamW8bit",
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
    named = list(named)
    optimizer = _choose(_groups(named, config), config)
    _update_in_float32(optimizer, frozenset(p for name, p in named if is_lora_matrix(name)))
    return optimizer


def is_lora_matrix(name: str) -> bool:
    """Whether a parameter is one of an adapter's two factors."""
    return "lora_A." in name or "lora_B." in name


def _groups(named: Iterable[tuple[str, nn.Parameter]], config: RunConfig) -> list[dict[str, Any]]:
    """Parameter groups by how they decay and how fast they learn."""
    members: dict[tuple[float, float], dict[str, nn.Parameter]] = {}
    for name, parameter in named:
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        ratio = config.loraplus_lr_ratio if "lora_B" in name else None
        members.setdefault((decay, ratio or 1.0), {})[name] = parameter
    return [
        {
            "params": list(own.values()),
            "names": list(own),
            "weight_decay": decay,
            "lr_ratio": ratio,
        }
        for (decay, ratio), own in members.items()
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


def free_paged_state() -> int:
    """Give back the unified memory of paged states that nobody holds any more; returns its bytes.

    bitsandbytes never frees it: each tensor stays in a list of its own, and the memory was never
    PyTorch's. For a run that begins anew in the same process after memory ran out.
    """
    if "bitsandbytes" not in sys.modules:
        return 0
    from bitsandbytes.functional import GlobalPageManager

    manager = GlobalPageManager.get_instance()
    held = [
        (StorageWeakRef(each.untyped_storage()), each.data_ptr(), each.nbytes)
        for each in manager.paged_tensors
    ]
    manager.paged_tensors = []
    gc.collect()
    # What lives on keeps its memory: to read what was freed would end the process.
    gone = [(pointer, size) for storage, pointer, size in held if storage.expired()]
    if gone:
        runtime = cuda_runtime()
        torch.cuda.synchronize()
        for pointer, _ in gone:
            runtime.cudaFree(ctypes.c_void_p(pointer))
    return sum(size for _, size in gone)


def cuda_runtime() -> ctypes.CDLL:
    """CUDA's runtime library, which torch has loaded."""
    return ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")


def _update_in_float32(optimizer: Optimizer, adapter: frozenset[nn.Parameter]) -> None:
    """Let `optimizer` update bfloat16 weights as if they were float32 ones.

    Near 1.0 two neighbours in bfloat16 are 0.0078 apart: a step of 1e-5 would never arrive, and a
    second moment in bfloat16 could not fall by its 0.1 % a step. So each weight keeps the 16 bits
    that bfloat16 cuts off, as the state `rest`: for the length of a step the two are one float32
    number. That is 2 bytes a weight, and the same numbers as a float32 master copy, which takes 4.
    The matrices of an `adapter` keep none: they are rounded at random, right on average.
    """

    def widen(optimizer: Optimizer, *_: object) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.dtype != torch.bfloat16 or parameter.grad is None:
                continue
            gradient, rest = parameter.grad.float(), optimizer.state[parameter].pop("rest", None)
            parameter.grad = None
            parameter.data = join(parameter.data, rest)
            parameter.grad = gradient
            widened.append(parameter)

    def narrow(optimizer: Optimizer, *_: object) -> None:
        for parameter in widened:
            parameter.grad = None
            if parameter in adapter:
                parameter.data = round_at_random(parameter.data)
            else:
                parameter.data, optimizer.state[parameter]["rest"] = split(parameter.data)
        widened.clear()

    widened: list[nn.Parameter] = []
    if any(p.dtype == torch.bfloat16 for group in optimizer.param_groups for p in group["params"]):
        optimizer.register_step_pre_hook(widen)
        optimizer.register_step_post_hook(narrow)


def take_step(optimizer: Optimizer) -> None:
    """`optimizer.step()`, with few of the bfloat16 weights widened at any time.

    The groups hold a part of the parameters in turns; no number depends on how they are cut.
    """
    groups = optimizer.param_groups
    whole = [group["params"] for group in groups]
    try:
        for part in _parts(whole):
            for group, members in zip(groups, part, strict=True):
                group["params"] = members
            optimizer.step()
    finally:
        for group, members in zip(groups, whole, strict=True):
            group["params"] = members


def _parts(groups: list[list[nn.Parameter]]) -> Iterator[list[list[nn.Parameter]]]:
    """The groups cut so that each part widens at most `WIDENED_NUMBERS`, or one parameter."""
    part: list[list[nn.Parameter]] = [[] for _ in groups]
    wide = 0
    for place, members in enumerate(groups):
        for parameter in members:
            added = parameter.numel() if parameter.dtype == torch.bfloat16 else 0
            if wide and wide + added > WIDENED_NUMBERS:
                yield part
                part, wide = [[] for _ in groups], 0
            part[place].append(parameter)
            wide += added
    yield part


def round_at_random(weight: Tensor) -> Tensor:
    """A float32 tensor in bfloat16, each number up or down at random, so that the mean is kept.

    A random number is added to the 16 bits that are cut off. It comes from torch's own generator,
    whose state is part of a checkpoint.
    """
    bits = weight.view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    return (bits.add(noise) >> 16).to(torch.int16).view(torch.bfloat16)


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as its nearest bfloat16 one, and the int16 that `join` needs beside it.

    With one more tensor of its size beside it, whatever the order of the steps suggests.
    """
    bits = weight.view(torch.int32)
    work = bits.add(0x8000).bitwise_right_shift_(16)
    high = work.to(torch.int16)
    rest = work.bitwise_left_shift_(16).neg_().add_(bits).to(torch.int16)
    return high.view(torch.bfloat16), rest


def join(weight: Tensor, rest: Tensor | None) -> Tensor:
    """The float32 tensor that `split` took apart, bit for bit; without `rest` the plain value."""
    if rest is None:
        return weight.float()
    bits = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(rest).view(torch.float32)


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

"""The router's balance: an addition to the loss that rewards even use of the experts.

The routers are watched from outside, only while a training batch runs forward: what checkpointing
recomputes in the backward pass is not seen and so not counted twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.models.mistral4.modeling_mistral4 import Mistral4TopkRouter

from engine.config import RunConfig

Routing: TypeAlias = tuple[Tensor, Tensor]
"""What one router decided: logits (tokens, experts) and each token's experts (tokens, k)."""
DEFAULT_WEIGHT = 0.001
"""`router_aux_loss_coef` where only `output_router_logits` is given: Mixtral's own."""


def balance_weight(config: RunConfig) -> float:
    """The weight of the balance in the loss, 0 where the config does not ask for it."""
    overrides = config.overrides_of_model_config or {}
    if not overrides.get("output_router_logits"):
        return 0.0
    weight = overrides.get("router_aux_loss_coef", DEFAULT_WEIGHT)
    assert isinstance(weight, int | float)
    return float(weight)


@contextmanager
def watch_routers(model: nn.Module, enabled: bool = True) -> Iterator[list[Routing]]:
    """A list that every router adds its decisions to while the context is open, if `enabled`."""
    seen: list[Routing] = []
    if not enabled:
        yield seen
        return

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits, _, chosen = output
        seen.append((logits, chosen))

    routers = [module for module in model.modules() if isinstance(module, Mistral4TopkRouter)]
    hooks = [router.register_forward_hook(keep) for router in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(routings: Sequence[Routing], real: Tensor) -> Tensor:
    """Experts times the sum, over experts, of their share of tokens and their mean probability.

    Equations 4 to 6 of Switch Transformer (arXiv 2101.03961), over all layers at once as
    transformers' load_balancing_loss_func has it: k where every expert is used alike. `real` says
    which tokens are no padding, bool, as many as the routers saw.
    """
    kept = real.reshape(-1, 1).float()
    rows = kept.sum() * len(routings)
    experts = routings[0][0].shape[1]
    used = kept.new_zeros(experts)
    probability = kept.new_zeros(experts)
    for logits, chosen in routings:
        used = used.scatter_add(0, chosen.reshape(-1), kept.expand_as(chosen).reshape(-1))
        probability = probability + (torch.softmax(logits, -1, torch.float32) * kept).sum(0)
    return experts * (used / rows * probability / rows).sum()

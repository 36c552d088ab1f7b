"""One card's share of a run that is divided over several.

FSDP2 divides every weight, gradient and state over the cards of one copy; HSDP's further copies
change nothing on a card. Expert parallelism divides the experts in another direction and to the
same size, but never gathers them. What a forward and backward pass holds is each card's own, and
so is what is gathered: a layer at work with the next one on its way, the root's embedding and head
for as long as the pass lasts, and the gradients of a layer before they are scattered.
"""

from collections.abc import Mapping

from engine.config import RunConfig
from engine.plan.memory.frozen import WEIGHTS
from engine.plan.memory.step import Step

DIVIDED = (*WEIGHTS, "adapter", "gradients", "optimizer", "loading", "update")
GATHERED_LAYERS = 2


def cards_of_a_copy(config: RunConfig) -> int | None:
    """Cards that hold one copy together: 1 without sharding, None where the config does not say."""
    if config.fsdp_config is None and not config.deepspeed:
        return 1
    return config.dp_shard_size


def is_sharded(config: RunConfig) -> bool:
    """Whether a config divides its weights over cards."""
    return cards_of_a_copy(config) != 1


def cards_laid_out(config: RunConfig) -> int | None:
    """Cards that a config is written for: 1 without sharding, None where it does not say."""
    each = cards_of_a_copy(config)
    return None if each is None else each * (config.dp_replicate_size or 1)


def divide(parts: Mapping[str, float], step: Step, cards: int) -> dict[str, float]:
    """`parts` of a moment as each of `cards` cards holds them."""
    config, layers = step.config, step.widths.layers
    shares = {name: size / cards if name in DIVIDED else size for name, size in parts.items()}
    each = parts.get("linear", 0) + parts.get("norms", 0) + parts.get("router", 0)
    apart = config.expert_parallel_size or 1
    each += parts.get("experts", 0) * (0 if apart > 1 else 1)
    gathered = GATHERED_LAYERS * each / layers + parts.get("embeddings", 0)
    scattered = 0.0 if config.adapter else parts.get("gradients", 0) / layers
    return shares | {"gathered": gathered + scattered}

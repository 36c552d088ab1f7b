"""How many cards a run needs that one cannot hold, when its weights are sharded over them.

Separate from `memory`, whose figures are of one card: here they are split by FSDP's rule. Weights,
gradients, optimizer state and what moving the weights takes are divided; what a forward and
backward pass holds is each card's own, and so are two layers that are gathered whole, one at work
and the next one on its way.
"""

from math import ceil

from engine.config import RunConfig
from engine.plan.device import Device
from engine.plan.layers import Widths, transient_bytes
from engine.plan.memory import Estimate, on_device

BF16_BYTES = 2


def cards_laid_out(config: RunConfig) -> int | None:
    """Cards that a config is written for: 1 without sharding, None where it does not say."""
    if config.fsdp_config is None and not config.deepspeed:
        return 1
    if config.dp_shard_size is None:
        return None
    return config.dp_shard_size * (config.dp_replicate_size or 1)


def cards_needed(config: RunConfig, needs: Estimate, sizes: Widths, device: Device) -> int | None:
    """The fewest cards like `device` that hold a bfloat16 run sharded over them; None: none would.

    `needs` is the same run's need on a single card of that kind.
    """
    parts = needs.parts
    working = transient_bytes(config, sizes, needs.tokens_at_once, BF16_BYTES)
    own = parts["activations"] + min(parts["layer"], working) + parts.get("mask", 0)
    divided = needs.peak_allocated_bytes - own
    gathered = 2 * (parts.get("weights", 0) + parts.get("experts", 0)) // sizes.layers
    spare = device.can_give_bytes - on_device(own + gathered, device)
    return ceil((on_device(divided, device) - on_device(0, device)) / spare) if spare > 0 else None

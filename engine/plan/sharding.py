"""How many cards a run needs that one cannot hold.

Separate from `memory`, which divides a run over a number of cards that is given: here the fewest
are found that hold it.
"""

from dataclasses import replace

from engine.catalog import Architecture
from engine.config import SHARDED_OPTIMIZERS, RunConfig
from engine.data.statistics import Statistics
from engine.plan.device import Device
from engine.plan.memory import cards_of_a_copy, estimate

MOST_CARDS = 1024


def is_sharded(config: RunConfig) -> bool:
    """Whether a config divides its weights over cards."""
    return cards_of_a_copy(config) != 1


def cards_laid_out(config: RunConfig) -> int | None:
    """Cards that a config is written for: 1 without sharding, None where it does not say."""
    each = cards_of_a_copy(config)
    return None if each is None else each * (config.dp_replicate_size or 1)


def cards_needed(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
) -> int | None:
    """The fewest cards like `device` that hold the run sharded over them; None: none would.

    One card where the run fits it as it is.
    """
    sharded = {
        "fsdp_config": config.fsdp_config or {},
        "optimizer": SHARDED_OPTIMIZERS.get(config.optimizer, config.optimizer),
    }

    def fits(cards: int) -> bool:
        keys = {**sharded, "dp_shard_size": cards} if cards > 1 else {"fsdp_config": None}
        laid_out = config.model_copy(update=keys)
        found = estimate(laid_out, architecture, replace(device, count=1), statistics)
        return found.device_bytes <= device.can_give_bytes

    if not fits(MOST_CARDS):
        return None
    least, enough = 0, MOST_CARDS
    while enough - least > 1:
        middle = (least + enough) // 2
        least, enough = (least, middle) if fits(middle) else (middle, enough)
    return enough

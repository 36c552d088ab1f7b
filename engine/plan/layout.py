"""How a run is laid over its cards, as its config says it.

A copy of the model is sharded over `shard` cards (FSDP2), and each of its matrices may be cut over
`tensor` of them. `replicate` copies learn side by side and only their gradients meet: HSDP, or DDP
where a copy is one card. Experts may be spread over `expert` cards of a copy, which takes no card
of its own.
"""

from dataclasses import dataclass

from engine.catalog import ModuleTable
from engine.config import RunConfig
from engine.errors import UserError
from engine.plan.device import Device
from engine.plan.layers import widths
from engine.units import counted

RESIZED = frozenset({"dp_shard_size", "dp_replicate_size"})
"""Keys that may change while a run goes on: its steps learn the same rows on any number of ranks
where `gradient_accumulation_steps` makes up for it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Numbers of cards."""

    shard: int = 1
    replicate: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def copy(self) -> int:
        """Cards that hold one copy together."""
        return self.shard * self.tensor

    @property
    def cards(self) -> int:
        """All of them: the ranks of a run."""
        return self.copy * self.replicate

    @property
    def readers(self) -> int:
        """Ranks that read rows of their own; those that share a matrix share the rows too."""
        return self.shard * self.replicate


ONE = Layout()


def is_sharded(config: RunConfig) -> bool:
    """Whether a config divides its weights over cards."""
    if config.dp_shard_size is None:
        return config.fsdp_config is not None or bool(config.deepspeed)
    return config.dp_shard_size > 1


def layout_of(config: RunConfig) -> Layout | None:
    """The layout of a config, one card where it names none; None for one that is sharded over all
    cards that there are."""
    if is_sharded(config) and config.dp_shard_size is None:
        return None
    return _layout(config, config.dp_shard_size or 1)


def layout_among(config: RunConfig, cards: int) -> Layout:
    """The same among so many cards: where the config leaves the number open, all of them."""
    found = layout_of(config)
    if found is None:
        copies = (config.dp_replicate_size or 1) * (config.tensor_parallel_size or 1)
        found = _layout(config, max(1, cards // copies))
    return found


def layout_on(config: RunConfig, device: Device) -> Layout:
    """The same among all cards of a device."""
    return layout_among(config, device.cards)


def refuse_spread(layout: Layout | None, table: ModuleTable) -> None:
    """Raises UserError where a layout spreads experts that the model of `table` does not have, or
    cannot divide over its cards; None, of cards that nobody has counted yet, passes."""
    if layout is None or layout.expert == 1:
        return
    sizes, key = widths(table), f"expert_parallel_size: {layout.expert}"
    if not sizes.expert_stack:
        raise UserError(
            f"{key} has nothing to spread.",
            "The model has no experts: every token passes through all of its layers.",
            "Remove it; dp_shard_size shards the whole model.",
        )
    experts = sizes.expert_stack // sizes.expert_matrix
    if layout.shard % layout.expert or experts % layout.shard:
        most = layout.shard if layout.shard > 1 else layout.expert
        shard = next(n for n in range(most, 0, -1) if experts % n == 0)
        parts = next(n for n in range(min(layout.expert, shard), 0, -1) if shard % n == 0)
        raise UserError(
            f"{key} cannot divide {experts} experts over {counted(layout.shard, 'GPU')}.",
            "It spreads them over the dp_shard_size GPUs that hold one copy, and takes none of its "
            "own: it divides their number, and their number that of the experts.",
            f"Write dp_shard_size: {shard} and expert_parallel_size: {parts}.",
        )


def _layout(config: RunConfig, shard: int) -> Layout:
    return Layout(
        shard,
        config.dp_replicate_size or 1,
        config.tensor_parallel_size or 1,
        config.expert_parallel_size or 1,
    )

"""What one rank holds of a job: cut along matrices and layers by AutoModel, and sharded here.

The first is arithmetic over the module table for 1F1B with whole layers computed a second time; it
was not measured. The second is the plan's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.cluster.automodel import MICROBATCH, Grid, batch_size
from engine.config import RunConfig
from engine.plan import Place, estimate
from engine.plan.duration import pace_of
from engine.plan.layers import transient_bytes, widths
from engine.plan.layout import Layout
from engine.plan.memory import on_device
from engine.plan.targets import adapter_parameters, trainable_parameters
from engine.plan.verdict import Verdict, judge

COMPUTED_BYTES = 2
"""Of a number while it is computed with: bfloat16."""
ADAM_BYTES = 8
"""Two moments in float32."""
LOGIT_BYTES = 10
"""Of a token and word: the product in bfloat16, a copy in float32, and its gradient."""


@dataclass(frozen=True, slots=True)
class Share:
    """One way to lay out a job, and what its fullest rank holds."""

    name: str
    device_bytes: int
    parts: dict[str, int]
    verdict: Verdict
    step_seconds: float | None
    """Of an optimizer step, by the card's data sheet; None for a card without one."""


def grid_share(config: RunConfig, place: Place, layout: Layout, grid: Grid) -> Share:
    """The fullest of the first stage, which has embedding, tower and the most states in flight, and
    the last, which has the head and the logits. Its step waits while the pipeline fills and drains;
    what its ranks send is not counted."""
    counts, sizes = place.table.counts_by_group(), widths(place.table)
    tokens = MICROBATCH * config.sequence_len
    layers = counts["attention"] + counts["mlp"] + counts["norm"]
    full = config.adapter is None
    held = 4 if full else COMPUTED_BYTES
    seen = counts["vision"] + counts["projector"]
    learned = trainable_parameters(place.table, config) / (
        layers + counts["embedding"] + counts["head"]
    )
    state = tokens * sizes.hidden * COMPUTED_BYTES
    stages = []
    for ends, in_flight, logits in (
        (counts["embedding"], grid.pipeline, 0),
        (counts["head"], 1, tokens * sizes.vocabulary),
    ):
        stage = (layers / grid.pipeline + ends) / grid.tensor
        mine = stage / grid.data
        trained = mine * learned if full else adapter_parameters(place.table, config) / grid.ranks
        stages.append(
            {
                "weights": held * mine + (0 if full else 4 * trained),
                "tower": held * seen / grid.data if logits == 0 else 0,
                "gradients": 4 * trained,
                "optimizer": ADAM_BYTES * trained,
                "gathered": COMPUTED_BYTES * stage if full or grid.data > 1 else 0,
                "activations": in_flight * sizes.layers / grid.pipeline * state,
                "layer": transient_bytes(config, sizes.cut(grid.tensor), tokens, COMPUTED_BYTES),
                "logits": LOGIT_BYTES * logits / grid.tensor,
            }
        )
    parts = max(stages, key=lambda stage: sum(stage.values()))
    needed = on_device(int(sum(parts.values())), place.device)
    rounded = {name: int(size) for name, size in parts.items() if size >= 1}
    alone = pace_of(_laid_out(config, 1, 1), place)
    busy = alone and grid.ranks * alone * (1 - grid.idle_share)
    seconds = _step_tokens(config, layout) / busy if busy else None
    verdict = judge(needed, place.device.can_give_bytes)
    return Share(grid.words(), needed, rounded, verdict, seconds)


def our_shares(
    config: RunConfig, place: Place, layout: Layout, gpus_per_node: int
) -> Iterator[Share]:
    """Our own run over as many ranks: FSDP2 over all, and HSDP with copies of whole nodes."""
    ranks = layout.cards
    replicas = [n for n in (1, 2, 4, 8) if ranks % n == 0 and ranks // n >= gpus_per_node]
    for copies in replicas:
        shard = ranks // copies
        laid_out = _laid_out(config, shard, copies)
        needs, pace = estimate(laid_out, place), pace_of(laid_out, place)
        name = f"FSDP2 over {shard}" if copies == 1 else f"HSDP, {copies} copies over {shard} each"
        seconds = _step_tokens(config, layout) / pace if pace else None
        yield Share(name, needs.device_bytes, dict(needs.parts), needs.verdict, seconds)


def _laid_out(config: RunConfig, shard: int, copies: int) -> RunConfig:
    keys = {
        "dp_shard_size": shard,
        "dp_replicate_size": copies,
        "tensor_parallel_size": 1,
        "fsdp_config": (config.fsdp_config or {}) if shard > 1 else None,
    }
    return config.model_copy(update=keys)


def _step_tokens(config: RunConfig, layout: Layout) -> int:
    return batch_size(config, layout) * config.sequence_len

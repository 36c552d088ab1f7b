"""What ranks send each other, and how long a step takes beside it.

Sizes are those of the whole tensors that a collective is given; of n ranks each receives (n - 1) of
n parts. In a ring over all ranks of a node, and all adapters of its network, the slower of the two
sets the pace: 360 of 450 GB/s are usual between H100s (NVIDIA/nccl-tests issue 326), 46 to 48 of 50
through each adapter (issue 290), so that `duration.MOVED` of the data sheet holds here too. Of
cards without a link of their own half the bus is counted: two of a desk share the processor's
lanes, and what they send passes through its memory. While a layer computes, the next one is
gathered and gradients of the last one are scattered; what comes first and last waits for nobody. No
time is counted for starting a collective, so that many ranks with little to do are slower.
"""

from dataclasses import dataclass
from math import ceil

from engine.hardware import Speed
from engine.plan.layout import Layout
from engine.plan.sharding import SUM_BYTES, defers, own_numbers, units
from engine.plan.step import Step
from engine.plan.targets import adapter_inputs

PEER_SHARE = 0.5
"""Of the bus to this computer, where cards have no link of their own."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Whole tensors that collectives of one optimizer step are given, in bytes."""

    gathered_forward: float = 0.0
    gathered_backward: float = 0.0
    scattered: float = 0.0
    summed: float = 0.0
    """All-reduced over replicas: each rank's own part."""
    first: float = 0.0
    """Of what is gathered, in each micro-batch before anything computes."""
    exchanged: float = 0.0
    """All-reduced inside layers that several cards share, or sent between their experts."""


def traffic_of(step: Step, layout: Layout) -> Traffic:
    """Of an optimizer step of `step`'s config, as one rank of `layout` sees it."""
    config, passes = step.config, step.config.gradient_accumulation_steps
    times = 1 if defers(step) or layout.shard == 1 else passes
    trained = SUM_BYTES * _padded(step, layout)
    summed = times * trained / layout.shard if layout.replicate > 1 else 0.0
    # Tensor parallelism adds up the states twice a layer, forward and backward; experts that are
    # elsewhere get each token's rows and send them back, once more where a layer is computed twice.
    states = step.tokens * step.widths.hidden * step.base_bytes * step.widths.layers * passes
    exchanged = 4.0 * states if layout.tensor > 1 else 0.0
    if layout.expert > 1:
        ways = 6.0 if config.gradient_checkpointing else 4.0
        exchanged += ways * states * step.widths.expert_rows
    if layout.shard == 1:
        return Traffic(summed=summed, exchanged=exchanged)
    unit = units(step, layout)
    adapter = step.adapter_bytes * (_padded(step, layout) - step.trainable)
    layers = unit.layer * step.widths.layers + (adapter if config.adapter else 0.0)
    towers = unit.tower + unit.projector if step.of_images else 0.0
    return Traffic(
        # A tied pair is one unit, and gathered twice like two.
        passes * (unit.embedding + towers + layers + unit.head),
        passes * layers,
        times * (trained - SUM_BYTES * own_numbers(step, layout)),
        summed,
        unit.embedding + unit.layer,
        exchanged,
    )


def _padded(step: Step, layout: Layout) -> float:
    """Trained numbers with the rows that ranks without one of an adapter's A send."""
    if not step.config.adapter:
        return float(step.trainable)
    rows = step.config.lora_r
    more = ceil(rows / layout.shard) * layout.shard - rows
    return step.trainable + adapter_inputs(step.table, step.config) * more


def link_bytes(speed: Speed, ranks: int, here: int) -> float | None:
    """Bytes a second that each of `ranks` receives in a ring, `here` of them on each computer; None
    for several computers whose network is not known."""
    local = speed.peer_bytes or speed.link_bytes * PEER_SHARE
    if ranks <= here:
        return local
    if speed.network_bytes is None:
        return None
    return min(local, here * speed.network_bytes) if here > 1 else speed.network_bytes


@dataclass(frozen=True, slots=True)
class Sending:
    """Seconds that a rank's collectives take in one optimizer step."""

    forward: float
    """Of each micro-batch, as the next two; what is gathered first among it."""
    backward: float
    first: float
    adding: float
    """Of replicas, once."""
    inside: float
    """Inside layers that several cards share."""


def sending(step: Step, layout: Layout, speed: Speed, reached: float) -> Sending | None:
    """How long collectives take at a share `reached` of the links' speed; None where a link is not
    known."""
    sent, passes = traffic_of(step, layout), step.config.gradient_accumulation_steps
    here = step.device.count
    ring = link_bytes(speed, layout.shard, here)
    # Replicas of a sharded copy are on other computers where a copy fills one.
    between = link_bytes(speed, layout.replicate, 1 if layout.shard >= here else here)
    if ring is None or between is None:
        return None
    part = (layout.shard - 1) / layout.shard / (ring * reached)
    added = 2 * (layout.replicate - 1) / layout.replicate * sent.summed / (between * reached)
    inside = sent.exchanged / (link_bytes(speed, 1, here) or ring) / reached
    return Sending(
        sent.gathered_forward * part / passes,
        (sent.gathered_backward + sent.scattered) * part / passes,
        sent.first * part,
        added,
        inside,
    )


def step_seconds(
    step: Step, layout: Layout, computing: float, speed: Speed, reached: float
) -> tuple[float, float] | None:
    """(where all that can is sent while layers compute, where nothing is) of an optimizer step
    whose micro-batch computes for so many seconds; None where a link is not known."""
    takes, passes = sending(step, layout, speed, reached), step.config.gradient_accumulation_steps
    if takes is None:
        return None
    forward = computing / (3 if step.config.adapter else 4)  # of about as many equal passes
    first = takes.first
    behind = max(forward, takes.forward - first) + max(computing - forward, takes.backward)
    # Sharded, replicas add up while the pass goes on; whole copies do when it is over.
    last = takes.adding if layout.shard == 1 else max(0.0, takes.adding - (computing - forward))
    best = passes * (first + behind) + last + takes.inside
    worst = passes * (computing + takes.forward + takes.backward) + takes.adding + takes.inside
    return best, worst

"""Which processes a computer starts for a config: one for each rank, with a card of its own.

Where the driver shows no card at all they compute on the processor, so that a config for several
cards can be tried anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from engine.config import RunConfig, assignment
from engine.errors import DOES_NOT_FIT, UserError
from engine.hardware import Gpu, Machine
from engine.plan.device import best_device
from engine.plan.layout import Layout, layout_on
from engine.units import counted

RANKS_A_CORE: Final = 2
"""More processes than that only wait for each other."""


@dataclass(frozen=True, slots=True)
class Crew:
    """The processes of a run on this computer."""

    count: int = 1
    gpus: tuple[Gpu, ...] = ()
    """The card of each; empty where they compute on the processor."""


def crew_of(
    config: RunConfig, machine: Machine, nodes: int = 1, planned: Sequence[str] = ()
) -> Crew:
    """What `machine`, one of `nodes` alike, starts for a config; of its cards, those with the UUIDs
    `planned` first.

    Raises UserError with the smallest change where the ranks cannot be divided over the computers,
    and with exit status 3 where there are too few cards, or cores in their place.
    """
    device = best_device(machine)
    layout = layout_on(config, replace(device, nodes=nodes))
    count, rest = divmod(layout.cards, nodes)
    if rest:
        raise UserError(
            f"{layout.cards} ranks cannot be divided over {nodes} computers.",
            "Each of them starts as many as the others.",
            "Change --nodes, or dp_shard_size and dp_replicate_size.",
        )
    if count == nodes == 1:
        return Crew(1, tuple(gpu for gpu in machine.gpus if gpu.uuid == device.uuid))
    if all(gpu.state == "hidden" for gpu in machine.gpus):
        most = RANKS_A_CORE * machine.cpu_count
        if count > max(1, most):
            cores = counted(machine.cpu_count, "core")
            why = f"There is no GPU, and {cores} are enough for {most} processes."
            raise _too_few(config, layout, most, nodes, why)
        return Crew(count)
    free = {
        gpu.uuid: gpu
        for each in (device, *device.others)
        for gpu in machine.gpus
        if gpu.uuid == each.uuid
    }
    order = [uuid for uuid in planned if uuid in free] + [u for u in free if u not in planned]
    if len(free) < count:
        left_out = "; ".join(("", *device.left_out))
        why = f"Each has a card of its own, and {counted(len(free), 'GPU')} can be used{left_out}."
        raise _too_few(config, layout, len(free), nodes, why)
    return Crew(count, tuple(free[uuid] for uuid in order[:count]))


def _too_few(config: RunConfig, layout: Layout, most: int, nodes: int, why: str) -> UserError:
    each = "" if nodes == 1 else f" on each of {nodes} computers"
    return UserError(
        f"The config is for {layout.cards // nodes} ranks{each}, and this computer can start"
        f" {most}.",
        why,
        f"The smallest change: {' '.join(_fewer(config, layout, most * nodes))}, behind the config,"
        " for as many sequences a step.",
        exit_status=DOES_NOT_FIT,
    )


def _fewer(config: RunConfig, layout: Layout, most: int) -> list[str]:
    """`key=value` that make a run of at most `most` ranks learn the same rows in each step."""
    tensor = layout.tensor if layout.tensor <= most else 1
    readers = max(n for n in range(1, max(1, most // tensor) + 1) if layout.readers % n == 0)
    # As much of a copy as there was, so that it fits; further copies only make it faster.
    shard = max(n for n in range(1, min(layout.shard, readers) + 1) if readers % n == 0)
    sums = config.gradient_accumulation_steps * (layout.readers // readers)
    values: dict[str, object] = {
        "dp_shard_size": shard,
        "dp_replicate_size": readers // shard,
        "tensor_parallel_size": tensor,
        "gradient_accumulation_steps": sums,
    }
    return [
        assignment(key, value)
        for key, value in values.items()
        if value != (getattr(config, key) or 1)
    ]

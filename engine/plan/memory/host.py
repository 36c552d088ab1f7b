"""What a run takes of this computer's memory and of its disk.

Separate from `moments`, which is about the device: weights and activations that are kept here make
room there.
"""

from engine.catalog import Architecture
from engine.data.statistics import Statistics
from engine.plan.memory.frozen import Frozen, Sizes
from engine.plan.memory.moments import Step, kept_states
from engine.plan.memory.trainable import PAGED, adapter_bytes, rest_bytes, state_bytes
from engine.plan.trainer import PIECE_BYTES
from engine.units import GIB

CUDA_PROCESS_BYTES = 3 * GIB
"""A process with torch, transformers, peft and a CUDA context, beside the tensors it loads."""
TOKEN_BYTES = 7
"""Of a prepared row, a token: its id in 4 bytes, its kind in 1, its source in 2."""


def host_bytes(step: Step, frozen: Frozen, sizes: Sizes) -> int:
    """The process, what is kept here for the device, and what loading or a save passes on.

    A tensor that is loaded is here twice: as it is in its file, and in the base precision.
    """
    config = step.config
    state = step.trainable.all * state_bytes(config, step.stack)
    paged = state if step.offloads and config.optimizer in PAGED else 0
    loaded = 2 * sizes.largest * step.base_bytes
    kept = sum(frozen.host.values()) + kept_states(step)[1]
    return int(CUDA_PROCESS_BYTES + kept + paged + max(loaded, PIECE_BYTES))


def disk_bytes(
    step: Step, architecture: Architecture, sizes: Sizes, statistics: Statistics | None
) -> int:
    """The download, the prepared rows, the checkpoints that are kept, and the result."""
    config, trainable = step.config, step.trainable
    made_here = architecture.card is not None and not architecture.card.repositories
    stored = {"fp8": 1, "fp32": 4}.get(architecture.checkpoint, 2)
    download = 0 if made_here or architecture.folder else sizes.all * stored
    rows = TOKEN_BYTES * statistics.total_tokens if statistics else 0
    width = adapter_bytes(config, step.stack) if config.adapter else step.base_bytes
    held = width * trainable.all
    save = held + trainable.all * state_bytes(config, step.stack)
    save += rest_bytes(trainable, step.base_bytes, step.stack)
    result = held if config.adapter else sizes.all * step.base_bytes
    return int(download + rows + config.save_total_limit * save + result)

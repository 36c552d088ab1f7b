"""What a config's run takes here, measured in a process with torch on random weights."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from engine.child import TRAINER, torch_process
from engine.config import RunConfig, write_config
from engine.events import Recorded, parse
from engine.hardware import cuda_environment
from engine.launch import require_torch
from engine.plan import best_device
from engine.plan.measured import Measurement, store
from engine.runs import RunFolder
from engine.wizard.request import find_machine

STEPS: Final = 3
"""The first makes the optimizer's state and warms up; the others are timed."""


def measure(
    run: RunConfig,
    steps: int = STEPS,
    module: str = TRAINER,
    show: Callable[[Recorded], object] | None = None,
) -> dict[str, Any]:
    """The record of a process that measures `run` here; `show` gets its events.

    Paths of `run` are absolute. Raises UserError with exit status 3 where memory runs out.
    """
    with tempfile.TemporaryDirectory(prefix="windtunnel-fit-") as scratch:
        folder = RunFolder(Path(scratch).resolve())
        write_config(run, {}, folder.config)
        arguments = ["fit", str(folder.path), "--steps", str(steps)]
        with torch_process(arguments, _one_gpu(), module) as process:
            for record in process.listen(until="fitted"):
                event = parse(record)
                if event and show:
                    show(Recorded(record["seq"], record["time"], event))
    found: dict[str, Any] = record["fitted"]
    return found


def measure_and_keep(run: RunConfig) -> dict[str, Any]:
    """Measure `run` here and keep the figures, which the estimate has from then on.

    Raises what `measure` raises.
    """
    fitted = measure(run)
    store(Measurement(**fitted["measurement"]))
    return fitted


def _one_gpu() -> dict[str, str]:
    """What makes CUDA show the process the card that a run would be given."""
    machine = find_machine(None)
    uuid = best_device(machine).uuid
    require_torch(machine, uuid)
    return cuda_environment([gpu for gpu in machine.gpus if gpu.uuid == uuid] if uuid else [])

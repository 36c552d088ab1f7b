"""What this computer can train with, found out without torch and without trusting a driver.

`machine` has the values; `driver` asks NVML and `findings` says what is wrong; `visibility` knows
CUDA_VISIBLE_DEVICES; `host` and `packages` read the rest; `torch_build` and `toolchain` say what
keeps them from working together, `commands` how to mend it; `planned` stands in for GPUs that are
not here; `reading` puts them together.
"""

from engine.hardware.machine import Gpu, GpuProcess, Machine, Problem
from engine.hardware.packages import Missing, missing_packages, torch_problem
from engine.hardware.planned import (
    KnownGpu,
    Speed,
    attention_backends,
    flash_4_on,
    known_gpus,
    listed_gpus,
    speed_of,
)
from engine.hardware.reading import assume, cuda_environment, poll, read_machine

__all__ = [
    "Gpu",
    "GpuProcess",
    "KnownGpu",
    "Machine",
    "Missing",
    "Problem",
    "Speed",
    "assume",
    "attention_backends",
    "cuda_environment",
    "flash_4_on",
    "known_gpus",
    "listed_gpus",
    "missing_packages",
    "poll",
    "read_machine",
    "speed_of",
    "torch_problem",
]

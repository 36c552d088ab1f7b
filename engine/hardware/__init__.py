"""What this computer can train with, found out without torch and without trusting a driver.

`machine` has the values; `driver` asks NVML, and says what is wrong with the cards; `packages` says
what is installed, what is missing and how to mend it; `known` has the cards that one need not have;
`reading` puts them together, with the host and what CUDA_VISIBLE_DEVICES hides.
"""

from engine.hardware.known import (
    KnownGpu,
    Speed,
    attention_backends,
    flash_4_on,
    known_gpus,
    listed_gpus,
    speed_of,
)
from engine.hardware.machine import Gpu, GpuProcess, Machine, Problem
from engine.hardware.packages import Missing, missing_packages, torch_problem
from engine.hardware.reading import assume, cuda_environment, poll, read_machine

"""What the tests of the hardware share."""

from engine.hardware import Machine, Problem
from tests.fakes.nvml import H100

SLICES = (
    H100.replace("mig=0", "mig=1"),
    "slice parent=GPU-aaaa-1 uuid=MIG-s-1 name=NVIDIA_H100_80GB_HBM3_MIG_3g.40gb total=42949672960"
    " used=10 procs=41:7",
    "slice parent=GPU-aaaa-1 uuid=MIG-s-2 name=NVIDIA_H100_80GB_HBM3_MIG_1g.10gb total=10737418240",
)


def problem(machine: Machine, name: str) -> Problem:
    (found,) = [each for each in machine.problems if each.id == name]
    for sentence in (found.what, found.why, found.fix):
        assert sentence[0].isupper()
        assert sentence.endswith(".")
    return found

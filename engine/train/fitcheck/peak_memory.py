"""What is allocated at the worst moment of a piece of work, on a GPU and on a CPU.

CUDA's allocator keeps its own peak. On a CPU nothing does, but the allocator reports every block to
torch's profiler, also those that a kernel takes and gives back inside one operation, which no
counter of tensors sees.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.autograd.profiler import profile

from engine.hardware import Machine, poll, read_machine
from engine.units import gib


@dataclass(frozen=True, slots=True)
class Peak:
    """The worst moment of one piece of work."""

    allocated_bytes: int
    """All tensors together, with those from before."""
    reserved_bytes: int | None = None
    """What the allocator held; None on a CPU, which has no such store."""


class PeakMemory(Protocol):
    """The peak of each piece of work on one device."""

    device: torch.device
    peaks: dict[str, Peak]
    """By the name of each piece of work."""

    def measure(self, name: str) -> AbstractContextManager[None]:
        """A context for one piece of work; also where the work fails its peak is kept."""

    def wait(self) -> None:
        """Return when everything that was asked of the device is done."""

    def device_bytes(self) -> int | None:
        """What the process takes of the device now, or has taken of RAM at most; None: unknown."""


class CpuPeakMemory:
    """Peaks of torch's allocator on a CPU; it has to be there before what it shall count."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.peaks: dict[str, Peak] = {}
        self._live_bytes = 0
        gc.collect()  # an earlier measurement's garbage would be taken off this one's

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """See `PeakMemory`. Between two contexts nothing may be given back or taken."""
        watched = profile(use_kineto=True, profile_memory=True)
        watched.__enter__()
        try:
            yield
        finally:
            watched.__exit__(None, None, None)
            self.peaks[name] = Peak(self._add_up(watched))

    def _add_up(self, watched: profile) -> int:
        results: Any = watched.kineto_results
        blocks = [event for event in results.events() if event.name() == "[memory]"]
        peak = self._live_bytes
        for block in sorted(blocks, key=lambda event: event.start_ns()):
            self._live_bytes += block.nbytes()  # negative for one that is given back
            peak = max(peak, self._live_bytes)
        return peak

    def wait(self) -> None:
        """A CPU has done what it was asked for."""

    def device_bytes(self) -> int | None:
        """The most RAM that the process ever held, Python and its libraries included."""
        try:
            fields = Path("/proc/self/status").read_text("utf-8")
        except OSError:
            return None
        lines = (line.split() for line in fields.splitlines())
        return next((int(line[1]) * 1024 for line in lines if line[0] == "VmHWM:"), None)


class CudaPeakMemory:
    """Peaks of CUDA's allocator, and the driver's word on what the process takes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, Peak] = {}
        self._before = read_machine()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """See `PeakMemory`."""
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            self.peaks[name] = Peak(
                torch.cuda.max_memory_allocated(self.device),
                torch.cuda.max_memory_reserved(self.device),
            )

    def wait(self) -> None:
        """Wait for the card, which works behind Python's back."""
        torch.cuda.synchronize(self.device)

    def device_bytes(self) -> int | None:
        """What NVML says of this process; where it keeps that to itself, what the card lost."""
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        return used_by_process(self._before, poll(self._before), uuid, os.getpid())


def used_by_process(before: Machine, now: Machine, uuid: str, process: int) -> int | None:
    """Bytes that `process` takes of the card `uuid`, which torch writes without NVML's prefix."""
    for old, gpu in zip(before.gpus, now.gpus, strict=True):
        if not gpu.uuid.endswith(uuid):
            continue
        own = [each.memory_bytes for each in gpu.processes or () if each.pid == process]
        if own and own[0] is not None:
            return own[0]
        if gpu.memory_used_bytes is not None and old.memory_used_bytes is not None:
            return max(0, gpu.memory_used_bytes - old.memory_used_bytes)
    return None


def open_peak_memory(device: torch.device) -> PeakMemory:
    """The memory of the device on which a run would compute."""
    return CudaPeakMemory(device) if device.type == "cuda" else CpuPeakMemory()


def describe_peak(memory: PeakMemory, name: str) -> str:
    """What was held at the worst moment of a piece of work."""
    peak = memory.peaks.get(name)
    return gib(peak.allocated_bytes) if peak else "nothing yet"

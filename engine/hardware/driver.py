"""What NVIDIA's driver says about the GPUs, asked through NVML; silence is an answer too.

A driver can hang inside any call, for minutes, and take its caller with it: so every question is
asked in a thread of its own and given up after a while. Whatever one card will not say costs
that card one field, and never the other cards.
"""

import os
import pwd
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pynvml

from engine.hardware.machine import Gpu, GpuProcess, Problem, is_unified
from engine.visible import visible

# One caller at a time: while a call hangs, the next one waits for it and not in a second thread.
_busy = threading.Lock()
_LOST = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)
# Tried in this order: the first version counts what the driver keeps for itself as used.
_MEMORY_VERSIONS = (pynvml.nvmlMemory_v2, None)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the driver said in one visit."""

    gpus: tuple[Gpu, ...] = ()
    problems: tuple[Problem, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    silent: bool = False


def ask(question: Callable[[], Answer], timeout_seconds: float) -> Answer:
    """The answer of `question`, or a silent one when it takes longer than that."""
    deadline = time.monotonic() + timeout_seconds
    silent = Problem(
        "driver_silent",
        "error",
        f"The NVIDIA driver has not answered for {timeout_seconds:g} s.",
        "A hung driver does this, and nvidia-smi would hang too.",
        "Look again in a minute; if it stays silent, restart the computer.",
    )
    silence = Answer(problems=(silent,), silent=True)
    if not _busy.acquire(timeout=timeout_seconds):
        return silence
    answer: Future[Answer] = Future()

    def work() -> None:
        try:
            answer.set_result(question())
        except Exception as error:
            answer.set_exception(error)
        finally:
            _busy.release()

    threading.Thread(target=work, name="nvml", daemon=True).start()
    try:
        return answer.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return silence


def read_cards(ram: tuple[int, int]) -> Answer:
    """All cards and slices; `ram` is total and free bytes, for cards that have no other memory."""
    with suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return Answer(problems=(_no_driver(error.value, str(error)),))
    # It stays open: without a program that uses it the driver shuts the cards down, and waking
    # them takes seconds.
    questions = _Questions()
    gpus = [gpu for index in range(count) for gpu in _read_card(index, questions, ram)]
    problems = [*_problems_of(gpus), *questions.problems()]
    if not count:
        what = "The NVIDIA driver works and has no GPU."
        why = "None is plugged in, or none was handed to this container."
        problems.append(Problem("no_gpu", "warning", what, why, _PLAN))
    cuda = questions.ask("CUDA version", pynvml.nvmlSystemGetCudaDriverVersion_v2)
    return Answer(
        tuple(gpus),
        tuple(problems),
        questions.ask("driver version", pynvml.nvmlSystemGetDriverVersion),
        None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
    )


def refresh_cards(gpus: Sequence[Gpu], ram: tuple[int, int]) -> Answer:
    """The same cards with their memory, load, heat and processes as they are now."""
    questions = _Questions()
    now = tuple(_refresh(gpu, questions, ram) for gpu in gpus)
    return Answer(now, tuple([*_problems_of(now), *questions.problems()]))


class _Questions:
    """Asks, and remembers what the driver would not answer and why."""

    def __init__(self) -> None:
        self.error: int | None = None
        self.unknown_to_driver: list[str] = []
        self.refused: list[str] = []

    def ask(self, topic: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None; `error` then holds NVML's code, until the next question."""
        self.error = None
        try:
            return function(*arguments)
        except pynvml.NVMLError as error:
            self.error = error.value
            if error.value == pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                self.unknown_to_driver.append(topic)
            elif error.value == pynvml.NVML_ERROR_NO_PERMISSION:
                self.refused.append(topic)
        except UnicodeDecodeError:
            self.error = pynvml.NVML_ERROR_UNKNOWN
        return None

    def problems(self) -> list[Problem]:
        found = []
        if self.refused:
            what = f"The driver refuses to tell {_list(dict.fromkeys(self.refused))} here."
            why = "This account or container has no permission to ask for it; all other figures are"
            fix = "Nothing has to be done, unless somebody else uses the same GPU."
            found.append(Problem("answers_refused", "warning", what, f"{why} right.", fix))
        if self.unknown_to_driver:
            topics = _list(dict.fromkeys(self.unknown_to_driver))
            what = f"The driver does not know how to tell {topics}."
            why = "It is older than those questions; the figures are left empty."
            fix = "Update the NVIDIA driver to see them."
            found.append(Problem("driver_old", "note", what, why, fix))
        return found


def _read_card(index: int, questions: _Questions, ram: tuple[int, int]) -> list[Gpu]:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError as error:
        return [_without_answers(index, error.value, str(error))]
    card = _describe(index, handle, questions)
    mode = questions.ask("MIG", pynvml.nvmlDeviceGetMigMode, handle)
    if mode and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE:
        slices = _read_slices(card, handle, questions, ram)
        return slices or [replace(card, state="unknown", note=_MIG_EMPTY)]
    return [_measure(card, handle, questions, ram)]


def _without_answers(index: int, code: int, message: str) -> Gpu:
    lost = code in _LOST
    return Gpu(
        uuid=f"unknown-{index}",
        index=index,
        name=f"GPU {index}",
        state="lost" if lost else "unknown",
        note=_lost_note(code) if lost else f"the driver cannot open it ({message})",
    )


def _describe(index: int, handle: Any, questions: _Questions) -> Gpu:
    uuid = questions.ask("UUID", pynvml.nvmlDeviceGetUUID, handle)
    name = questions.ask("name", pynvml.nvmlDeviceGetName, handle) or f"GPU {index}"
    capability = questions.ask(
        "compute capability", pynvml.nvmlDeviceGetCudaComputeCapability, handle
    )
    return Gpu(
        uuid=uuid or f"unknown-{index}",
        index=index,
        name=name,
        compute_capability=None if capability is None else (capability[0], capability[1]),
        state="ready" if uuid else "unknown",
        unified=is_unified(name),
        note="" if uuid else "the driver does not say its UUID, and a run is given cards by that",
    )


def _read_slices(card: Gpu, handle: Any, questions: _Questions, ram: tuple[int, int]) -> list[Gpu]:
    slices = []
    for place in range(questions.ask("MIG", pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        try:
            part = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
        except pynvml.NVMLError:
            continue
        described = _describe(card.index, part, questions)
        described = replace(
            described, compute_capability=card.compute_capability, mig_parent=card.uuid
        )
        slices.append(_measure(described, part, questions, ram))
    return slices


def _measure(gpu: Gpu, handle: Any, questions: _Questions, ram: tuple[int, int]) -> Gpu:
    if gpu.unified:
        total, free = ram
        memory: tuple[int, int, int] | None = (total, free, total - free)
    else:
        memory = _read_memory(handle, questions)
    if questions.error in _LOST:
        return _lost(gpu, questions.error)
    load = questions.ask("load", pynvml.nvmlDeviceGetUtilizationRates, handle)
    heat = questions.ask(
        "temperature", pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU
    )
    power = questions.ask("power", pynvml.nvmlDeviceGetPowerUsage, handle)
    limit = questions.ask("power limit", pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    running = questions.ask("processes", pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    if questions.error in _LOST:
        return _lost(gpu, questions.error)
    state, note = gpu.state, gpu.note
    if memory is None and state == "ready":
        state, note = "unknown", _MEMORY_UNKNOWN
    return replace(
        gpu,
        memory_total_bytes=memory and memory[0],
        memory_free_bytes=memory and memory[1],
        memory_used_bytes=memory and memory[2],
        state=state,
        note=note,
        utilization_percent=load and load.gpu,
        temperature_celsius=heat,
        power_watts=None if power is None else power / 1000,
        power_limit_watts=None if limit is None else limit / 1000,
        processes=None if running is None else tuple(map(_describe_process, running)),
    )


def _read_memory(handle: Any, questions: _Questions) -> tuple[int, int, int] | None:
    """Total, free and used bytes."""
    before = len(questions.unknown_to_driver)
    for version in _MEMORY_VERSIONS:
        memory = questions.ask("memory", pynvml.nvmlDeviceGetMemoryInfo, handle, version)
        if memory is not None:
            del questions.unknown_to_driver[before:]
            return int(memory.total), int(memory.free), int(memory.used)
        if questions.error in _LOST:
            break
    return None


def _refresh(gpu: Gpu, questions: _Questions, ram: tuple[int, int]) -> Gpu:
    if gpu.state == "lost" or gpu.uuid.startswith("unknown-"):
        return gpu
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
    except pynvml.NVMLError as error:
        return _lost(gpu, error.value)
    if gpu.note == _MEMORY_UNKNOWN:
        gpu = replace(gpu, state="ready", note="")
    return gpu if gpu.note == _MIG_EMPTY else _measure(gpu, handle, questions, ram)


def _lost(gpu: Gpu, code: int | None) -> Gpu:
    """`gpu` as far as it was known before it went."""
    return replace(
        gpu,
        state="lost",
        note=_lost_note(code),
        memory_free_bytes=None,
        memory_used_bytes=None,
        utilization_percent=None,
        temperature_celsius=None,
        power_watts=None,
        processes=None,
    )


def _describe_process(process: Any) -> GpuProcess:
    """Memory of 0 is how a driver says that it cannot tell."""
    user = command = None
    folder = Path("/proc") / str(process.pid)
    with suppress(OSError, KeyError):
        user = pwd.getpwuid(os.stat(folder).st_uid).pw_name
    with suppress(OSError):
        words = (folder / "cmdline").read_bytes().split(b"\0")
        command = " ".join(word.decode("utf-8", "replace") for word in words if word) or None
    return GpuProcess(process.pid, process.usedGpuMemory or None, user, command)


def _problems_of(gpus: Sequence[Gpu]) -> list[Problem]:
    found = [problem for gpu in gpus if (problem := _wrong_with(gpu))]
    sliced = sorted({gpu.index for gpu in gpus if gpu.mig_parent})
    if sliced:
        which = f"GPU {sliced[0]} is" if len(sliced) == 1 else f"GPUs {_list(sliced)} are"
        why = "A run can use one slice and nothing beside it."
        fix = "Pick the slice with the most memory, or switch MIG off to use the whole card."
        found.append(Problem("mig", "note", f"{which} cut into MIG slices.", why, fix))
    return found


_MEMORY_UNKNOWN = "the driver does not say how much memory it has"
_MIG_EMPTY = "MIG is on and the card is not cut into slices yet"
_PLAN = "Plan for a GPU elsewhere with --assume, or train the demo model on this computer's CPU."
_RELOAD = "Restart the computer, or run `sudo rmmod nvidia && sudo modprobe nvidia`."


def _no_driver(code: int, words: str) -> Problem:
    known = {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: Problem(
            "no_driver",
            "warning",
            "No NVIDIA driver was found.",
            "The library libnvidia-ml.so.1 is not here; on a Mac or a laptop that is normal.",
            _PLAN,
        ),
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED: Problem(
            "driver_not_loaded",
            "error",
            "The NVIDIA driver is installed and not loaded.",
            "Its kernel module is not running, so no program can use a GPU.",
            "Run `sudo modprobe nvidia`, or restart the computer.",
        ),
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: Problem(
            "driver_mismatch",
            "error",
            "The running NVIDIA module and its library are of different versions.",
            "The driver was updated while it ran, and no program can use a GPU until it restarts.",
            _RELOAD,
        ),
        pynvml.NVML_ERROR_NO_PERMISSION: Problem(
            "driver_refuses",
            "error",
            "The NVIDIA driver refuses to show its GPUs here.",
            "This account or container has no permission for the devices /dev/nvidia*.",
            "Start the container with its GPUs (`--gpus all`), or ask the administrator.",
        ),
    }
    other = Problem(
        "driver_error",
        "error",
        f"The NVIDIA driver cannot be asked: {visible(words, one_line=True)} (NVML error {code}).",
        "Its library is here and could not start.",
        "See whether `nvidia-smi` works; if it fails in the same way, restart the computer.",
    )
    return known.get(code, other)


def _wrong_with(gpu: Gpu) -> Problem | None:
    which = f"GPU {gpu.index}" + ("" if gpu.name == f"GPU {gpu.index}" else f", {_name(gpu)},")
    if gpu.state == "lost":
        return Problem(
            "gpu_lost",
            "error",
            f"{which} is lost: {gpu.note}.",
            "A card that overheats, loses power or falls off the bus ends like this.",
            "Restart the computer; if it comes back, see its power and cooling.",
        )
    if gpu.note == _MIG_EMPTY:
        return Problem(
            "mig_empty",
            "warning",
            f"{which} cannot be used: {_MIG_EMPTY}.",
            "CUDA shows no card that is in MIG mode without a slice.",
            f"Switch MIG off with `sudo nvidia-smi -i {gpu.index} -mig 0`, or make a slice.",
        )
    if gpu.note == _MEMORY_UNKNOWN:
        return Problem(
            "memory_unknown",
            "warning",
            f"{which} cannot be planned for: {_MEMORY_UNKNOWN}.",
            "Virtual GPUs, WSL and broken cards answer like this.",
            "Give its size with --assume, for example --assume '24 GB'.",
        )
    if gpu.state == "unknown":
        return Problem(
            "gpu_unreadable",
            "error",
            f"{which} cannot be used: {visible(gpu.note, one_line=True)}.",
            "The other cards are not affected.",
            f"See what `nvidia-smi -i {gpu.index}` says; a restart often brings it back.",
        )
    return None


def _lost_note(code: int | None) -> str:
    """Why a card counts as lost, from NVML's error code."""
    if code == pynvml.NVML_ERROR_RESET_REQUIRED:
        return "it has to be reset before it can be used again"
    return "the driver no longer reaches it"


def _name(gpu: Gpu) -> str:
    return visible(gpu.short_name, one_line=True)


def _list(words: Iterable[object]) -> str:
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last

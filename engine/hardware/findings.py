"""The sentences about a driver and its cards: what is wrong, why, and what to do."""

from collections.abc import Sequence

import pynvml

from engine.hardware.machine import Gpu, Problem
from engine.visible import visible

_MEMORY_UNKNOWN = "the driver does not say how much memory it has"
_MIG_EMPTY = "MIG is on and the card is not cut into slices yet"
_PLAN = "Plan for a GPU elsewhere with --assume, or train the demo model on this computer's CPU."
_RELOAD = "Restart the computer, or run `sudo rmmod nvidia && sudo modprobe nvidia`."


def _no_driver(code: int, words: str) -> Problem:
    """NVML could not be opened: its error code and text."""
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


def _driver_silent(seconds: float) -> Problem:
    """The driver did not answer in that time."""
    return Problem(
        "driver_silent",
        "error",
        f"The NVIDIA driver has not answered for {seconds:g} s.",
        "A hung driver does this, and nvidia-smi would hang too.",
        "Look again in a minute; if it stays silent, restart the computer.",
    )


def _no_gpu() -> Problem:
    """The driver works and has no card."""
    return Problem(
        "no_gpu",
        "warning",
        "The NVIDIA driver works and has no GPU.",
        "None is plugged in, or none was handed to this container.",
        _PLAN,
    )


def _answers_refused(topics: Sequence[str]) -> Problem:
    """The driver keeps some answers to itself, in a container mostly."""
    return Problem(
        "answers_refused",
        "warning",
        f"The driver refuses to tell {_list(topics)} here.",
        "This account or container has no permission to ask for it; all other figures are right.",
        "Nothing has to be done, unless somebody else uses the same GPU.",
    )


def _driver_old(topics: Sequence[str]) -> Problem:
    """The driver does not know some questions."""
    return Problem(
        "driver_old",
        "note",
        f"The driver does not know how to tell {_list(topics)}.",
        "It is older than those questions; the figures are left empty.",
        "Update the NVIDIA driver to see them.",
    )


def _mig(indexes: Sequence[int]) -> Problem:
    """Some cards are cut into slices."""
    which = f"GPU {indexes[0]} is" if len(indexes) == 1 else f"GPUs {_list(indexes)} are"
    return Problem(
        "mig",
        "note",
        f"{which} cut into MIG slices.",
        "A run can use one slice and nothing beside it.",
        "Pick the slice with the most memory, or switch MIG off to use the whole card.",
    )


def _wrong_with(gpu: Gpu) -> Problem | None:
    """What is wrong with one card, None where nothing is."""
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


def _list(words: Sequence[object]) -> str:
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last

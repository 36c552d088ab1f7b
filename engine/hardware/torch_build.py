"""Whether the installed torch can use a card: by versions and files, and torch is never imported.

torch names the CUDA that it was built for in a file of its own. presets/cuda.yml has the driver
that each CUDA needs and the cards that each build holds code for; from both follows which build
would do, and the command that installs it.
"""

import re
from dataclasses import replace
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from engine.hardware.commands import pip_install, update_driver
from engine.hardware.machine import Gpu, Machine, Problem
from engine.hardware.planned import cuda_facts
from engine.visible import visible

_INDEX = "https://download.pytorch.org/whl"
# `cuda: Optional[str] = '13.0'`, or None.
_CUDA_LINE = re.compile(r"^cuda\b[^=\n]*=\s*(?:'([\d.]+)'|\"([\d.]+)\"|None)", re.MULTILINE)
# "2.13.0+cu130"; the last digit is the minor version.
_LOCAL = re.compile(r"\+cu(\d+)(\d)$")
_REQUIRED = re.compile(r"^(?:cuda-toolkit|nvidia-cuda-runtime(?:-cu\d+)?)\b[^=;]*==(\d+\.\d+)")


def read_torch_cuda() -> str | None:
    """The CUDA that the installed torch was built for: "13.0", "" for one without CUDA.

    None where torch is not installed, or says nothing about it.
    """
    try:
        torch = distribution("torch")
    except PackageNotFoundError:
        return None
    in_file = _cuda_of_file(torch)
    return _cuda_of_version(torch) if in_file is None else in_file


def torch_problem(machine: Machine, gpu: Gpu) -> Problem | None:
    """What keeps the installed torch from using `gpu`, as far as versions and files tell, or None.

    None, too, where torch is not installed: `missing_packages` says that.
    """
    torch, cuda = machine.stack.get("torch"), machine.torch_cuda
    if torch is None or cuda is None:
        return None
    if not cuda:
        return _without_cuda(machine, gpu, torch)
    built_for = _version(cuda)
    if _is_driver_too_old(machine, built_for):
        return _driver_too_old(machine, gpu, torch, built_for)
    build = next((each for each in cuda_facts().torch_builds if each.cuda == built_for), None)
    if build and gpu.compute_capability and not build.runs_on(gpu.compute_capability):
        return _card_not_in_torch(machine, gpu, torch, built_for)
    return next((each for each in machine.problems if each.id == "cuda_library_missing"), None)


def torch_problems(machine: Machine) -> list[Problem]:
    """`torch_problem` of every card that is ready or hidden, each sentence once.

    A warning where torch can use another card.
    """
    cards = [gpu for gpu in machine.gpus if gpu.state in ("ready", "hidden")]
    found = [torch_problem(machine, gpu) for gpu in cards]
    problems = list(dict.fromkeys(problem for problem in found if problem))
    if None in found:
        return [replace(problem, severity="warning") for problem in problems]
    return problems


def _without_cuda(machine: Machine, gpu: Gpu, torch: str) -> Problem:
    fix, command = _other_build(machine, gpu, torch)
    return Problem(
        "torch_without_cuda",
        "error",
        f"The installed torch {torch} cannot use a GPU.",
        "It was built without CUDA.",
        fix,
        command,
    )


def _driver_too_old(machine: Machine, gpu: Gpu, torch: str, built_for: tuple[int, int]) -> Problem:
    runs = f"Driver {machine.driver_version}" if machine.driver_version else "The driver"
    needed = cuda_facts().drivers.get(built_for[0])
    fix, command = _other_build(machine, gpu, torch)
    return Problem(
        "driver_too_old_for_torch",
        "error",
        f"The NVIDIA driver is too old for the installed torch {torch}.",
        f"{runs} runs CUDA up to {machine.cuda_version or 'an older one'}; torch was built for"
        f" {built_for[0]}.{built_for[1]}"
        + (f", which begins with driver {needed}." if needed else "."),
        fix,
        command,
    )


def _card_not_in_torch(
    machine: Machine, gpu: Gpu, torch: str, built_for: tuple[int, int]
) -> Problem:
    name = visible(gpu.short_name, one_line=True)
    capability = "{}.{}".format(*gpu.compute_capability or (0, 0))
    fix, command = _other_build(machine, gpu, torch)
    return Problem(
        "card_not_in_torch",
        "error",
        f"The installed torch {torch} has no code for {name}.",
        f"{name} is of compute capability {capability}, which the build for CUDA"
        f" {built_for[0]}.{built_for[1]} leaves out.",
        fix,
        command,
    )


def _other_build(machine: Machine, gpu: Gpu, torch: str) -> tuple[str, str]:
    """What to install in place of `torch` for this card and driver: a sentence and a command."""
    release = torch.partition("+")[0]  # "+cpu" and "+cu126" are builds of one release
    builds = [
        build
        for build in cuda_facts().torch_builds
        if build.until is None or _version(release) <= build.until
    ]
    here = {each.compute_capability for each in machine.usable_gpus} | {gpu.compute_capability}
    suited = [
        build for build in builds if all(each is None or build.runs_on(each) for each in here)
    ]
    if not suited and not any(build.runs_on(gpu.compute_capability or (0, 0)) for build in builds):
        return "Use another card: no build of this torch has code for it.", ""
    if not suited:
        return "Use the other cards: no build of this torch has code for all of them.", ""
    for build in suited:
        if not _is_driver_too_old(machine, build.cuda):
            tag = "cu{}{}".format(*build.cuda)
            return (
                "Install the build of torch for CUDA {}.{}.".format(*build.cuda),
                pip_install(f"torch=={release}+{tag}", "--index-url", f"{_INDEX}/{tag}"),
            )
    needed = cuda_facts().drivers[suited[0].cuda[0]]
    return f"Update the NVIDIA driver to {needed} or newer.", update_driver()


def _is_driver_too_old(machine: Machine, cuda: tuple[int, int]) -> bool:
    """By the newest CUDA that the driver says it runs, else by its own number."""
    if machine.cuda_version:
        return cuda[0] > _version(machine.cuda_version)[0]
    needed = cuda_facts().drivers.get(cuda[0])
    if needed is None or not machine.driver_version:
        return False
    return _version(machine.driver_version)[0] < needed


def _cuda_of_file(torch: Distribution) -> str | None:
    try:
        text = Path(str(torch.locate_file("torch/version.py"))).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = _CUDA_LINE.search(text)
    return (match[1] or match[2] or "") if match else None


def _cuda_of_version(torch: Distribution) -> str | None:
    if match := _LOCAL.search(torch.version):
        return f"{match[1]}.{match[2]}"
    if "+" in torch.version:
        return ""  # +cpu, +rocm6.4, +xpu
    found = (_REQUIRED.match(each) for each in torch.requires or ())
    return next((match[1] for match in found if match), None)


def _version(text: str) -> tuple[int, int]:
    """Major and minor of a version; what follows them does not count."""
    major, minor = [*re.findall(r"\d+", text), "0", "0"][:2]
    return int(major), int(minor)

"""What kernels need beside torch: the driver's library, a compiler, headers, and whole packages.

Found out from files, the way the libraries themselves look for them. Without these a run starts,
and fails or becomes slow at its first step.
"""

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from engine.hardware.commands import as_root, pip_install, pip_uninstall, system_install
from engine.hardware.machine import Machine, Problem
from engine.hardware.packages import install_command
from engine.hardware.planned import FLASH_4, attention_backends, worth_installing

_BNB_LIBRARY: Final = re.compile(r"^libbitsandbytes_cuda(\d\d)\d+\.so$")
_DRIVER_LIBRARY: Final = "libcuda.so.1"
_COMPILER: Final = {family: "gcc" for family in ("debian", "fedora", "suse", "arch")}
_Want = tuple[str, Mapping[str, str]]
"""Something in words, and its system package by family."""


def toolchain_problems(
    machine: Machine, environment: Mapping[str, str] = os.environ, root: Path = Path("/")
) -> list[Problem]:
    """What is missing for kernels on this computer's cards, with the command that adds it.

    `root` stands for "/" so that a test can describe a computer with files.
    """
    clash = _attention_packages(machine)
    if not machine.torch_cuda or not machine.usable_gpus:
        return [clash] if clash else []
    found = (
        clash,
        _driver_library(environment, root),
        _launchers(environment, root) if machine.stack.get("triton") else None,
        _bitsandbytes(machine.torch_cuda) if machine.stack.get("bitsandbytes") else None,
    )
    return [problem for problem in found if problem]


def _driver_library(environment: Mapping[str, str], root: Path) -> Problem | None:
    folders = environment.get("LD_LIBRARY_PATH", "").split(":")
    if any((Path(folder) / _DRIVER_LIBRARY).exists() for folder in folders if folder):
        return None
    try:
        known = (root / "etc" / "ld.so.cache").read_bytes()
    except OSError:
        return None
    if _DRIVER_LIBRARY.encode() in known:
        return None
    # The linker looks there without its list, too.
    if _is_in(root, ("lib64", "usr/lib64", "lib/*-linux-gnu", "usr/lib/*-linux-gnu", "usr/lib")):
        return None
    here = _is_in(root, ("usr/lib/wsl/lib", "usr/local/nvidia/lib64"))
    return Problem(
        "cuda_library_missing",
        "error",
        f"The driver's library {_DRIVER_LIBRARY} is not found.",
        "The driver shows its cards without it, and no program can compute on them.",
        "Renew the linker's list."
        if here
        else "Install the driver's CUDA part; start a container with"
        " NVIDIA_DRIVER_CAPABILITIES=compute,utility.",
        as_root("ldconfig") if here else "",
    )


def _is_in(root: Path, places: Iterable[str]) -> bool:
    """Whether the driver's library lies in one of these folders."""
    return any(any(root.glob(f"{place}/{_DRIVER_LIBRARY}")) for place in places)


def _launchers(environment: Mapping[str, str], root: Path) -> Problem | None:
    """Triton compiles a small C file for each kernel: by $CC, gcc or clang, with Python.h."""
    wants = [*_compiler(environment), *_headers(root)]
    if not wants:
        return None
    missing = " and ".join(name for name, _ in wants)
    verb = "is" if len(wants) == 1 else "are"
    packages = {
        family: " ".join(names[family] for _, names in wants if family in names)
        for family in _COMPILER
        if all(family in names for _, names in wants)
    }
    command = system_install(packages, root)
    fix = f"Install {missing}." if command else f"Give this Python {missing}."
    return Problem(
        "kernels_cannot_be_built",
        "warning",
        f"Triton cannot build kernels here: {missing} {verb} missing.",
        "The kernels of flex_attention and cut-cross-entropy compile a C file at their first step.",
        fix,
        command,
    )


def _compiler(environment: Mapping[str, str]) -> Iterator[_Want]:
    path = environment.get("PATH")
    chosen = environment.get("CC")
    if chosen is not None:
        if shutil.which(chosen, path=path) is None:
            yield f"the compiler {chosen} that CC names", {}
    elif not any(shutil.which(name, path=path) for name in ("gcc", "clang")):
        yield "a C compiler (gcc)", _COMPILER


def _headers(root: Path) -> Iterator[_Want]:
    if (python_headers() / "Python.h").exists():
        return
    major, minor = sys.version_info[:2]
    names: Mapping[str, str] = {}
    # A Python that did not come with the system has no package of headers there.
    if Path(sys.base_prefix) == Path("/usr"):
        names = {
            "debian": f"python{major}.{minor}-dev",
            "fedora": _fedora_headers(root, f"python{major}.{minor}"),
            "suse": f"python{major}{minor}-devel",
        }
    yield f"the headers of Python {major}.{minor}", names


def _fedora_headers(root: Path, python: str) -> str:
    """The system's own Python has a package without a version, every other one has its own."""
    own = (root / "usr" / "bin" / "python3").resolve().name == python
    return "python3-devel" if own else f"{python}-devel"


def python_headers() -> Path:
    """Where triton looks for Python.h."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme, which says /usr/local for what it has in /usr.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return Path(sysconfig.get_paths(scheme)["include"])


def _bitsandbytes(cuda: str) -> Problem | None:
    """It takes its library for this CUDA, else the nearest of the same major version."""
    try:
        package = Path(str(distribution("bitsandbytes").locate_file("bitsandbytes")))
    except PackageNotFoundError:
        return None
    here = {match[1] for each in _names(package) if (match := _BNB_LIBRARY.match(each))}
    if cuda.partition(".")[0] in here:
        return None
    return Problem(
        "bitsandbytes_without_library",
        "warning",
        f"The installed bitsandbytes has no library for CUDA {cuda}.",
        "4-bit and 8-bit weights, and optimizers in 8 bits, need the one of torch's CUDA.",
        "Install the newest bitsandbytes.",
        pip_install("--upgrade", "bitsandbytes"),
    )


def _attention_packages(machine: Machine) -> Problem | None:
    """Two packages that hold files of the same name: the one to keep is the one for these cards."""
    backend = attention_backends()[FLASH_4]
    other = next((each for each in backend.overwritten_by if machine.stack.get(each)), None)
    if other is None or not machine.stack.get(backend.package):
        return None
    cards = [gpu.compute_capability for gpu in machine.usable_gpus if gpu.compute_capability]
    fix, command = f"Keep {other} alone.", pip_uninstall(backend.package)
    if worth_installing(cards) is backend:
        fix = f"Keep {backend.package} alone, which is made for these cards."
        command = f"{pip_uninstall(other, backend.package)} && {install_command('fa4')}"
    return Problem(
        "attention_packages_overwritten",
        "warning",
        f"{other} and {backend.package} are both installed.",
        f"Both hold the folder flash_attn/cute, so {backend.title} may be the other's old files and"
        " is not used.",
        fix,
        command,
    )


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []

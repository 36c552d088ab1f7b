"""Which packages are installed, which Windtunnel's own metadata asks for, which are worth adding.

Versions come from the packages' metadata and nothing is imported: that would take seconds, and the
wizard must never load torch. A folder of code that was never installed asks for nothing.
"""

import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, PackageNotFoundError, distribution, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from engine.hardware.known import FLASH_4, attention_backends, cuda_facts, worth_installing
from engine.hardware.machine import Gpu, Machine, Problem
from engine.visible import visible

_OWN: Final = "windtunnel"
_TRAINING = (
    *("torch", "transformers", "peft", "bitsandbytes", "datasets", "cut-cross-entropy"),
    *("safetensors", "accelerate", "pillow"),
)
_ATTENTION = ("flash-attn", "flash-attn-3", "flash-attn-4")
_PACKAGES = (*_TRAINING, "triton", *_ATTENTION, "mistral-common")
_LINUX_ONLY = ("cut-cross-entropy",)


@dataclass(frozen=True, slots=True)
class OutOfRange:
    """An installed package whose version is not one that Windtunnel asks for."""

    package: str
    version: str
    asked: str
    """Such as `>=2.12,<3`."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Packages that this machine could use and does not have, and the command that adds them."""

    extra: str
    """The extra of windtunnel that brings them."""
    packages: tuple[str, ...]
    why: str
    command: str
    needed: bool = True
    """Whether something cannot be done without them; else they make it faster."""


def out_of_range(extra: str) -> tuple[OutOfRange, ...]:
    """The packages of this extra that are installed in another version than it asks for."""
    from packaging.requirements import Requirement  # here: the wizard's first frame waits for none

    try:
        lines = requires(_OWN) or []
    except PackageNotFoundError:
        return ()
    found = []
    for each in map(Requirement, lines):
        if not each.marker or each.marker.evaluate({"extra": ""}):
            continue  # of the base install
        if not each.marker.evaluate({"extra": extra}):
            continue
        has = installed(each.name)
        if has is not None and not each.specifier.contains(has, prereleases=True):
            asked = ",".join(sorted(map(str, each.specifier), reverse=True))
            found.append(OutOfRange(each.name, has, asked))
    return tuple(found)


def version_problem() -> Problem | None:
    """The installed training stack where it has versions that Windtunnel does not ask for."""
    others = out_of_range("train")
    if not others:
        return None
    listed = ", ".join(f"{each.package} {each.version} ({each.asked})" for each in others)
    return Problem(
        "stack_of_other_versions",
        "error",
        "The installed training stack has other versions than Windtunnel needs: "
        f"{visible(listed, one_line=True)}.",
        "With others training fails, or computes something that no test has seen.",
        f"Install the versions that it needs: {install_command('train')}",
    )


def read_stack() -> dict[str, str | None]:
    """The version of each package, None where it is not installed."""
    return {package: installed(package) for package in _PACKAGES}


def missing_packages(machine: Machine) -> tuple[Missing, ...]:
    """What to install, in this order; empty where nothing that suits the machine is missing."""
    found = []
    training = tuple(
        package
        for package in _TRAINING
        if machine.stack[package] is None
        and (package not in _LINUX_ONLY or sys.platform == "linux")
    )
    if training:
        why = "Training needs them; preview, plan and config work without."
        found.append(Missing("train", training, why, install_command("train")))
    if any(torch_problem(machine, gpu) for gpu in machine.usable_gpus):
        return tuple(found)  # nothing for a GPU works with this torch
    cards = [gpu.compute_capability for gpu in machine.usable_gpus if gpu.compute_capability]
    best = worth_installing(cards)
    if best and not any(machine.stack.get(each) for each in (best.package, *best.overwritten_by)):
        why = f"{best.title}: faster attention on these cards; a run works without it."
        found.append(Missing("fa4", (best.package,), why, install_command("fa4"), False))
    return tuple(found)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def install_command(extra: str, *flags: str) -> str:
    """What installs this extra over the windtunnel that runs, from where that one came.

    pip and uv write down where a package came from if not from an index (direct_url.json).
    """
    if Path(sys.prefix, "uv-receipt.toml").exists():
        program = ["uv", "tool", "install", "--force"]
    else:
        program = [*python_installer(), "install"]
    return shlex.join([*program, *flags, *_source(f"{_OWN}[{extra}]")])


def _source(name: str) -> list[str]:
    """The arguments that name the package with its extra."""
    try:
        text = Distribution.from_name(_OWN).read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    if text is None:
        return [name]
    origin = json.loads(text)
    url = str(origin["url"])
    if origin.get("dir_info", {}).get("editable"):
        return ["--editable", unquote(urlsplit(url).path) + name.removeprefix(_OWN)]
    if vcs := origin.get("vcs_info"):
        revision = vcs.get("requested_revision")
        url = f"{vcs['vcs']}+{url}" + (f"@{revision}" if revision else "")
    return [f"{name} @ {url}"]


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


_MANAGERS: Final[Mapping[str, str]] = {
    "debian": "apt-get install",
    "fedora": "dnf install",
    "suse": "zypper install",
    "arch": "pacman -S",
}
"""By family: the words of ID and ID_LIKE in /etc/os-release; Ubuntu is like Debian."""
_FAMILY_OF: Final[Mapping[str, str]] = {
    **{"ubuntu": "debian", "rhel": "fedora", "centos": "fedora", "amzn": "fedora"},
    **{"opensuse": "suse", "sles": "suse"},
}


def pip_install(*words: str) -> str:
    """The command that installs `words` into the environment that Windtunnel runs in."""
    return shlex.join([*python_installer(), "install", *words])


def pip_uninstall(*packages: str) -> str:
    """The command that removes `packages` from it."""
    installer = python_installer()
    yes = [] if installer[0] == "uv" else ["--yes"]
    return shlex.join([*installer, "uninstall", *yes, *packages])


def system_install(packages: Mapping[str, str], root: Path = Path("/")) -> str:
    """The command that installs system packages; `packages` has their names by family.

    Empty where the distribution or its name for them is not known.
    """
    words = (_FAMILY_OF.get(word, word) for word in _words(root))
    family = next((word for word in words if word in _MANAGERS), "")
    if family not in packages:
        return ""
    return as_root(f"{_MANAGERS[family]} {packages[family]}")


def update_driver(root: Path = Path("/")) -> str:
    """The command that installs the newest NVIDIA driver; empty where there is no one command."""
    return as_root("ubuntu-drivers install") if "ubuntu" in _words(root) else ""


def as_root(command: str) -> str:
    """`command` with the rights that it needs; a container's root often has no sudo."""
    return command if os.geteuid() == 0 else f"sudo {command}"


def python_installer() -> list[str]:
    """What installs packages into the environment that Windtunnel runs in: pip, or uv's."""
    active = sys.prefix in (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"))
    if find_spec("pip") is None:  # environments of uv have none
        return ["uv", "pip"]
    return ["pip"] if active else [sys.executable, "-m", "pip"]


def _words(root: Path) -> list[str]:
    """What the system calls itself, then what it is like."""
    fields = {}
    with suppress(OSError):
        for line in (root / "etc" / "os-release").read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition("=")
            fields[key] = value.strip().strip('"').lower()
    return f"{fields.get('ID', '')} {fields.get('ID_LIKE', '')}".split()


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
    files = package.glob("*.so")
    here = {match[1] for each in files if (match := _BNB_LIBRARY.match(each.name))}
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

"""Which packages are installed, which Windtunnel's own metadata asks for, which are worth adding.

Versions come from the packages' metadata and nothing is imported: that would take seconds, and the
wizard must never load torch. A folder of code that was never installed asks for nothing.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from engine.hardware.commands import python_installer
from engine.hardware.machine import Machine, Problem
from engine.hardware.planned import worth_installing
from engine.hardware.torch_build import torch_problem
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
    """The version of a package by its metadata, None where it is not installed."""
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

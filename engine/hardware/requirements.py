"""What Windtunnel's own metadata asks of other packages, and the command that installs an extra.

The ranges are those of pyproject.toml, as the installer wrote them down; nothing is imported. A
folder of code that was never installed asks for nothing.
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
from engine.hardware.machine import Problem
from engine.visible import visible

_OWN: Final = "windtunnel"


@dataclass(frozen=True, slots=True)
class OutOfRange:
    """An installed package whose version is not one that Windtunnel asks for."""

    package: str
    version: str
    asked: str
    """Such as `>=2.12,<3`."""


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

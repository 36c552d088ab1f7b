"""Commands that install something on this computer, as its own package managers spell them.

What is printed is meant to be copied: it names the Python that Windtunnel runs in, the system's
package manager, and sudo only where it is needed.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

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
    family = _family(root)
    if family not in _MANAGERS or family not in packages:
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


def _family(root: Path) -> str:
    return next((word for word in map(_as_family, _words(root)) if word in _MANAGERS), "")


def _as_family(word: str) -> str:
    return _FAMILY_OF.get(word, word)


def _words(root: Path) -> list[str]:
    """What the system calls itself, then what it is like."""
    fields = {}
    try:
        lines = (root / "etc" / "os-release").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition("=")
        fields[key] = value.strip().strip('"').lower()
    return f"{fields.get('ID', '')} {fields.get('ID_LIKE', '')}".split()

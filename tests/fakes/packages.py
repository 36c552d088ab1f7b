"""Packages that exist in metadata only, as an installer leaves them beside the code."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def package(
    folder: Path,
    name: str,
    version: str,
    requires: Sequence[str] = (),
    origin: Mapping[str, object] | None = None,
) -> None:
    """Put it into a folder of sys.path; `origin` is what its direct_url.json says."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n", "utf-8")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin), "utf-8")


def install_torch(
    folder: Path, version: str, *, cuda: str | None = None, requires: Sequence[str] = ()
) -> None:
    """torch as a wheel lays it out, as far as it may be read; `cuda` is its own word for it."""
    package(folder, "torch", version, requires)
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    if cuda is not None:
        (folder / "torch" / "version.py").write_text(
            f"from typing import Optional\n__version__ = '{version}'\n"
            f"cuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n"
        )

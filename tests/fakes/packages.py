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

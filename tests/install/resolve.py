"""Resolves pyproject.toml with constraints.txt as people on other systems would: `make check`.

`python -m tests.install.resolve` prints a table of systems, Pythons and extras, and leaves with 1
where one of them cannot be installed. Wheels are looked for, not only versions. uv asks the
ordinary index alone, whatever this computer has beside it; where that cannot be reached the page
says so and leaves with 0.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
PYTHONS = ("3.11", "3.12", "3.13")
SYSTEMS = {
    "Linux x86_64": "x86_64-manylinux_2_28",
    "Linux aarch64": "aarch64-manylinux_2_28",
    "macOS 14 arm64": "aarch64-apple-darwin",
}
MACOS = "14.0"
"""The oldest with wheels of bitsandbytes; uv takes 13 unless it is told."""
FROM_SOURCE = "flash-attn"
"""The one package without wheels: its sdist says what it needs, and nothing is built here."""
EXTRAS: tuple[tuple[str, ...], ...] = (
    *((), ("train",), ("train", "dev"), ("train", "fa2"), ("train", "fa4")),
)
CUDA_EXTRAS = {"fa2", "fa4"}
DECISIVE = ("torch", "triton", "transformers", "peft", "bitsandbytes", "mistral-common")
PINNED_BY_TORCH = ("nvidia-", "cuda-")
UNREACHABLE = re.compile(
    r"Failed to fetch|Request failed|error sending request|network was disabled"
)
OTHER_SOURCES = re.compile(r"UV_.*(INDEX|FIND_LINKS|CONSTRAINT|OVERRIDE|EXCLUDE_NEWER|CONFIG)")


class NoIndex(Exception):
    """The package index cannot be reached; carries what uv says."""


class Unresolvable(Exception):
    """Nothing can be installed; carries uv's reason."""


@dataclass(frozen=True, slots=True)
class Resolver:
    """uv for one system and Python."""

    system: str
    python: str
    constraints: Path | None = CONSTRAINTS

    def resolve(self, extras: Sequence[str]) -> dict[str, str]:
        """Version by package. Raises NoIndex and Unresolvable."""
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--quiet"]
        command += ["--no-config", "--no-header", "--no-annotate", "--python", sys.executable]
        command += ["--python-platform", SYSTEMS[self.system], "--python-version", self.python]
        command += ["--only-binary", ":all:", "--no-binary", FROM_SOURCE]
        command += [f"--extra={each}" for each in extras]
        if self.constraints:
            command += ["--constraints", str(self.constraints)]
        ours = {name: value for name, value in os.environ.items() if not OTHER_SOURCES.match(name)}
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**ours, "MACOSX_DEPLOYMENT_TARGET": MACOS},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return dict(line.split("==") for line in done.stdout.splitlines())
        if UNREACHABLE.search(done.stderr):
            raise NoIndex(done.stderr.strip())
        if done.returncode == 1:
            raise Unresolvable(done.stderr.strip())
        raise RuntimeError(done.stderr)


def main(constraints: Path = CONSTRAINTS) -> int:
    """Print the table; returns 1 where a cell cannot be installed or a package is not pinned."""
    titles = ["base" if not each else f"[{','.join(each)}]" for each in EXTRAS]
    print(f"{'packages resolved':17} {'Python':>6} " + " ".join(f"{each:>12}" for each in titles))
    keys = [(system, python) for system in SYSTEMS for python in PYTHONS]
    problems: dict[str, list[str]] = {}  # where, by reason
    with ThreadPoolExecutor(4) as pool:  # a resolver mostly waits for the index
        try:
            newest = pool.submit(Resolver("Linux x86_64", PYTHONS[-1], None).resolve, ["train"])
            cells = {
                (key, extras): pool.submit(_resolve, Resolver(*key, constraints), extras)
                for key in keys
                for extras in EXTRAS
            }
            for key in keys:
                row = [cells[key, extras].result() for extras in EXTRAS]
                for extras, cell in zip(EXTRAS, row, strict=True):
                    if cell.problem:
                        where = f"{' '.join(key)} {'+'.join(extras) or 'base'}"
                        problems.setdefault(cell.problem, []).append(where)
                shown = " ".join(f"{cell.shown:>12}" for cell in row)
                print(f"{key[0]:17} {key[1]:>6} {shown}", flush=True)
            try:
                listed = ", ".join(f"{name} {newest.result()[name]}" for name in DECISIVE)
                print(f"Without constraints, today: {listed}.")
            except Unresolvable as error:
                problems[str(error)] = ["without constraints"]
        except NoIndex as error:
            pool.shutdown(cancel_futures=True)
            print(f"The package index cannot be reached, so this was not resolved.\n{error}")
            return 0
    found = {name for cell in cells.values() for name in cell.result().pinned}
    pins = {_name(line) for line in constraints.read_text("utf-8").splitlines()}
    problems |= {f"constraints.txt does not pin {name}.": [] for name in sorted(found - pins)}
    for reason, places in problems.items():
        print(f"\n{', '.join(places)}\n{reason}")
    print("" if problems else "All of it can be installed.")
    return 1 if problems else 0


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table."""

    shown: str
    problem: str = ""
    pinned: frozenset[str] = frozenset()
    """What constraints.txt has to pin."""


def _resolve(resolver: Resolver, extras: Sequence[str]) -> Cell:
    if "macOS" in resolver.system and set(extras) & CUDA_EXTRAS:
        return Cell("-")
    try:
        found = resolver.resolve(extras)
    except Unresolvable as error:
        return Cell("none", str(error))
    names = frozenset(map(_name, found)) if not set(extras) & CUDA_EXTRAS else frozenset()
    return Cell(
        str(len(found)),
        pinned=frozenset(name for name in names if not name.startswith(PINNED_BY_TORCH)),
    )


def _name(line: str) -> str:
    return re.sub(r"[-_.]+", "-", line.partition("==")[0].strip()).lower()


if __name__ == "__main__":
    sys.exit(main())

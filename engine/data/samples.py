"""The datasets that come with Windtunnel, each by the name that `sample:NAME` uses.

A sample is a folder of `presets/samples`: its `train.jsonl` is what the name stands for.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path

from engine.errors import UserError
from engine.visible import visible

SAMPLE_PREFIX = "sample:"


@dataclass(frozen=True, slots=True)
class Sample:
    """One dataset that ships; `rows` counts the conversations of the file at `path`."""

    name: str
    title: str
    rows: int
    description: str
    path: Path


@cache
def list_samples() -> tuple[Sample, ...]:
    """All samples in the order of their names."""
    folder = Path(str(files("presets"))) / "samples"
    return tuple(_read_sample(path.parent) for path in sorted(folder.glob("*/train.jsonl")))


def find_sample(name: str) -> Sample:
    """The sample of that name, without the prefix.

    Raises UserError with the nearest name where there is none.
    """
    known = {sample.name: sample for sample in list_samples()}
    if name not in known:
        near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        raise UserError(
            f"There is no sample named {visible(name, one_line=True)}.",
            f"Windtunnel comes with {', '.join(known)}.",
            f"Name {SAMPLE_PREFIX}{(near or list(known))[0]}, or a file of your own.",
        )
    return known[name]


def locate_sample(name: str) -> Path:
    """The file of `NAME`, its training rows, or of `NAME/SET`, one of its held-out sets.

    Raises UserError where there is no such sample or set.
    """
    sample, _, held_out = name.partition("/")
    path = find_sample(sample).path
    if not held_out:
        return path
    sets = sorted(other.stem for other in path.parent.glob("*.jsonl") if other != path)
    if held_out not in sets:
        raise UserError(
            f"The sample {sample} has no set named {visible(held_out, one_line=True)}.",
            f"Beside its training rows it has {', '.join(sets)}.",
            f"Name {SAMPLE_PREFIX}{sample}/{sets[0]}, or {SAMPLE_PREFIX}{sample} alone.",
        )
    return path.with_name(f"{held_out}.jsonl")


def _read_sample(folder: Path) -> Sample:
    # Imported here so that a path that is no sample costs nothing.
    from ruamel.yaml import YAML

    about = YAML(typ="safe", pure=True).load(folder / "about.yml")
    path = folder / "train.jsonl"
    rows = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    return Sample(folder.name, about["title"], rows, about["description"], path)

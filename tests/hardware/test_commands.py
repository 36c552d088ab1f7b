"""Commands are spelled for the environment and the system that they are copied into."""

import sys
from pathlib import Path

import pytest

from engine.hardware.packages import pip_install, pip_uninstall, update_driver


def test_the_pip_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
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


def test_sudo_only_where_somebody_is_not_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "os-release").write_text("ID=ubuntu\n")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert update_driver(tmp_path) == "sudo ubuntu-drivers install"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert update_driver(tmp_path) == "ubuntu-drivers install"
    (tmp_path / "etc" / "os-release").write_text("ID=fedora\n")
    assert update_driver(tmp_path) == ""

"""Every test has a home for runs of its own: a person's runs are never touched."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.runs import RunFolder, create_run
from tests.fakes.processes import kill_all_in


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("WINDTUNNEL_RUNS", str(tmp_path / "home"))
    yield tmp_path / "home"
    kill_all_in(tmp_path)


@pytest.fixture
def run(home: Path) -> RunFolder:
    return create_run("first")

"""Every test of the wizard has a home for runs of its own, and clocks that read UTC."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.processes import kill_all_in


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("WINDTUNNEL_RUNS", str(tmp_path / "home"))
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("NO_COLOR", raising=False)
    time.tzset()
    yield tmp_path / "home"
    kill_all_in(tmp_path)

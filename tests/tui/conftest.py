"""Every test of the wizard has a home for runs of its own, and clocks that read UTC."""

import time
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("NO_COLOR", raising=False)
    time.tzset()
    return home

"""Every test has a home for runs of its own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def home(home: Path) -> Path:
    return home

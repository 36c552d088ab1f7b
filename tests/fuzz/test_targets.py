"""The seeds of every target, and some hundreds of changes to them; `make fuzz` runs longer."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import SEEDS, TARGETS, examples


@pytest.mark.parametrize(
    ("name", "data"),
    [(name, data) for name, seeds in SEEDS.items() for data in seeds],
    ids=lambda each: str(each)[:30],
)
def test_a_seed_gives_a_result_or_a_sentence(name: str, data: bytes, tmp_path: Path) -> None:
    TARGETS[name](data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_a_change_is_a_result_or_a_sentence(name: str, tmp_path: Path, data: st.DataObject) -> None:
    TARGETS[name](data.draw(examples(name, tmp_path)), tmp_path)

"""A real measurement on a card: the formula's range holds, and the figures are kept."""

import json
from pathlib import Path

import pytest

from engine.cli import main
from engine.plan.measured import HOME_VARIABLE
from tests.fakes.processes import ROOT

pytestmark = pytest.mark.gpu
RECIPE = ROOT / "presets" / "recipes" / "ministral-3-3b" / "qlora-text.yml"


def test_ministral_3b_is_measured_within_the_formulas_range_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "measured"))
    assert main(["estimate", str(RECIPE), "--json"]) == 0
    formula = json.loads(capfd.readouterr().out)
    assert main(["fit", str(RECIPE), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert (document["kind"], document["whole"]) == ("cuda", True)
    low, high = formula["range_bytes"]
    assert low <= document["peak_allocated_bytes"] <= high
    assert document["peak_allocated_bytes"] <= document["peak_reserved_bytes"]
    assert document["tokens_per_second"] > 0
    assert all(Path(path).is_file() for path in document["kept"])

"""A real measurement on a card: the formula's range holds, and the figures are kept."""

import json
from pathlib import Path

import pytest
import torch

from engine.cli import main
from engine.plan.measured import HOME_VARIABLE
from engine.train.fitcheck import open_peak_memory
from tests.fakes.processes import ROOT
from tests.support.card import Card

RECIPE = ROOT / "presets" / "recipes" / "ministral-3-3b" / "qlora-text.yml"


@pytest.mark.gpu
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


def test_peak_memory_is_what_the_allocator_and_the_driver_say(card: Card) -> None:
    with card.here():
        device = torch.device("cuda", 0)
        memory = open_peak_memory(device)
        with memory.measure("a tensor"):
            held = torch.empty(2**28, dtype=torch.uint8, device=device)
        memory.wait()
        peak, taken = memory.peaks["a tensor"], memory.device_bytes()
        assert peak.reserved_bytes is not None
        assert peak.reserved_bytes >= peak.allocated_bytes >= held.nbytes
        assert taken is None or taken >= held.nbytes
        assert not card.real or taken

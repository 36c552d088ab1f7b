"""`windtunnel fit` as a person types it: a real process, its figures, and where they are kept."""

import json
from pathlib import Path

import pytest

from engine.cli import main
from engine.plan.measured import HOME_VARIABLE
from tests.fakes.processes import ROOT

pytest.importorskip("torch")
DEMO = ROOT / "presets" / "recipes" / "demo-tiny" / "lora.yml"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "measured"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "measured"


def test_the_demo_is_measured_kept_and_believed(
    home: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["fit", str(DEMO), "--steps", "2", "--keep", str(tmp_path / "ours"), "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed.keys() >= {"peak_allocated_bytes", "tokens_per_second", "estimate"}
    assert abs(printed["difference"]) < 0.10
    assert [Path(path).parent for path in printed["kept"]] == [home, tmp_path / "ours"]
    assert all(Path(path).is_file() for path in printed["kept"])
    assert printed["whole"]
    assert printed["own_rows"]
    assert printed["run_seconds"] > 0
    assert main(["estimate", str(DEMO), "--json"]) == 0
    after = json.loads(capfd.readouterr().out)
    assert after["tokens_per_second"] == pytest.approx(printed["tokens_per_second"])
    assert after["duration"]["source"] == "measured"


def test_a_config_that_cannot_be_read_is_a_sentence(
    home: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.yml").write_text("base_model: nope\n", "utf-8")
    assert main(["fit", str(tmp_path / "bad.yml")]) == 2
    assert "nope" in capfd.readouterr().err

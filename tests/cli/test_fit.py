"""`fit` on the command line: what it prints, where figures are kept, and how it fails."""

import json
from pathlib import Path

import pytest

from engine.cli import main
from engine.cli.terminal import Host
from engine.plan.measured import HOME_VARIABLE
from tests.fakes.processes import ROOT
from tests.support.extras import needs_trainer

Out = pytest.CaptureFixture[str]
DEMO = ROOT / "presets" / "recipes" / "demo-tiny" / "lora.yml"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "measured"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "measured"


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "tiny.yml").write_text(
        "base_model: demo-tiny\n"
        "datasets: [{path: rows.jsonl, type: chat_template}]\n"
        "adapter: lora\nsequence_len: 64\nsample_packing: true\n"
    )
    return "tiny.yml"


def command(*words: str) -> int:
    """One command line, with a process that needs no torch."""
    return main(["fit", *words], Host(trainer="tests.fakes.fitter"))


def test_a_person_reads_what_was_built_measured_and_kept(
    config: str, home: Path, capfd: Out
) -> None:
    assert command(config) == 0
    printed = capfd.readouterr()
    assert "64 tokens at once of your rows, on this computer's CPU\n" in printed.out
    assert "of RAM at most" in printed.out
    assert "measured is +25.0% from it" in printed.out
    assert "2,000  tokens/s" in printed.out
    assert "7,200 steps, evaluations aside" in printed.out
    (kept,) = home.iterdir()
    assert printed.out.endswith(f"Kept in {kept}\n")
    assert "3 steps␛[31m" in printed.err


def test_a_part_of_a_model_says_what_it_stands_for(
    config: str, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PART", "1")
    assert command(config) == 0
    out = capfd.readouterr().out
    assert "2 of 3 layers, all widths divided by 4: it checks the formula" in out
    assert "of random tokens" in out
    assert "the whole run" not in out


def test_json_is_one_document_with_what_the_contract_names(
    config: str, capfd: Out, tmp_path: Path
) -> None:
    assert command(config, "--json", "--keep", str(tmp_path / "ours")) == 0
    printed = capfd.readouterr()
    document = json.loads(printed.out)
    assert not printed.err
    assert document["peak_allocated_bytes"] == document["formula_bytes"] * 5 // 4
    assert document["tokens_per_second"] == 2000.0
    assert document["estimate"]["parts"]
    assert document["difference"] == pytest.approx(0.25, abs=1e-6)
    assert [Path(path).is_file() for path in document["kept"]] == [True, True]
    assert Path(document["kept"][1]).parent == tmp_path / "ours"


def test_events_are_lines_of_the_vocabulary(config: str, capfd: Out) -> None:
    assert command(config, "--events") == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["type"] for line in lines] == ["phase", "note"]
    assert [line["seq"] for line in lines] == [0, 1]


def test_changes_reach_the_measurement(config: str, capfd: Out) -> None:
    assert command(config, "sequence_len=32", "--steps", "5") == 0
    printed = capfd.readouterr()
    assert "32 tokens at once" in printed.out
    assert "5 steps" in printed.err


def test_what_does_not_fit_leaves_with_3_and_keeps_nothing(
    config: str, home: Path, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "It does not fit: memory ran out in step 1.")
    assert command(config) == 3
    lines = capfd.readouterr().err.splitlines()[-3:]
    assert lines == ["It does not fit: memory ran out in step 1.", "It was full.", "Use less."]
    assert not home.exists()


def test_a_plan_knows_the_figure_from_then_on(
    config: str, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["estimate", config, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["tokens_per_second"] is None
    assert command(config, "--json") == 0
    assert main(["estimate", config, "--json"]) == 0
    *_, last = capfd.readouterr().out.splitlines()
    assert json.loads(last)["tokens_per_second"] == 2000.0


@pytest.mark.parametrize("words", [["gone.yml"], ["tiny.yml", "nonsense=1"]])
def test_a_wrong_request_starts_nothing(config: str, words: list[str], capfd: Out) -> None:
    assert command(*words) == 2
    assert len(capfd.readouterr().err.splitlines()) == 3


@needs_trainer
@pytest.mark.slow
def test_a_real_process_measures_the_demo_on_its_own_rows(
    capfd: Out, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["fit", str(DEMO), "--steps", "2", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert abs(document["difference"]) < 0.1
    assert (document["whole"], document["own_rows"]) == (True, True)
    assert len(document["losses"]) == 2
    assert document["run_seconds"] > 0
    assert document["device_bytes"] > document["peak_allocated_bytes"]
    assert main(["estimate", str(DEMO), "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["tokens_per_second"] == pytest.approx(document["tokens_per_second"])
    assert plan["duration"]["source"] == "measured"

"""`train` and `demo` on the command line: good input, bad input, exit status, JSON."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.cli import main
from engine.config import parse_config
from engine.runs import RunFolder, is_locked, status
from engine.wizard.start import create
from tests.support.extras import needs_trainer

pytestmark = pytest.mark.usefixtures("home")

SAMPLE = Path(__file__).parents[2] / "presets" / "samples" / "harbour-pilot" / "train.jsonl"
SMALL = """
# kept: a person's own words
base_model: demo-tiny
datasets:
  - path: rows.jsonl  # beside this file
    type: chat_template
adapter: lora
lora_r: 8
sequence_len: 128
micro_batch_size: 4
max_steps: 3
learning_rate: 0.005
bf16: false
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_bytes(SAMPLE.read_bytes())
    path = tmp_path / "pilot.yml"
    path.write_text(SMALL, "utf-8")
    return path


def types(text: str) -> list[str]:
    return [json.loads(line)["type"] for line in text.splitlines()]


@needs_trainer
def test_train_runs_to_the_end_and_says_where(
    config: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--json"]) == 0
    run = RunFolder(Path(json.loads(capfd.readouterr().out)["run"]))
    assert run.path.parent == home / "runs"
    assert status(run) == "finished"
    written = run.config.read_text("utf-8")
    assert "# kept: a person's own words" in written
    assert str(config.parent / "rows.jsonl") in written
    assert (run.adapter / "adapter_config.json").is_file()
    assert list(run.data.glob("*"))


@needs_trainer
def test_events_are_printed_as_they_are_in_the_file(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "here"
    assert (
        main(
            [
                "train",
                str(config),
                f"output_dir={folder}",
                "--max-steps",
                "1",
                "sample_packing=true",
                "--events",
            ]
        )
        == 0
    )
    printed = capfd.readouterr().out
    assert types(printed) == types((folder / "events.jsonl").read_text("utf-8"))
    assert types(printed)[-1] == "ended"
    assert {"started", "step", "saved"} <= set(types(printed))
    assert re.search(r"104 rows packed into \d+ sequences, 9\d\.\d% full", printed)


@needs_trainer
def test_a_detached_run_goes_on_without_us(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "--detach", "--json"]) == 0
    run = RunFolder(Path(json.loads(capfd.readouterr().out)["run"]))
    assert is_locked(run)
    assert main(["resume", str(run.path), "--json"]) == 2  # it runs: nothing to resume
    assert "is running" in capfd.readouterr().err
    # 1 where it ends by itself before it reads the command: it has three steps.
    assert main(["stop", str(run.path), "--json"]) in (0, 1)
    wait_for(lambda: not is_locked(run))
    assert status(run) in ("stopped", "finished")


@pytest.mark.parametrize(
    ("arguments", "exit_status", "words"),
    [
        (["train"], 2, ["config"]),
        (["train", "absent.yml"], 2, ["absent.yml"]),
        (["train", "{config}", "lerning_rate=1e-4"], 2, ["lerning_rate", "learning_rate"]),
        (["train", "{config}", "lora_r=many"], 2, ["lora_r"]),
        (["train", "{config}", "learning_rate"], 2, ["learning_rate"]),
        (["train", "{config}", "rl=dpo"], 2, ["rl"]),
        (["train", "{config}", "trust_remote_code=true"], 2, ["trust_remote_code"]),
        (["train", "{config}", "adapter=qlora"], 2, ["load_in_4bit"]),
        (["train", "{config}", "--no-such-flag"], 2, ["--no-such-flag"]),
        (["train", "{config}", "--max-steps", "-1"], 2, ["max_steps"]),
        (["demo", "--no-such-flag"], 2, ["--no-such-flag"]),
        (["demo", "{tmp}/run", "max_stepz=3"], 2, ["max_stepz", "max_steps"]),
        (["no-such-command"], 2, ["no-such-command"]),
    ],
)
def test_a_wrong_request_is_a_sentence(
    arguments: list[str],
    exit_status: int,
    words: list[str],
    config: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = [a.format(config=config, tmp=tmp_path) for a in arguments]
    assert main(given) == exit_status
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) >= 3, err
    for word in words:
        assert word.lower() in err.lower(), err


@needs_trainer
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("datasets[0].path=gone.jsonl", ["gone.jsonl"]),
        ("sequence_len=8", ["sequence_len"]),
    ],
)
def test_what_only_the_trainer_can_see_is_a_sentence_too(
    change: str,
    words: list[str],
    config: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "here"
    assert main(["train", str(config), change, f"output_dir={folder}"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert all(word in err for word in words), err
    assert status(RunFolder(folder)) == "failed"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("base_model=./no-such-model", ["no-such-model"]),
        ("lora_target_modules=[q_project]", ["q_project", "q_proj"]),
    ],
)
def test_what_the_plan_can_see_is_refused_before_there_is_a_run(
    change: str,
    words: list[str],
    config: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "here"
    assert main(["train", str(config), change, f"output_dir={folder}"]) == 2
    err = capfd.readouterr().err
    assert all(word in err for word in words), err
    assert not folder.exists()


@needs_trainer
def test_a_used_folder_is_never_mixed_with_another_run(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "here"
    arguments = ["train", str(config), f"output_dir={folder}", "max_steps=1"]
    assert main(arguments) == 0
    before = (folder / "events.jsonl").read_bytes()
    assert main(arguments) == 2
    assert "already holds a run" in capfd.readouterr().err
    assert (folder / "events.jsonl").read_bytes() == before
    assert main([*arguments[:3], "max_steps=2", "resume_from_checkpoint=true"]) == 0
    assert (folder / "events.jsonl").read_bytes().startswith(before)


@needs_trainer
def test_an_interrupted_run_is_saved_and_says_how_to_go_on(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    changes = [f"output_dir={folder}", "max_steps=5000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", "train", str(config), *changes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = RunFolder(folder)
    try:
        wait_for(lambda: run.events.exists() and '"type": "step"' in run.events.read_text())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert f"Go on with: windtunnel resume {folder}" in out
    assert status(run) == "stopped"
    assert (run.checkpoints / "LATEST").is_file()


def wait_for(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_paths_beside_the_config_are_absolute_in_the_run(config: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "words").mkdir()
    text = config.read_text("utf-8").replace("demo-tiny", "model")
    config.write_text(f"{text}tokenizer_config: words\ndataset_prepared_path: kept\n", "utf-8")
    made = parse_config(create(config, [], tmp_path / "home").config).config
    assert made.base_model == str(tmp_path / "model")
    assert made.tokenizer_config == str(tmp_path / "words")
    assert made.datasets[0].path == str(tmp_path / "rows.jsonl")
    assert made.dataset_prepared_path == str(tmp_path / "kept")


def test_a_catalog_name_stays_a_name_even_beside_a_folder_of_that_name(
    config: Path, tmp_path: Path
) -> None:
    (tmp_path / "demo-tiny").mkdir()
    made = parse_config(create(config, [], tmp_path / "home").config).config
    assert made.base_model == "demo-tiny"

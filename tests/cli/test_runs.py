"""`train`, `runs`, `pause`, `resume` and `stop` as a person and a script use them."""

import base64
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from msgspec import structs

import engine.child
from engine.catalog import find_model
from engine.cli import runs
from engine.config import parse_config
from engine.events import Ended, EventWriter
from engine.runs import RunFolder, ask, create_run, is_locked, status
from engine.wizard.start import create
from tests.fakes.engine import loss_at, step_event
from tests.fakes.processes import ROOT, fake_environment, processes_of, running_fake, wait_until
from tests.support.commands import Call
from tests.support.extras import needs_trainer
from tests.support.pictures import png
from tests.support.written_runs import read_steps

pytestmark = pytest.mark.usefixtures("home")

FAKE = "tests.fakes.engine"
PROGRAM = (
    "import sys; from engine.cli import main; from engine.cli.terminal import Host; "
    f"sys.exit(main(host=Host(trainer={FAKE!r})))"
)
SAMPLE = ROOT / "presets" / "samples" / "harbour-pilot" / "train.jsonl"
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


def start(*words: str, **fake: object) -> "subprocess.Popen[str]":
    """A command in a process of its own, with the fake trainer in the place of the real one."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=ROOT,
        env={**os.environ, **fake_environment(**fake)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def read_a_line(process: "subprocess.Popen[str]") -> None:
    """From the first line on a signal goes to the trainer."""
    assert process.stderr
    assert process.stderr.readline()


def test_runs_prints_the_keys_of_the_contract(run: RunFolder, call: Call) -> None:
    with EventWriter(run.events) as events:
        events.emit(step_event(3))
        events.emit(Ended("finished", 3))
    (row,) = call.document("runs")["runs"]
    assert row.pop("path") == str(run.path)
    assert row == {
        "name": "first",
        "status": "finished",
        "step": 3,
        "total_steps": step_event(3).total_steps,
        "loss": loss_at(3),
        "rows": None,
        "rows_left_out": None,
    }
    assert call("runs")[1].startswith("first  finished  step 3 of ")


def test_a_loss_of_nan_is_null_in_json_and_nan_in_words(run: RunFolder, call: Call) -> None:
    with EventWriter(run.events) as events:
        events.emit(structs.replace(step_event(3), loss=math.nan))
    assert call.document("runs")["runs"][0]["loss"] is None
    assert "loss nan" in call("runs")[1]


def test_no_runs_yet_is_an_empty_list_and_a_way_to_begin(call: Call) -> None:
    assert call.document("runs") == {"runs": []}
    assert "windtunnel demo" in call("runs")[1]


def test_an_unreadable_run_hides_no_other(run: RunFolder, call: Call, tmp_path: Path) -> None:
    broken = create_run("r", output_dir=tmp_path / "\x1b[2J")
    broken.events.mkdir()
    _, out, err = call("runs", "--json")
    assert [row["name"] for row in json.loads(out)["runs"]] == ["first"]
    assert "cannot be read" in err
    assert "\x1b" not in err


def test_a_folder_name_cannot_speak_to_the_terminal(call: Call, tmp_path: Path) -> None:
    create_run("r", output_dir=tmp_path / "\x1b[2Jx")
    assert "\x1b" not in call("runs")[1]


def test_another_folder_is_listed_by_option(run: RunFolder, call: Call, tmp_path: Path) -> None:
    create_run("other", home=tmp_path / "elsewhere")
    found = call.document("runs", "--runs", tmp_path / "elsewhere")["runs"]
    assert [row["name"] for row in found] == ["other"]


def test_a_run_is_paused_resumed_and_stopped(run: RunFolder, call: Call) -> None:
    with running_fake(run, save_seconds=0.3) as process:
        wait_until(lambda: len(read_steps(run)) > 1)
        paused = call.document("pause", "first")
        assert (paused["run"], paused["outcome"], paused["status"]) == ("first", "done", "paused")
        assert call("resume", "first")[1].startswith("Running: first, step ")
        code, out, _ = call("stop", "first", "--json")
        stopped = json.loads(out)
        assert (code, stopped["status"]) == (0, "stopped")
        assert not is_locked(run), "what was asked to stop has saved and is gone"
        assert process.wait(60) == 0
    assert (run.checkpoints / "LATEST").read_text() == f"step-{stopped['step']}"


def test_what_the_run_refuses_is_an_error(run: RunFolder, call: Call) -> None:
    with running_fake(run, refuses="pause"):
        code, _, err = call("pause", "first")
    assert (code, "refused to pause" in err) == (1, True)


@pytest.mark.parametrize("command", ["pause", "stop", "resume"])
def test_a_run_that_is_not_running_cannot_be_asked(
    run: RunFolder, call: Call, command: str
) -> None:
    if command != "resume":
        code, _, err = call(command, "first")
        assert (code, "is not running" in err) == (2, True)
    code, _, err = call(command, "firts")
    assert (code, "The nearest name is first." in err) == (2, True)


def test_a_run_that_does_not_answer_is_a_sentence(
    run: RunFolder, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_ANSWER_SECONDS", 0.2)
    with running_fake(run) as process:
        wait_until(lambda: len(read_steps(run)) > 1)
        process.send_signal(signal.SIGSTOP)
        code, _, err = call("stop", "first")
    assert (code, "has not answered" in err) == (1, True)


def test_a_run_with_long_steps_gets_longer_to_answer(run: RunFolder) -> None:
    assert runs._patience_seconds(run) == 60
    with EventWriter(run.events) as events:
        events.emit(structs.replace(step_event(3), seconds=100.0))
    assert runs._patience_seconds(run) == 300


def test_a_dead_run_is_resumed_in_the_foreground_to_its_end(run: RunFolder) -> None:
    with running_fake(run) as process:
        wait_until(lambda: len(read_steps(run)) > 4)
        process.kill()
        process.wait()
    resumed = start("resume", "first", "--json", steps=8)
    out, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, err
    assert json.loads(out)["status"] == "finished"
    assert [step.step for step in read_steps(run)] == list(range(1, 9))


def test_ctrl_c_in_the_foreground_saves_and_leaves_with_130(run: RunFolder) -> None:
    resumed = start("resume", "first")
    read_a_line(resumed)
    os.killpg(resumed.pid, signal.SIGINT)
    out, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 130
    assert "Traceback" not in err
    assert status(run) == "stopped"
    assert "saved checkpoints/step-" in err
    assert re.search(r"Stopped at step \d+ of 1000000000, and saved\.\n", out)


def test_a_run_that_finishes_after_a_warning_is_not_called_interrupted(run: RunFolder) -> None:
    resumed = start("resume", "first", refuses="stop", steps=30)
    wait_until(lambda: len(read_steps(run)) > 1)
    resumed.send_signal(signal.SIGUSR1)
    _, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, err
    asked = [json.loads(line)["command"] for line in run.control.read_text("utf-8").splitlines()]
    assert (status(run), asked) == ("finished", ["stop"])


def test_ctrl_c_twice_says_what_is_saved_and_how_to_go_on(run: RunFolder) -> None:
    resumed = start("resume", "first", save_seconds=30)
    wait_until(lambda: len(read_steps(run)) > 2)
    os.killpg(resumed.pid, signal.SIGINT)
    time.sleep(0.4)
    os.killpg(resumed.pid, signal.SIGINT)
    out, err = resumed.communicate(timeout=20)
    assert resumed.returncode == 130
    assert "Traceback" not in err
    assert re.search(r"Stopped at step \d+ of 1000000000, and nothing was saved\.\n", out)
    assert f"Go on with: windtunnel resume {run.path}\n" in out


def test_a_run_that_fails_in_the_foreground_says_why(run: RunFolder) -> None:
    resumed = start("resume", "first", fails_at=2)
    _, err = resumed.communicate(timeout=60)
    assert resumed.returncode != 0
    assert "The loss is NaN.\nIt diverged.\nLower lr.\n" in err


def test_a_run_that_is_killed_in_the_foreground_is_called_lost(run: RunFolder) -> None:
    resumed = start("resume", "first")
    wait_until(lambda: len(read_steps(run)) > 2)
    (trainer,) = processes_of(run.path)
    os.kill(trainer, signal.SIGKILL)
    _, err = resumed.communicate(timeout=60)
    assert "The run first is lost." in err


def test_resume_in_the_background_returns_at_once(run: RunFolder) -> None:
    resumed = start("resume", "first", "--detach", "--json")
    out, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, err
    assert json.loads(out)["status"] == "running"
    assert ask(run, "stop", timeout_seconds=20).outcome == "done"
    wait_until(lambda: not is_locked(run))
    assert engine.child.TRAINER == "engine.train"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_bytes(SAMPLE.read_bytes())
    path = tmp_path / "pilot.yml"
    path.write_text(SMALL, "utf-8")
    return path


BAD = '{"messages": [{"role": "user", "content": "Hi"}]}\n'
SEEN = {
    "image": {"bytes": None, "base64": base64.b64encode(png(28, 28)).decode()},
    "question": "What is it?",
    "answer": "A square.",
}


class TestTrain:
    @needs_trainer
    def test_runs_to_the_end_and_prints_its_events(self, config: Path, call: Call) -> None:
        with Path("rows.jsonl").open("a", encoding="utf-8") as rows:
            rows.write(BAD)
            rows.write('{"question": "q", "answer": "a", "hint": "h"}\n')
        changes = ("output_dir=here", "--max-steps", "1", "sample_packing=true")
        code, printed, _ = call("train", config, *changes, "--events")
        assert code == 0
        run = RunFolder(Path("here"))
        types, kept = (
            [json.loads(line)["type"] for line in text.splitlines()]
            for text in (printed, run.events.read_text("utf-8"))
        )
        assert types == kept
        assert types[-1] == "ended"
        assert {"started", "step", "saved"} <= set(types)
        assert re.search(r"1 of \d+ rows left out: 1 that cannot be used", printed)
        assert '"rows_left_out": 1' in printed
        assert re.search(r"hint: in \d+% of rows, not read, such as 'h'", printed)
        assert re.search(r"105 rows packed into \d+ sequences, 9\d\.\d% full", printed)
        assert status(run) == "finished"
        assert (run.adapter / "adapter_config.json").is_file()
        assert list(run.data.glob("*"))

    def test_a_detached_run_goes_on_without_us(self, config: Path, home: Path, call: Call) -> None:
        run = RunFolder(Path(call.document("train", config, "--detach", trainer=FAKE)["run"]))
        assert run.path.parent == home / "runs"
        written = run.config.read_text("utf-8")
        assert "# kept: a person's own words" in written
        assert str(config.parent / "rows.jsonl") in written
        assert is_locked(run)
        code, _, err = call("resume", run.path, "--json")
        assert (code, "is running" in err) == (2, True)
        assert call("stop", run.path, "--json")[0] == 0
        wait_until(lambda: not is_locked(run))
        assert status(run) == "stopped"

    def test_an_interrupted_run_says_how_to_go_on(self, config: Path, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "here")
        process = start("train", str(config), f"output_dir={run.path}")
        read_a_line(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert f"Go on with: windtunnel resume {run.path}" in out
        assert status(run) == "stopped"
        assert (run.checkpoints / "LATEST").is_file()

    @needs_trainer
    @pytest.mark.slow
    def test_a_used_folder_is_never_mixed_with_another_run(self, config: Path, call: Call) -> None:
        words = ("train", config, "output_dir=here")
        events = Path("here/events.jsonl")
        assert call(*words, "max_steps=1")[0] == 0
        before = events.read_bytes()
        code, _, err = call(*words, "max_steps=1")
        assert (code, "already holds a run" in err) == (2, True)
        assert events.read_bytes() == before
        assert call(*words, "max_steps=2", "resume_from_checkpoint=true")[0] == 0
        assert events.read_bytes().startswith(before)


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


def test_a_catalog_name_stays_one_beside_a_folder_of_that_name(
    config: Path, tmp_path: Path
) -> None:
    (tmp_path / "demo-tiny").mkdir()
    made = parse_config(create(config, [], tmp_path / "home").config).config
    assert made.base_model == "demo-tiny"


class TestDryRun:
    """`train --max-steps 0`"""

    ROWS = SAMPLE.read_text("utf-8").splitlines(keepends=True)[:2]

    def test_says_what_would_run_and_does_not(self, config: Path, home: Path, call: Call) -> None:
        Path("rows.jsonl").write_text("".join([*self.ROWS, BAD]), "utf-8")
        code, out, _ = call("train", config, "--max-steps", "0")
        said = out.splitlines()
        assert code == 0
        assert said[0].startswith("Dry run, nothing was loaded: it would train ")
        assert said[0].endswith(" parameters of demo-tiny on 2 rows.")
        assert "needs" in said[1]
        assert said[2] == "2 of 3 rows can be used."
        assert "tokens are learned" in said[3]
        assert said[4] == "! 1 of 3 rows left out: 1 that cannot be used."
        assert not home.exists()
        printed = call.document("train", config, "--max-steps", "0")
        left_out = printed.pop("rows_left_out")
        assert printed == {"run": None, "dry_run": said}
        assert (left_out["rows"], left_out["bad"], left_out["too_long"]) == (3, 1, 0)

    @pytest.mark.parametrize(
        ("changes", "code", "says"),
        [
            ("tf32=true", 0, "tf32: true has no effect"),
            ("test_datasets=[{path: rows.jsonl}]", 0, "held out: 2 of 2 rows can be used"),
            ("sequence_len=3 excess_length_strategy=raise", 2, "2 of 2 rows are longer"),
            ("sequence_len=3", 2, "No row is left to train on"),
            ("base_model=quantized", 2, "are quantized already with bitsandbytes"),
            ("base_model=patches datasets[0].path=seen.jsonl", 2, "do not cut images alike"),
            ("base_model=large", 3, "does not fit"),
        ],
    )
    def test_sees_what_a_run_would_stumble_over(
        self, config: Path, call: Call, changes: str, code: int, says: str
    ) -> None:
        Path("rows.jsonl").write_text("".join(self.ROWS), "utf-8")
        Path("seen.jsonl").write_text(json.dumps(SEEN), "utf-8")
        base = find_model("ministral-3-3b").config
        for name, change in (
            ("quantized", {"quantization_config": {"quant_method": "bitsandbytes"}}),
            ("patches", {"vision_config": base["vision_config"] | {"patch_size": 16}}),
            ("large", {"text_config": base["text_config"] | {"num_hidden_layers": 900}}),
        ):
            Path(name).mkdir()
            Path(name, "config.json").write_text(json.dumps(base | change), "utf-8")
        words = re.findall(r"(?:[^ {]|{.*})+", changes)
        if "base_model" in changes:
            words.append("tokenizer_config=ministral-3-3b")
        found, out, err = call("train", config, *words, "--max-steps", "0")
        assert (found, says in out + err) == (code, True), out + err
        if code == 3:
            assert call("train", config, *words, "--max-steps", "0", "--anyway")[0] == 0
        if "quantized" in changes:
            for command in ("train", "estimate", "fit"):  # no trainer is started for it
                assert call(command, config, *words)[:2] == (2, "")

    def test_rows_of_which_none_can_be_used_are_refused_now(self, config: Path, call: Call) -> None:
        Path("rows.jsonl").write_text(BAD, "utf-8")
        code, _, err = call("train", config, "--max-steps", "0")
        assert code == 2
        assert "No row of the datasets in pilot.yml can be used." in err

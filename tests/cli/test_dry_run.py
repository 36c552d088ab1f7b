"""`train --max-steps 0`: what it says, what it refuses, and that it leaves nothing behind."""

import json
from pathlib import Path

import pytest

from engine.cli import main

pytestmark = pytest.mark.usefixtures("home")

CONFIG = """
base_model: demo-tiny
datasets:
  - path: rows.jsonl
    type: chat_template
adapter: lora
sequence_len: 128
"""
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
BAD = {"messages": [{"role": "user", "content": "Hi"}]}


def written(folder: Path, *rows: object, config: str = CONFIG) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "small.yml").write_text(config, "utf-8")
    return str(folder / "small.yml")


def test_it_says_what_would_run_and_runs_nothing(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", written(tmp_path, ROW, ROW, BAD), "--max-steps", "0"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Dry run, nothing was loaded: it would train ")
    assert said[0].endswith(" parameters of demo-tiny on 2 rows.")
    assert "needs" in said[1]
    assert said[2] == "2 of 3 rows can be used."
    assert "tokens are learned" in said[3]
    assert not home.exists()


def test_its_document_names_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", written(tmp_path, ROW), "--max-steps", "0", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["run"] is None
    assert printed["dry_run"][0].startswith("Dry run")


@pytest.mark.parametrize(
    ("rows", "config", "words"),
    [
        ([BAD], CONFIG, "No row of the datasets in small.yml can be used."),
        ([ROW], CONFIG.replace("rows.jsonl", "gone.jsonl"), "gone.jsonl"),
        ([ROW], CONFIG + "load_in_4bit: true\n", "load_in_4bit"),
        ([ROW], CONFIG.replace("demo-tiny", "no-such-model"), "no-such-model"),
        ([ROW], CONFIG + "lora_target_modules: [nothing_proj]\n", "nothing_proj"),
        ([ROW], CONFIG + "tensor_parallel_size: 2\nrl: dpo\n", "rl"),
    ],
)
def test_what_would_fail_later_is_refused_now(
    rows: list[object],
    config: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", written(tmp_path, *rows, config=config), "--max-steps", "0"]) == 2
    assert words in capsys.readouterr().err

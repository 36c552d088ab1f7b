"""A folder like Mistral Nemo's or Ministral 8B's of 2024 goes the whole way, by commands."""

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest

from engine.cli import main
from engine.runs import RunFolder, status
from tests.support.tiny import MISTRAL, write_model

TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
# Nemo's heads are narrower than its width asks for: 32 of 128 on a width of 5,120.
NEMO = MISTRAL | {"vocab_size": 131072, "num_attention_heads": 4, "sliding_window": None}
MINISTRAL = MISTRAL | {"vocab_size": 131072, "sliding_window": 64}
ROW = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Good night."},
    ]
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WINDTUNNEL_RUNS", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 8, "utf-8")
    keys = {
        "base_model": "model",
        "datasets": [{"path": "rows.jsonl"}],
        **{"adapter": "lora", "lora_r": 4, "sequence_len": 64, "bf16": False},
        **{"max_steps": 2, "output_dir": "run", "dataset_prepared_path": "prepared"},
    }
    (tmp_path / "made.yml").write_text(json.dumps(keys), "utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("shape", [NEMO, MINISTRAL], ids=["nemo", "ministral"])
def test_end_to_end(shape: dict[str, Any], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_model(place / "model", shape)
    shutil.copyfile(TEKKEN, place / "model" / "tekken.json")

    def run(*words: str) -> Any:
        assert main([*words, "--json"]) == 0, capfd.readouterr().err
        return json.loads(capfd.readouterr().out)

    shown = run("preview", "made.yml")
    # v3 writes the system prompt into the last user message.
    assert list(dict.fromkeys(shown["kinds"])) == ["bos", "user", "text", "eos", "system"]
    carried = sum(label != -100 for label in shown["labels"])
    assert run("estimate", "made.yml")["rows_counted"] == 8
    assert run("prepare", "made.yml")["learned_tokens"] == 8 * carried
    folder = RunFolder(Path(run("train", "made.yml")["run"]))
    assert status(folder) == "finished"
    steps = [json.loads(line) for line in folder.events.read_text("utf-8").splitlines()]
    assert sum(event["type"] == "step" for event in steps) == 2
    assert (folder.adapter / "tekken.json").is_file()
    (answer,) = run("generate", "run", "--prompt", "Hello there", "--max-tokens", "2")["answers"]
    assert answer["prompt_tokens"] == 5  # <s>[INST]Hello there[/INST]


@pytest.mark.slow
def test_rows_beyond_the_window_are_refused(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_model(place / "model", MINISTRAL)
    shutil.copyfile(TEKKEN, place / "model" / "tekken.json")
    for command in ("estimate", "train"):
        assert main([command, "made.yml", "sequence_len=65"]) == 2
        assert "attention sees 64 tokens" in capfd.readouterr().err

"""What a command loads: a person who lists runs does not wait for torch, nor needs it."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"}
LATE = {"mistral_common", "numpy", "pyarrow", "huggingface_hub", "textual"}


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize("command", ["--help", "runs", "models", "schema"])
def test_light_commands_load_neither_the_trainer_nor_a_tokenizer(command: str) -> None:
    code = f"from engine.cli import main; main(['{command}'])"
    assert not loaded_by(code) & (HEAVY | LATE)


def test_a_preview_needs_no_training_stack() -> None:
    rows = "presets/samples/harbour-pilot/train.jsonl"
    code = f"from engine.cli import main; main(['preview', '{rows}', '--model', 'demo-tiny'])"
    loaded = loaded_by(code)
    assert "mistral_common" in loaded
    assert not loaded & HEAVY


def test_starting_a_run_loads_the_trainer_in_its_own_process_only() -> None:
    assert not loaded_by("import engine.launch, engine.cli.runs") & (HEAVY | LATE)

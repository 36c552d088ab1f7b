"""What a command loads: a person who lists runs does not wait for torch, nor needs it."""

import pytest

from tests.fakes.processes import printed_by

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"}
LATE = {"mistral_common", "numpy", "pyarrow", "huggingface_hub", "textual"}


def loaded_by(code: str) -> set[str]:
    printed = printed_by("-c", f"import sys\n{code}\nprint()\nprint(*sys.modules)")
    return {name.split(".")[0] for name in printed.splitlines()[-1].split()}


LIGHT = {
    **{
        f"from engine.cli import main; main(['{command}'])": HEAVY | LATE
        for command in ("--help", "runs", "models", "schema")
    },
    # Starting a run loads the trainer in its own process only.
    "import engine.launch, engine.cli.runs": HEAVY | LATE,
    "import engine.launch, engine.runs": HEAVY | LATE | {"pydantic", "rich"},
    "import engine.catalog": HEAVY | LATE | {"pydantic", "ruamel"},
    "import engine.cli, engine.hardware": {"pynvml"},
    "import engine.data.worker, engine.data.prepare": HEAVY | {"textual", "rich"},
    # The trainer reads prepared arrays, and most rows are text.
    "import engine.chat.render": {"mistral_common"},
    "import engine.chat.row, engine.chat.render, engine.chat.images": {"PIL"},
    "import tui.app; from tui.screens import machine, runs, train": HEAVY
    | {"mistral_common", "numpy", "pydantic"},
}


@pytest.mark.parametrize("code", LIGHT)
def test_it_loads_nothing_that_it_does_not_need(code: str) -> None:
    assert not loaded_by(code) & LIGHT[code]


def test_a_preview_needs_no_training_stack() -> None:
    rows = "presets/samples/harbour-pilot/train.jsonl"
    code = f"from engine.cli import main; main(['preview', '{rows}', '--model', 'demo-tiny'])"
    loaded = loaded_by(code)
    assert "mistral_common" in loaded
    assert not loaded & HEAVY

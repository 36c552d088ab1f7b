"""`train --verify-resume` with the real trainer: what it proves, and what it would find."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.cli import main
from engine.runs import list_runs
from engine.wizard.verify import Proof, verify_resume
from tests.support.trainers import LORA, QLORA, Workshop

pytestmark = pytest.mark.slow
KEYS = LORA
HELD_OUT = {"val_set_size": 0.1, "warmup_steps": 30}


@pytest.mark.parametrize(
    "keys",
    [
        LORA,
        LORA | HELD_OUT,
        QLORA | HELD_OUT,
        {"adapter": None} | HELD_OUT,
        LORA | HELD_OUT | {"dp_shard_size": 2},
    ],
    ids=["plain", "lora", "qlora", "full", "two ranks"],
)
def test_each_method_goes_on_bit_for_bit(
    workshop: Workshop,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    keys: dict[str, Any],
) -> None:
    monkeypatch.setenv("WINDTUNNEL_RUNS", str(tmp_path))
    run = workshop.new(**keys)
    assert main(["train", str(run.config), "--verify-resume", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["verify_resume"]
    assert (found["same"], found["difference"], found["usual_difference"]) == (True, 0.0, 0.0)
    unbroken, resumed = found["losses"]
    assert len(set(unbroken)) == 5
    assert resumed == unbroken[2:]
    again, evaluated = found["evaluations"]
    assert again == evaluated
    assert len(evaluated) == ("val_set_size" in keys)
    assert not [*tmp_path.iterdir(), *list_runs()]


@pytest.mark.parametrize("forgotten", ["restore_optimizer", "restore_rng_state", "load_trained"])
def test_what_a_resume_forgets_is_found(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    monkeypatch.setenv("FORGETS", forgotten)
    proof = prove(workshop.new(**LORA, **HELD_OUT).config)
    assert not proof.holds
    assert proof.verdict().startswith("✗ a stopped run does not go on to the same losses")


def prove(config: Path) -> Proof:
    return verify_resume(
        config, (), None, home=None, module="tests.fakes.forgetful", say=print, show=print
    )

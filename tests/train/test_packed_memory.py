"""What a step over packed rows takes under a mask, against the plan."""

from pathlib import Path
from typing import Any

import pytest

from engine.catalog import read_architecture
from engine.plan.memory import moment_parts
from tests.research import oracle
from tests.support.machines import cpu
from tests.support.tiny import settings, write_model

NOT_AGAIN = {"gradient_checkpointing": False}


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("three_layers") / "three_layers", oracle.WIDE)


@pytest.mark.parametrize("again", [NOT_AGAIN, {"checkpointed_layers": 1}, {}], ids=str)
@pytest.mark.parametrize("method", ["lora", None])
def test_masked_rows_take_the_plan(
    three_layers: Path, again: dict[str, Any], method: str | None
) -> None:
    """On a CPU, whose attention turns the mask into numbers for every layer that keeps it."""
    tokens = 1024
    keys = {"adapter": method, "sample_packing": True, "sequence_len": tokens, "bf16": False}
    keys |= {"gradient_checkpointing": True, "gradient_accumulation_steps": 2} | again
    _, peak = oracle.really_run(three_layers, keys, tokens, 1, rows=2)
    architecture = read_architecture(three_layers)
    planned = moment_parts(settings(three_layers, **keys), architecture, cpu(64), "backward pass")
    more = sum(planned.get(part, 0) for part in ("activations", "layer", "mask"))
    assert more == pytest.approx(peak, rel=0.1)

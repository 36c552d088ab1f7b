"""What presets/FITS.md says of a card against a dry run of the same step."""

import random
from functools import cache

import pytest

from engine.catalog import read_architecture
from engine.plan.measured import step_bytes
from tests.make.fits import Cell, cells
from tests.research.oracle import dry_run


@cache
def sampled_cells(count: int) -> list[Cell]:
    """Cells with everything on the card, one of each model first, the same ones each time."""
    whole = [cell for cell in cells() if not cell.advice.offloads]
    text = [cell for cell in whole if cell.goal != "vision" and cell.device.computes_bf16]
    random.Random(4).shuffle(text)
    first = {cell.model: cell for cell in reversed(text)}
    rest = [cell for cell in text if cell not in first.values()]
    return [*first.values(), *rest][:count]


@pytest.mark.parametrize("number", range(20))
def test_a_sampled_cell_agrees_with_the_dry_run_within_its_range(number: int) -> None:
    cell = sampled_cells(20)[number]
    config, needs = cell.advice.config, cell.advice.estimate
    run = dry_run(
        read_architecture(cell.model),
        config.model_copy(update={"bf16": True}),
        tokens_per_sequence=config.sequence_len,
        sequences=config.micro_batch_size,
        vision_on_device=False,
    )
    step = step_bytes(needs)
    print(f"{cell.model} {cell.goal} {cell.card}: formula {step}, dry run {run.peak_bytes}")
    assert step * (1 - needs.uncertainty) <= run.peak_bytes <= step * (1 + needs.uncertainty), run

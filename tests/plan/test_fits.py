"""presets/FITS.md says what the product says, and says it of everything that can be asked."""

import random
import re
from collections import Counter
from functools import cache

import pytest

from engine.catalog import Architecture, read_architecture
from engine.hardware import listed_gpus
from engine.plan import make_fit
from engine.plan.measured import step_bytes
from tests.make.fits import GOALS, PAGE, Cell, cells, line_of, page


@cache
def every_cell() -> tuple[Cell, ...]:
    return tuple(cells())


def test_the_page_holds_the_lines_that_are_made_now() -> None:
    """`python -m tests.make.fits` makes it anew."""
    written = PAGE.read_text("utf-8").splitlines()
    assert Counter(map(line_of, every_cell())) == Counter(
        line for line in written if re.match(r"\| (magistral|ministral|mistral)-", line)
    )


@pytest.mark.slow
def test_the_whole_page_is_what_is_made_now() -> None:
    assert PAGE.read_text("utf-8") == page()


def test_every_card_model_and_goal_has_its_line() -> None:
    counts = Counter(cell.goal for cell in every_cell())
    assert len({cell.card for cell in every_cell()}) == len(listed_gpus()) + 3
    assert set(counts) == set(GOALS)
    assert counts["text"] == 9 * (len(listed_gpus()) + 3)


def test_none_is_worse_than_the_ladder_can_make_it() -> None:
    poor = [cell for cell in every_cell() if cell.advice.estimate.verdict != "fits"]
    for cell in poor:
        rungs = make_fit(cell.advice.config, cell_architecture(cell), cell.device)
        assert not rungs or rungs[-1].estimate.verdict != "fits"
    # Only the two largest models, and only below 12 GB.
    assert {cell.model for cell in poor} <= {"mistral-medium-3.5", "mistral-small-4"}
    assert {cell.card for cell in poor} <= {"6 GB GPU", "8 GB GPU"}


def cell_architecture(cell: Cell) -> Architecture:

    return read_architecture(cell.model)


def sampled_cells(count: int) -> list[Cell]:
    """Cells with everything on the card, one of each model first, the same ones each time."""
    whole = [cell for cell in every_cell() if not cell.advice.offloads]
    text = [cell for cell in whole if cell.goal != "vision" and cell.device.computes_bf16]
    random.Random(4).shuffle(text)
    first = {cell.model: cell for cell in reversed(text)}
    rest = [cell for cell in text if cell not in first.values()]
    return [*first.values(), *rest][:count]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(20), ids=lambda n: f"{(c := sampled_cells(20)[n]).model} {c.goal} {c.card}"
)
def test_a_sampled_cell_agrees_with_the_dry_run_within_its_range(number: int) -> None:
    from tests.research.oracle import dry_run

    cell = sampled_cells(20)[number]
    config, needs = cell.advice.config, cell.advice.estimate
    run = dry_run(
        cell_architecture(cell),
        config.model_copy(update={"bf16": True}),
        tokens_per_sequence=config.sequence_len,
        sequences=config.micro_batch_size,
        vision_on_device=False,
    )
    step = step_bytes(needs)
    print(f"{cell.model} {cell.goal} {cell.card}: formula {step}, dry run {run.peak_bytes}")
    assert step * (1 - needs.uncertainty) <= run.peak_bytes <= step * (1 + needs.uncertainty), run

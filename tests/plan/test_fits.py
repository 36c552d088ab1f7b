"""presets/FITS.md says what the product says, and says it of everything that can be asked."""

import re
from collections import Counter
from functools import cache

import pytest

from engine.catalog import read_architecture
from engine.hardware import listed_gpus
from engine.plan import make_fit
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
        rungs = make_fit(cell.advice.config, read_architecture(cell.model), cell.device)
        assert not rungs or rungs[-1].estimate.verdict != "fits"
    # Only the two largest models, and only below 12 GB.
    assert {cell.model for cell in poor} <= {"mistral-medium-3.5", "mistral-small-4"}
    assert {cell.card for cell in poor} <= {"6 GB GPU", "8 GB GPU"}

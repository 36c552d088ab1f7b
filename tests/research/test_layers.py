"""What each way of running a layer takes, against the plan's formulas."""

import pytest

from tests.research.layer_memory import REGIMES, Regime, layer_against_plan


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_a_layer_of_the_step_takes_the_planned_bytes(regime: Regime) -> None:
    planned, measured = layer_against_plan(regime)
    assert planned == pytest.approx(measured, rel=0.05), "python -m tests.research.layer_memory"

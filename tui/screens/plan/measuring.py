"""A plan measured on this computer, from a thread of the wizard.

Separate from the page because it waits for a process: the page is told when it has ended.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from textual.message import Message

from engine.config import RunConfig
from engine.data.config_paths import with_absolute_paths
from engine.errors import UserError
from engine.plan.measured import Measurement, store
from tui.messages import PlanMeasured, WorkRefused

MEASURING: Final = {
    "cuda": "building the real shape with random weights, to run a few steps of it: a few minutes,"
    " no download",
    "cpu": "building two layers with random weights: this checks the formula, and no card",
}


def measure_plan(config: RunConfig, tell: Callable[[Message], object]) -> None:
    """Measure `config`, keep the figures, and tell the page."""
    # Imported here: the commands are not needed before, and the first page does not wait for them.
    from engine.cli.fit import describe
    from engine.wizard.measure import measure

    try:
        fitted = measure(with_absolute_paths(config, Path.cwd()))
        store(Measurement(**fitted["measurement"]))
    except UserError as error:
        tell(WorkRefused(error))
    else:
        lines = [" ".join(line.split()) for line in describe(fitted, []) if "Kept in" not in line]
        tell(PlanMeasured("; ".join(lines[1:4])))

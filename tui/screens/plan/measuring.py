"""A plan measured on this computer, from a thread of the wizard.

Separate from the page because it waits for a process: the page is told when it has ended.
"""

from collections.abc import Callable
from pathlib import Path

from textual.message import Message

from engine.config import RunConfig
from engine.data.config_paths import with_absolute_paths
from engine.errors import UserError
from engine.report.fit import fit_lines
from engine.wizard.measure import measure_and_keep
from tui.messages import PlanMeasured, WorkRefused


def measure_plan(config: RunConfig, tell: Callable[[Message], object]) -> None:
    """Measure `config`, keep the figures, and tell the page."""
    try:
        fitted = measure_and_keep(with_absolute_paths(config, Path.cwd()))
    except UserError as error:
        tell(WorkRefused(error))
    else:
        lines = [" ".join(line.split()) for line in fit_lines(fitted)]
        tell(PlanMeasured("; ".join(lines[1:4])))

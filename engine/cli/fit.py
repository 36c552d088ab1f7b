"""`fit`: what a config's run really takes, measured on this computer before anything is downloaded.

The command holds no tensor: a process with torch builds and steps, and here is only what it is
given, how its figures are told, and where they are kept.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from engine.child import TRAINER
from engine.cli.printing import AsEvents, AsJson
from engine.cli.runs import EventLines, PlainWatch
from engine.plan.measured import Measurement, store
from engine.report.fit import difference, fit_lines
from engine.visible import visible
from engine.wizard.measure import STEPS, measure
from engine.wizard.request import read_planned


def register_fit(app: cyclopts.App, module: str = TRAINER) -> None:
    """Add the command; `module` is the process that computes."""

    @app.command
    def fit(
        config: Annotated[Path, Parameter(help="YAML file with Axolotl's keys.")],
        /,
        *changes: Annotated[str, Parameter(help="Changes, such as sequence_len=4096.")],
        steps: Annotated[int, Parameter(help="Steps to make; the first is not timed.")] = STEPS,
        keep: Annotated[Path | None, Parameter(help="Keep the figures in this folder too.")] = None,
        as_json: AsJson = False,
        as_events: AsEvents = False,
    ) -> int:
        """Measure what a config takes here, in a few real steps on random weights.

        Nothing is downloaded. The figures are kept, and beat the formula from then on.
        Without a GPU a model of two layers is measured, which checks the formula only.
        Exit status 3: it does not fit.
        """
        run, _ = read_planned(config, changes)
        watch = EventLines() if as_events else None if as_json else PlainWatch(sys.stderr)
        fitted = measure(run, max(1, steps), module, watch.show if watch else None)
        measured = Measurement(**fitted["measurement"])
        kept = [store(measured)] + ([store(measured, keep)] if keep else [])
        if as_json:
            print(json.dumps(document(fitted, kept)))
        elif not as_events:
            places = visible(" and ".join(map(str, kept)), one_line=True)
            for line in fit_lines(fitted):
                print(visible(line, one_line=True))
            print(f"Kept in {places}")
        return 0


def document(fitted: Mapping[str, Any], kept: list[Path]) -> dict[str, Any]:
    """What `--json` prints; sizes in bytes, times in seconds."""
    figures = {name: value for name, value in fitted["measurement"].items() if name != "key"}
    rest = {name: value for name, value in fitted.items() if name != "measurement"}
    return figures | rest | {"difference": difference(fitted), "kept": [str(path) for path in kept]}

"""`fit`: what a config's run really takes, measured on this computer before anything is downloaded.

The command holds no tensor: a process with torch builds and steps, and here is only what it is
given, how its figures are told, and where they are kept.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from engine.cli.training import AsEvents, AsJson, EventLines
from engine.cli.watch import PlainWatch
from engine.launch import TRAINER
from engine.plan.measured import Measurement, store
from engine.units import gib, spoken
from engine.visible import visible
from engine.wizard.measure import STEPS, measure
from engine.wizard.request import read_planned


def register(app: cyclopts.App, module: str = TRAINER) -> None:
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
            for line in describe(fitted, kept):
                print(visible(line, one_line=True))
        return 0


def document(fitted: Mapping[str, Any], kept: list[Path]) -> dict[str, Any]:
    """What `--json` prints; sizes in bytes, times in seconds."""
    figures = {name: value for name, value in fitted["measurement"].items() if name != "key"}
    rest = {name: value for name, value in fitted.items() if name != "measurement"}
    return (
        figures | rest | {"difference": _difference(fitted), "kept": [str(path) for path in kept]}
    )


def describe(fitted: Mapping[str, Any], kept: list[Path]) -> Iterator[str]:
    """The figures for a person."""
    measured, needs = fitted["measurement"], fitted["estimate"]
    rows = "your rows" if fitted["own_rows"] else "random tokens"
    built = f"{needs['total_parameters']:,} random weights in {fitted['layers']} layers"
    yield f"{built}, {fitted['tokens']:,} tokens at once of {rows}, on {fitted['device']}"
    if not fitted["whole"]:
        widths = fitted["widths_divided_by"]
        smaller = f", all widths divided by {widths}" if widths > 1 else ""
        yield (
            f"  this is {fitted['layers']} of {fitted['of_layers']} layers{smaller}: it checks the "
            "formula, and says nothing of a card's memory or speed"
        )
    yield f"  measured peak   {gib(measured['peak_allocated_bytes']):>10}  allocated by tensors"
    if measured["peak_reserved_bytes"]:
        yield f"                  {gib(measured['peak_reserved_bytes']):>10}  held by the allocator"
    if measured["device_bytes"]:
        where = "of the device, by the driver" if fitted["kind"] == "cuda" else "of RAM at most"
        yield f"                  {gib(measured['device_bytes']):>10}  the whole process, {where}"
    yield (
        f"  formula         {gib(needs['step_bytes']):>10}  "
        f"measured is {_difference(fitted):+.1%} from it"
    )
    if measured["load_peak_bytes"] > measured["peak_allocated_bytes"]:
        yield f"  loading took    {gib(measured['load_peak_bytes']):>10}  more than the steps"
    yield f"  speed           {measured['tokens_per_second']:>10,.0f}  tokens/s"
    if fitted["run_seconds"] is not None:
        steps = f"{fitted['total_steps']:,} steps, evaluations aside"
        yield f"  the whole run   {spoken(fitted['run_seconds']):>10}  {steps}"
    elif fitted["whole"]:
        hourly = f"{3600 * measured['tokens_per_second']:,.0f}"
        yield f"  an hour         {hourly:>10}  tokens; the rows that are not here decide how many"
    yield f"Kept in {' and '.join(map(str, kept))}"


def _difference(fitted: Mapping[str, Any]) -> float:
    """How far the measured peak is from the formula's, as a share of the formula's."""
    formula = int(fitted["estimate"]["step_bytes"])
    return int(fitted["measurement"]["peak_allocated_bytes"]) / max(1, formula) - 1

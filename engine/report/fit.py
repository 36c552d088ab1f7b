"""What a config took when it was measured, in lines."""

from collections.abc import Iterator, Mapping
from typing import Any

from engine.units import gib, spoken


def fit_lines(fitted: Mapping[str, Any]) -> Iterator[str]:
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
        f"measured is {difference(fitted):+.1%} from it"
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


def difference(fitted: Mapping[str, Any]) -> float:
    """How far the measured peak is from the formula's, as a share of the formula's."""
    formula = int(fitted["estimate"]["step_bytes"])
    return int(fitted["measurement"]["peak_allocated_bytes"]) / max(1, formula) - 1

"""`windtunnel models`: the catalog as a table or as one JSON document, or what fits on a GPU.

The sizes are computed from the shapes each time, so that they cannot disagree with the plan.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter

from engine.catalog import ModelCard, ModuleTable, list_models
from engine.catalog.rows import module_table
from engine.cli.printing import AsJson
from engine.plan import Device, Prospect, best_device, device_document, survey
from engine.report.models import model_verdict, size
from engine.units import gib
from engine.wizard.request import find_machine

_HEADINGS = ("name", "size", "active", "context", "reads", "thinks", "licence")
_PLANNED_HEADINGS = ("name", "size", "verdict", "needs", "method", "length", "at once")
_NUMBERS = {"size", "active", "context", "needs", "length", "at once"}
_LEGEND = """
size: all parameters, computed from the shapes; active: those that one text
token uses. thinks: between [THINK] tokens; between <think> tags that are plain
text; or, by effort, between tokens and only when asked to.
All that is known of each, with sources: windtunnel models --json"""


def print_models(
    *, assumed: Annotated[str | None, Parameter("--assume")] = None, as_json: AsJson = False
) -> int:
    """List the models of the catalog with their sizes, licences and contexts.

    Parameters
    ----------
    assumed
        Say what each needs on this GPU: "RTX 4090", "H100", "24 GB".
    """
    offered = [card for card in list_models() if card.offered]
    catalog = [(card, module_table(card.config, where=card.name)) for card in offered]
    catalog.sort(key=lambda entry: entry[1].total_parameters)
    if assumed is None:
        document = {"models": [model_entry(*entry) for entry in catalog]}
        print(json.dumps(document) if as_json else show(catalog))
        return 0
    device = best_device(find_machine(assumed))
    planned = survey(device)
    if as_json:
        entries = [
            model_entry(*entry) | {"plan": _describe_plan(prospect)}
            for entry, prospect in zip(catalog, planned, strict=True)
        ]
        print(json.dumps({"device": device_document(device), "models": entries}))
    else:
        print(show_planned(planned, device))
    return 0


def model_entry(card: ModelCard, table: ModuleTable) -> dict[str, Any]:
    """One entry of `models[]`: the card without its config, with the computed sizes."""
    entry = asdict(card)
    del entry["config"]
    return entry | {
        "architecture": table.class_name,
        "total_parameters": table.total_parameters,
        "active_parameters": table.active_parameters,
        "parameters_by_group": table.counts_by_group(),
    }


def show(catalog: list[tuple[ModelCard, ModuleTable]]) -> str:
    """The catalog as plain text, at most 80 columns wide."""
    rows = [
        (
            card.name,
            size(table.total_parameters),
            size(table.active_parameters),
            f"{card.context_tokens // 1024}k",
            "images" if "vision" in card.modalities else "text",
            "-" if card.thinking == "none" else card.thinking,
            card.licence,
        )
        for card, table in catalog
    ]
    return _table(_HEADINGS, rows) + "\n" + _LEGEND


def show_planned(planned: Sequence[Prospect], device: Device) -> str:
    """What each model needs on `device`, as plain text, at most 80 columns wide."""
    rows = []
    for prospect in planned:
        needs, config = prospect.plan.estimate, prospect.plan.config
        verdict = model_verdict(prospect.plan)
        rows.append(
            (
                prospect.card.name,
                size(needs.total_parameters),
                f"{verdict.mark} {verdict.label}",
                gib(needs.device_bytes),
                (config.adapter or "full") + (", RAM" if prospect.plan.offloads else ""),
                f"{config.sequence_len:,}",
                f"{needs.tokens_at_once:,}",
            )
        )
    waiting = [p.card.name for p in planned if p.plan.not_trained]
    return (
        f"{device.name} can give {gib(device.can_give_bytes)}\n"
        + _table(_PLANNED_HEADINGS, rows)
        + "\n\nlength: tokens of a sequence; at once: tokens in one forward pass."
        + "\nRAM: part of it waits in this computer's memory, which takes longer."
        + (f"\nPlanned, and not trained yet: {', '.join(waiting)}." if waiting else "")
    )


def _describe_plan(prospect: Prospect) -> dict[str, Any]:
    needs, plan = prospect.plan.estimate, prospect.plan
    return {
        "verdict": needs.verdict,
        "device_bytes": needs.device_bytes,
        "method": plan.config.adapter or "full",
        "not_trained": plan.not_trained,
    }


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    whole = [headings, *rows]
    widths = [max(len(row[column]) for row in whole) for column in range(len(headings))]
    lines = []
    for row in whole:
        cells = [
            cell.rjust(width) if heading in _NUMBERS else cell.ljust(width)
            for cell, width, heading in zip(row, widths, headings, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

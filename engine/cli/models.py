"""`windtunnel models`: the catalog as a table or as one JSON document.

The sizes are computed from the shapes each time, so that they cannot disagree with the plan.
"""

import json
from dataclasses import asdict
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from engine.catalog import ModelCard, ModuleTable, list_models, module_table

AsJson = Annotated[bool, Parameter("--json", negative="")]

_HEADINGS = ("name", "size", "active", "context", "reads", "thinks", "licence")
_LEGEND = """
size: all parameters, computed from the shapes; active: those that one text
token uses. thinks: between [THINK] tokens; between <think> tags that are plain
text; or, by effort, between tokens and only when asked to.
All that is known of each, with sources: windtunnel models --json"""


def register(app: cyclopts.App) -> None:
    """Adds the command of this module to `app`."""
    app.command(print_models, name="models")


def print_models(*, as_json: AsJson = False) -> int:
    """List the models of the catalog with their sizes, licences and contexts.

    Parameters
    ----------
    as_json
        Print one JSON document.
    """
    catalog = [(card, module_table(card.config, where=card.name)) for card in list_models()]
    catalog.sort(key=lambda entry: entry[1].total_parameters)
    print(json.dumps({"models": [describe(*e) for e in catalog]}) if as_json else show(catalog))
    return 0


def describe(card: ModelCard, table: ModuleTable) -> dict[str, Any]:
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
    rows = [_HEADINGS] + [
        (
            card.name,
            _short(table.total_parameters),
            _short(table.active_parameters),
            f"{card.context_tokens // 1024}k",
            "images" if "vision" in card.modalities else "text",
            "-" if card.thinking == "none" else card.thinking,
            card.licence,
        )
        for card, table in catalog
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if heading in ("size", "active", "context") else cell.ljust(width)
            for cell, width, heading in zip(row, widths, _HEADINGS, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n" + _LEGEND


def _short(parameters: int) -> str:
    if parameters < 10**9:
        return f"{parameters / 10**6:.1f}M"
    return f"{parameters / 10**9:.1f}B"

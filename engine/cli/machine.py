"""`probe`, `doctor` and `models`: what this computer has, what to install for it, what fits on it.

Probe and doctor do their work on a computer without a GPU too, so both end with 0 there; what is
wrong is in the text and in `problems`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from engine.catalog import ModelCard, ModuleTable, list_models
from engine.catalog.rows import module_table
from engine.cli.terminal import AsJson, Assume
from engine.hardware import (
    Gpu,
    Machine,
    Missing,
    Problem,
    flash_4_on,
    missing_packages,
)
from engine.plan import Device, Prospect, best_device, device_document, survey
from engine.report import Line
from engine.report.machine import (
    card_state,
    card_text,
    package_lines,
    packages_line,
    problem_line,
    process_cells,
    ready_line,
    rest_lines,
)
from engine.report.plan import model_verdict, size
from engine.units import counted, gib
from engine.visible import fold, visible
from engine.wizard.start import find_machine

_COLUMNS = 80
_HOST = (
    *("cpu_name", "cpu_count", "ram_total_bytes", "ram_available_bytes"),
    *("disk_path", "disk_free_bytes", "driver_version", "cuda_version"),
)


def probe(*, assume: Assume = None, as_json: AsJson = False) -> None:
    """Show this computer's GPUs, what uses them, memory, disk, and the training stack."""
    machine = find_machine(assume)
    print(json.dumps(machine_entry(machine)) if as_json else "\n".join(machine_lines(machine)))


def doctor(*, as_json: AsJson = False) -> None:
    """Show what is installed, what is missing on this computer, and the command that adds it."""
    machine = find_machine(None)
    missing = missing_packages(machine)
    if as_json:
        problems = [asdict(problem) for problem in machine.problems]
        entries = [asdict(each) for each in missing]
        found = {"stack": machine.stack, "torch_cuda": machine.torch_cuda}
        print(json.dumps({**found, "missing": entries, "problems": problems}))
    else:
        print("\n".join(package_report(machine, missing)))


def machine_entry(machine: Machine) -> dict[str, Any]:
    """The machine as `probe --json` prints it; sizes in bytes."""
    return {
        "gpus": [_gpu_entry(gpu) for gpu in machine.gpus],
        "assumed": machine.assumed,
        "host": {name: getattr(machine, name) for name in _HOST},
        "stack": dict(machine.stack),
        "torch_cuda": machine.torch_cuda,
        "missing": [asdict(each) for each in missing_packages(machine)],
        "problems": [asdict(problem) for problem in machine.problems],
    }


def _gpu_entry(gpu: Gpu) -> dict[str, Any]:
    capability = gpu.compute_capability
    return asdict(gpu) | {
        "short_name": gpu.short_name,
        "architecture": gpu.architecture,
        "compute_capability": None if capability is None else "{}.{}".format(*capability),
        "flash_attention_4": None if capability is None else flash_4_on(capability),
    }


def machine_lines(machine: Machine) -> list[str]:
    """The machine in lines of at most 80 columns: verdict, cards, the rest, problems."""
    lines = [*_fold(str(ready_line(machine))), ""]
    # Planned cards are all alike.
    for gpu in machine.gpus[:1] if machine.assumed else machine.gpus:
        lines += _card(gpu)
    if machine.gpus:
        lines.append("")
    cpu = f"{machine.cpu_name}, {counted(machine.cpu_count, 'core')}"
    for line in (Line("✓", "cpu", cpu), *rest_lines(machine)):
        more = "see `windtunnel doctor`" if line.label == "missing" else line.detail
        lines += _row(line, ", ".join(filter(None, (line.text, more))), 8)
    for problem in machine.problems:
        lines += ["", *_problem(problem)]
    return lines


def package_report(machine: Machine, missing: tuple[Missing, ...]) -> list[str]:
    """What is installed and what to install, in lines of at most 80 columns; faults first."""
    lines = [str(packages_line(machine, missing)), ""]
    for line in package_lines(machine, missing):
        lines += _row(line, line.text, 18)
    faults = [problem for problem in machine.problems if problem.severity != "note"]
    for problem in faults:
        lines += ["", *_problem(problem)]
    for each in missing:
        lines += ["", *_fold(f"{', '.join(each.packages)}: {each.why}")]
        lines += command_lines(each.command)
    for problem in machine.problems:
        if problem not in faults:
            lines += ["", *_problem(problem)]
    return lines


def _card(gpu: Gpu) -> list[str]:
    lines = _fold(f"{gpu.index:>3}  {gpu.short_name}  {card_state(gpu)}")
    below = [card_text(gpu)]
    if not gpu.uuid.startswith("planned-"):
        below.append(gpu.uuid)
    lines += [f"     {part}" for text in below for part in _fold(text, _COLUMNS - 5)]
    for process in gpu.processes or ():
        memory, user, command = process_cells(process)
        lines.append(_fold(f"     used by {user}  {f'{memory}  ' if memory else ''}{command}")[0])
    return lines


def _row(line: Line, text: str, cells: int) -> list[str]:
    """A mark, a label in `cells` cells, and the text beside it, its further lines below."""
    first, *more = _fold(text, _COLUMNS - cells - 3)
    below = " " * (cells + 3)
    return [f"{line.mark} {line.label:<{cells}} {first}", *(f"{below}{part}" for part in more)]


def _problem(problem: Problem) -> list[str]:
    line = problem_line(problem)
    return _fold(str(line)) + command_lines(line.detail)


def command_lines(command: str) -> list[str]:
    """A command as a shell reads it from several lines of at most 80 columns."""
    lines = wrap(
        command,
        _COLUMNS - 2,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [*(f"{line} \\" for line in lines[:-1]), *lines[-1:]]


def _fold(text: str, columns: int = _COLUMNS) -> list[str]:
    return [line.rstrip() for line in fold(visible(text, one_line=True), columns)]


_HEADINGS = ("name", "size", "active", "context", "reads", "thinks", "licence")
_PLANNED_HEADINGS = ("name", "size", "verdict", "needs", "method", "length", "at once")
_NUMBERS = {"size", "active", "context", "needs", "length", "at once"}
_LEGEND = """
size: all parameters, computed from the shapes; active: those that one text
token uses. thinks: between [THINK] tokens; between <think> tags that are plain
text; or, by effort, between tokens and only when asked to.
All that is known of each, with sources: windtunnel models --json"""


def print_models(*, assumed: Assume = None, as_json: AsJson = False) -> int:
    """List the models of the catalog with their sizes, licences and contexts.

    With --assume: what each needs on that GPU.
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

"""`train --max-steps 0`: everything about a run that can be known before a weight is loaded.

No process is started: the config is read, the model planned and the rows are checked here, and a
config for more cards than this version uses is judged too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import UserError
from engine.hardware import assume
from engine.launch import require_torch
from engine.plan import best_device, estimate, remarks
from engine.plan.memory import cards_laid_out, cards_needed
from engine.plan.trainer import refuse_bf16
from engine.report.plan import plan_verdict
from engine.units import counted
from engine.visible import visible
from engine.wizard.counting import check_rows
from engine.wizard.request import find_machine, read_planned

if TYPE_CHECKING:
    from engine.data.statistics import Checkup

USUAL_CARD = "H100 80GB"
"""What cards are counted in where this computer has none."""


def try_dry(file: Path, changes: Sequence[str]) -> tuple[str, ...]:
    """What a run would be, in a sentence, and the lines that support it; nothing is started.

    Raises UserError where the config is wrong, the model is not known, or no row can be used.
    """
    config, architecture = read_planned(file, tuple(changes), sharded=True)
    found = check_rows(config, file.absolute().parent)
    if not found.usable:
        name = visible(file.name, one_line=True)
        raise UserError(
            f"No row of the datasets in {name} can be used.",
            f"{found.rows} were read, and each has a problem.",
            f"`windtunnel check {name}` lists them, with repairs.",
        )
    machine = find_machine(None)
    device = best_device(machine)
    require_torch(machine, device.uuid)
    refuse_bf16(config, device)
    laid_out = cards_laid_out(config)
    card = device if device.kind == "cuda" or laid_out == 1 else best_device(assume(USUAL_CARD))
    statistics = found.statistics()
    needs = estimate(config, architecture, card, statistics)
    sentence = (
        "Dry run, nothing was loaded: it would train"
        f" {needs.trainable_parameters:,} of {needs.total_parameters:,} parameters of"
        f" {visible(config.base_model, one_line=True)} on {found.usable:,} rows"
    )
    lines = (*(f"! {odd}" for odd in remarks(config, architecture)), *_row_lines(found))
    if laid_out == 1:
        return (f"{sentence}.", str(plan_verdict(needs, card)), *lines)
    fewest = cards_needed(config, architecture, card, statistics)
    meant = f"on {laid_out} GPUs" if laid_out else "on several GPUs"
    least = f"{fewest} of {card.name} are the fewest" if fewest else f"{card.name} is too small"
    return (f"{sentence}, {meant}; this version runs one.", f"{least}.", *lines)


def _row_lines(found: "Checkup") -> list[str]:
    from engine.report.data import learned_text

    usable = f"{found.usable:,} of {counted(found.rows, 'row')} can be used."
    if found.tokens is None:
        return [usable, "Their tokens were not counted: the model's tokenizer is not here yet."]
    return [usable, f"{learned_text(found.tokens.learned, found.tokens.total)}."]

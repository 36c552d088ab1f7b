"""`train --max-steps 0`: everything that a run would stumble over and that needs no weight to see.

The refusals are the trainer's own, asked of config.json, the tokenizer and the rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.catalog import Architecture
from engine.config import DatasetConfig, RunConfig, read_config
from engine.data.sources import held_out_sets
from engine.errors import DOES_NOT_FIT, UserError
from engine.hardware import assume
from engine.launch import require_torch
from engine.plan import Estimate, Place, best_device, estimate, remarks
from engine.plan.crew import crew_of
from engine.plan.layout import layout_of
from engine.plan.memory import cards_needed
from engine.plan.trainer import refuse_bf16, refuse_unread
from engine.report import Line
from engine.report.plan import plan_verdict
from engine.units import counted
from engine.visible import visible
from engine.wizard.draft import check_rows, open_if_here, require_usable
from engine.wizard.start import find_machine, read_planned

if TYPE_CHECKING:
    from engine.data.statistics import Checkup

USUAL_CARD = "H100 80GB"
"""What cards are counted in where this computer has none."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would be, line by line, and the exit status that `train` would begin with."""

    lines: tuple[str, ...]
    exit_status: int
    rows_left_out: dict[str, int] | None
    """By reason; None where the tokens were not counted."""


def try_dry(file: Path, changes: Sequence[str]) -> DryRun:
    """What a run would be; nothing is started.

    Raises UserError where the config is wrong, the model is not known or cannot be trained, no row
    would be learned, or its images would be read wrongly.
    """
    notes = read_config(file).override(changes).require_supported(sharded=True)
    config, architecture = read_planned(file, tuple(changes), sharded=True)
    found, *held_out = (
        _check_set(config, architecture, sets, file)
        for sets in (
            config.datasets,
            *((each,) for each in held_out_sets(config, file.absolute().parent)),
        )
    )
    machine = find_machine(None)
    device = best_device(machine)
    require_torch(machine, device.uuid)
    refuse_bf16(config, device)
    layout = layout_of(config)
    laid_out = layout.cards if layout else None
    card = device if device.kind == "cuda" or laid_out == 1 else best_device(assume(USUAL_CARD))
    place = Place(architecture, card, found.statistics())
    needs = estimate(config, place)
    lines = (
        *(str(Line("·", "", note.sentence())) for note in notes),
        *(f"! {odd}" for odd in remarks(config, architecture)),
        *_row_lines(found, config),
        *(line for each in held_out for line in _row_lines(each, config, "held out: ")),
    )
    left = asdict(found.left_out) if found.left_out else None
    sentence = _sentence(config, needs, found)
    if laid_out == 1:
        status = DOES_NOT_FIT if needs.verdict == "does not fit" else 0
        return DryRun((f"{sentence}.", str(plan_verdict(needs, card)), *lines), status, left)
    fewest = cards_needed(config, place)
    meant = f"on {laid_out} GPUs" if laid_out else "on all GPUs"
    least = f"{fewest} of {card.name} are the fewest" if fewest else f"{card.name} is too small"
    lines = (f"{sentence}, {meant}.", f"{least}.", *lines)
    try:
        crew_of(config, machine)
    except UserError as error:
        return DryRun((*lines, f"✗ {error}"), error.exit_status, left)
    return DryRun(lines, 0, left)


def _sentence(config: RunConfig, needs: Estimate, found: "Checkup") -> str:
    trained = found.left_out.rows - found.left_out.count if found.left_out else found.usable
    return (
        "Dry run, nothing was loaded: it would train"
        f" {needs.trainable_parameters:,} of {needs.total_parameters:,} parameters of"
        f" {visible(config.base_model, one_line=True)} on {counted(trained, 'row')}"
    )


def _check_set(
    config: RunConfig, architecture: Architecture, sets: Sequence[DatasetConfig], file: Path
) -> "Checkup":
    """One set of rows read as a run reads it, and refused where the run would refuse it."""
    from engine.data.rows import ImageRules, adapt_tokenizer

    folder = file.absolute().parent
    chosen = config.model_copy(update={"datasets": tuple(sets)})
    found = check_rows(chosen, folder)
    require_usable(found, file.name, "the datasets in ")
    _refuse_lengths(found, config)
    if found.images.count and (tokenizer := open_if_here(config, folder)):
        rules = ImageRules.from_config(config, folder)
        refuse_unread(architecture, adapt_tokenizer(tokenizer, rules).image)
    return found


def _refuse_lengths(found: "Checkup", config: RunConfig) -> None:
    """Raises UserError where nothing would be learned, or a row is too long for the config."""
    from engine.data.statistics import no_row_left, nothing_learned, rows_too_long

    tokens, left, odd = found.tokens, found.left_out, found.odd
    if tokens is None or left is None or odd is None:
        return
    longest, over = tokens.row_length.max, found.over_sequence_len or 0
    if over and config.excess_length_strategy == "raise":
        where = f"row {odd.longest[0]}"
        raise rows_too_long(over, found.usable, config.sequence_len, where, longest)
    if not tokens.learned:
        raise nothing_learned(found.usable, bool(odd.only_thinking_count))
    if left.count == left.rows:
        raise no_row_left(over, found.usable, config.sequence_len, longest)


def _row_lines(found: "Checkup", config: RunConfig, of: str = "") -> Iterator[str]:
    from engine.report.data import learned_text, left_out_line, note_lines

    yield f"{of}{found.usable:,} of {counted(found.rows, 'row')} can be used."
    if found.tokens is None:
        yield "Their tokens were not counted: the model's tokenizer is not here yet."
        return
    yield f"{of}{learned_text(found.tokens.learned, found.tokens.total)}."
    if line := left_out_line(found.left_out, config.sequence_len):
        yield f"{line.mark} {of}{line.text}."
    yield from (f"{note.mark} {of}{note.label}: {note.text}" for note in note_lines(found))

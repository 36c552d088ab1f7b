"""Makes presets/FITS.md: what is recommended for every card, model and goal, and whether it fits.

`python -m tests.make.fits` writes the page; a test makes it anew and compares, so that the page
never says what the product does not. Rows are not known there: each goal has its usual length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

from engine.catalog import list_models, read_architecture
from engine.errors import UserError
from engine.hardware import assume, listed_gpus
from engine.plan import Device, Goal, Place, Recommendation, best_device, recommend
from engine.plan.layers import recomputed_layers, widths
from engine.plan.layout import layout_of
from engine.plan.savers import in_use
from engine.report import VERDICT_MARKS
from engine.units import GIB

PAGE = Path(__file__).parents[2] / "presets" / "FITS.md"
SIZES = ("6 GB", "8 GB", "12 GB")
"""Cards smaller than those that are known by name."""
GOALS: tuple[Goal, ...] = get_args(Goal)
HEAD = """# What fits on which card

Made by `python -m tests.make.fits`, from the same functions as `windtunnel recommend`; nothing here
was measured. Each line is what is recommended for a card that nothing else uses, before the rows
are known: text has {text} tokens a sequence, tools {tools}, thinking {think}, images room for the
largest one. `windtunnel recommend --data` counts your rows and plans for them.

needs: GiB on the device, driver and allocator included; ±: how far a measured peak may lie from it.
Twice: layers that are computed a second time in the backward pass (gradient_checkpointing). In RAM:
what waits in this computer's memory (`states`, `embedding` and head, or so many `layers`), for the
same result in a longer time. Tokens a second follow from the card's data sheet. Several cards are
at the end.
"""
SEVERAL = ("RTX 4090 x2", "RTX 4090 x4", "H100 x2", "H100 x4", "H100 x8", "8 x 8 x H100")
MODELS = (
    *("ministral-3-3b", "ministral-3-8b", "ministral-3-14b", "magistral-small-2506"),
    *("mistral-small-4", "mistral-medium-3.5"),
)
"""One of each size."""
TOGETHER = """
# Several cards

Text, as above; each model as it is recommended, and with all of its weights trained. Cards: those
that hold one copy together, and how many copies learn side by side. needs: GiB on each card; tokens
a second are of all cards together, where they send to each other while they compute.
presets/SCALING.md has what they send.
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One card, model and goal."""

    card: str
    model: str
    goal: Goal
    device: Device
    advice: Recommendation


@cache
def cells() -> tuple[Cell, ...]:
    """Every cell of the table whose model can meet the goal."""
    return tuple(_cells())


def _cells() -> Iterator[Cell]:
    for name in (*SIZES, *(gpu.name for gpu in listed_gpus())):
        device = best_device(assume(name))
        for card in list_models():
            if card.offered and card.repositories:
                architecture = read_architecture(card.name)
                for goal in GOALS:
                    try:
                        advice = recommend(Place(architecture, device), goal=goal)
                    except UserError:
                        continue
                    yield Cell(device.name, card.name, goal, device, advice)


def together() -> Iterator[str]:
    """The lines of several cards."""
    for name in SEVERAL:
        device = best_device(assume(name))
        yield f"\n## {name}: can give {device.can_give_bytes / GIB:.1f} GiB each\n\n"
        columns = "method | cards | tokens at once | optimizer | needs | verdict | tokens/s"
        yield f"| model | {columns} |\n"
        yield "|---|---|---|---|---|---|---|---|\n"
        for model in MODELS:
            for fixed in ({}, {"adapter": None}):
                place = Place(read_architecture(model), device)
                yield _together(model, recommend(place, fixed=fixed))


def _together(model: str, advice: Recommendation) -> str:
    config, needs = advice.config, advice.estimate
    layout = layout_of(config)
    assert layout
    copies = f"{layout.shard} x {layout.replicate}" if layout.replicate > 1 else f"{layout.shard}"
    fits = needs.verdict != "does not fit"
    pace = advice.tokens_per_second if fits else None
    columns = (
        model,
        config.adapter or "full",
        copies,
        f"{config.sequence_len:,} x {config.micro_batch_size}",
        config.optimizer,
        f"{needs.device_bytes / GIB:.1f} ± {needs.uncertainty:.0%}",
        f"{VERDICT_MARKS[needs.verdict]} {needs.verdict}",
        f"{pace:,.0f}" if pace else "-",
    )
    return "| " + " | ".join(columns) + " |\n"


def line_of(cell: Cell) -> str:
    """One row of the table."""
    config, needs = cell.advice.config, cell.advice.estimate
    savers = sorted(in_use(config), key=lambda saver: (saver.slow, saver.keys))
    counts = [[f"{getattr(config, key) or 'all'} " for key in saver.keys[1:]] for saver in savers]
    waiting = ["".join(count) + saver.label for saver, count in zip(savers, counts, strict=True)]
    pace = cell.advice.tokens_per_second
    columns = (
        cell.model,
        cell.goal,
        config.adapter or "full",
        f"{config.sequence_len:,} x {config.micro_batch_size}",
        f"{config.lora_r}" if config.adapter else "-",
        config.optimizer,
        _twice(cell),
        ", ".join(waiting) or "-",
        f"{needs.device_bytes / GIB:.1f} ± {needs.uncertainty:.0%}",
        f"{VERDICT_MARKS[needs.verdict]} {needs.verdict}",
        f"{pace:,.0f}" if pace else "-",
    )
    return "| " + " | ".join(columns) + " |"


def _twice(cell: Cell) -> str:
    sizes = widths(read_architecture(cell.model).table)
    again = recomputed_layers(cell.advice.config, sizes)
    return "all" if again == sizes.layers else f"{again}" if again else "none"


def page() -> str:
    """The whole of presets/FITS.md."""
    from engine.plan.choice import USUAL_LENGTHS

    parts = [HEAD.format(**{goal: f"{USUAL_LENGTHS[goal]:,}" for goal in GOALS})]
    before = ""
    for cell in cells():
        if cell.card != before:
            before = cell.card
            parts.append(
                f"\n## {cell.card}: can give {cell.device.can_give_bytes / GIB:.1f} GiB\n\n"
                "| model | goal | method | tokens at once | rank | optimizer | twice |"
                " in RAM | needs | verdict | tokens/s |\n"
                "|---|---|---|---|---|---|---|---|---|---|---|\n"
            )
        parts.append(line_of(cell) + "\n")
    return "".join([*parts, TOGETHER, *together()])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)

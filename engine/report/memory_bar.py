"""The memory of a plan as one bar: what takes it, what is left, what is kept free.

Each part has its own glyph, so that the bar reads the same without colour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.plan import WEIGHTS, Device, Estimate
from engine.units import GIB

Role = Literal["weights", "trainable", "activations", "process", "spare", "over", "kept"]
_TRAINABLE = ("adapter", "gradients", "optimizer")


@dataclass(frozen=True, slots=True)
class Part:
    """One stretch of the bar, and its place in the legend."""

    glyph: str
    name: str
    size_bytes: int
    role: Role
    drawn_bytes: int
    """Of it on the bar: what lies beyond the device is drawn as over."""


def bar_parts(needs: Estimate, device: Device) -> list[Part]:
    """The stretches from left to right; the last is what the plan leaves to others.

    Where the plan does not fit, what is over stands in place of the spare.
    """
    room = needs.can_give_bytes

    def part(glyph: str, name: str, size: int, role: Role) -> Part:
        nonlocal room
        drawn = min(size, room)
        room -= drawn
        return Part(glyph, name, size, role, drawn)

    weights = sum(needs.parts.get(name, 0) for name in WEIGHTS)
    trainable = sum(needs.parts.get(name, 0) for name in _TRAINABLE)
    rest = needs.peak_allocated_bytes - weights - trainable
    parts = [
        part("█", "weights", weights, "weights"),
        part("▓", "adapter" if needs.targets else "training", trainable, "trainable"),
        part("▒", "activations", rest, "activations"),
        part(
            "░",
            "driver" if device.kind == "cuda" else "process",
            needs.device_bytes - needs.peak_allocated_bytes,
            "process",
        ),
    ]
    if needs.spare_bytes >= 0:
        parts.append(part("·", "spare", needs.spare_bytes, "spare"))
    else:
        over = -needs.spare_bytes
        parts.append(Part("!", "over by", over, "over", over))
    kept = max(0, device.total_bytes - needs.can_give_bytes)
    parts.append(Part("╱", "kept free", kept, "kept", kept))
    return parts


def share_cells(sizes: Sequence[int], cells: int) -> list[int]:
    """Cells for each size, in proportion, that add up to `cells`; the largest remainders win."""
    total = sum(sizes)
    if total <= 0:
        return [0] * len(sizes)
    exact = [size * cells / total for size in sizes]
    found = [int(each) for each in exact]
    order = sorted(range(len(sizes)), key=lambda at: found[at] - exact[at])
    for at in order[: cells - sum(found)]:
        found[at] += 1
    return found


def legend(parts: Sequence[Part], cells: int) -> list[tuple[Part, str]]:
    """Each part and the text behind its glyph, as many as fit `cells` cells, two blanks apart."""
    found: list[tuple[Part, str]] = []
    for part in parts:
        found.append((part, f" {part.name} {part.size_bytes / GIB:.1f}"))
    while found and sum(len(text) + 3 for _, text in found) - 2 > cells:
        found.pop()
    return found


def stretches(parts: Sequence[Part], cells: int) -> list[tuple[Part | None, str]]:
    """The bar in `cells` cells: each part's glyphs, and the mark where the device can give no more
    (its part is None)."""
    counts = share_cells([part.drawn_bytes for part in parts], cells - 1)
    limit = next((part for part in parts if part.role in ("over", "kept")), None)
    found: list[tuple[Part | None, str]] = []
    for part, count in zip(parts, counts, strict=True):
        if part is limit:
            found.append((None, "┃"))
        found.append((part, part.glyph * count))
    return found

"""The memory of a plan as one bar: what takes it, what is left, what is kept free.

Each part has its own glyph, so that the bar reads the same without colour.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from engine.plan import WEIGHTS, Device, Estimate
from engine.units import GIB

_ADAPTER = ("adapter", "gradients", "optimizer")


@dataclass(frozen=True, slots=True)
class Part:
    """One stretch of the bar, and its place in the legend."""

    glyph: str
    name: str
    size_bytes: int
    style: str
    drawn_bytes: int
    """Of it on the bar: what lies beyond the device is drawn as over."""


def bar_parts(needs: Estimate, device: Device) -> list[Part]:
    """The stretches from left to right; the last is what the plan leaves to others.

    Where the plan does not fit, what is over stands in place of the spare.
    """
    room = needs.can_give_bytes

    def part(glyph: str, name: str, size: int, style: str) -> Part:
        nonlocal room
        drawn = min(size, room)
        room -= drawn
        return Part(glyph, name, size, style, drawn)

    weights = sum(needs.parts.get(name, 0) for name in WEIGHTS)
    moving = sum(needs.parts.get(name, 0) for name in _ADAPTER)
    rest = needs.peak_allocated_bytes - weights - moving
    parts = [
        part("█", "weights", weights, "#ff8205"),
        part("▓", "adapter" if needs.targets else "training", moving, "#ffa02e"),
        part("▒", "activations", rest, "#ffc04f"),
        part(
            "░",
            "driver" if device.kind == "cuda" else "process",
            needs.device_bytes - needs.peak_allocated_bytes,
            "$muted",
        ),
    ]
    if needs.spare_bytes >= 0:
        parts.append(part("·", "spare", needs.spare_bytes, "$success"))
    else:
        over = -needs.spare_bytes
        parts.append(Part("!", "over by", over, "$error", over))
    kept = max(0, device.total_bytes - needs.can_give_bytes)
    parts.append(Part("╱", "kept free", kept, "$faint", kept))
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


class MemoryBar(Widget):
    """Two rows of bar and one of legend."""

    DEFAULT_CSS = "MemoryBar { height: 3; padding: 0 2; text-wrap: nowrap; }"

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[Part] = []

    def show_estimate(self, needs: Estimate, device: Device) -> None:
        """Another plan. A needed size beyond the device draws past the mark `┃`."""
        self._parts = bar_parts(needs, device)
        self.refresh()

    def render(self) -> RenderResult:
        width = max(1, self.size.width - 1)
        cells = share_cells([part.drawn_bytes for part in self._parts], width)
        # The mark stands where the device can give no more.
        limit = next((p for p in self._parts if p.name in ("over by", "kept free")), None)
        stretches = []
        for part, count in zip(self._parts, cells, strict=True):
            if part is limit:
                stretches.append(Content.styled("┃", "bold $foreground"))
            stretches.append(Content.styled(part.glyph * count, part.style))
        bar = Content("").join(stretches)
        return Content("\n").join([bar, bar, self._legend()])

    def _legend(self) -> Content:
        named = [
            Content.assemble((part.glyph, part.style), f" {part.name} {part.size_bytes / GIB:.1f}")
            for part in self._parts
        ]
        legend = Content("  ").join(named)
        while named and legend.cell_length > self.size.width:
            named.pop()
            legend = Content("  ").join(named)
        return legend

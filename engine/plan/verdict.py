"""What a run needs beside what its device can give, and the verdict on it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from engine.plan.device import Device, devices_document
from engine.plan.trainer import SMALLEST_CHUNK_BYTES
from engine.units import GIB

Verdict = Literal["fits", "tight", "does not fit"]

TIGHT_BYTES = GIB
"""A plan with less to spare is called tight."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run needs, and whether its device can give it. All sizes in bytes."""

    parts: Mapping[str, int]
    """By name, of what torch allocates at the fullest moment; they add up to it."""
    peak_allocated_bytes: int
    device_bytes: int
    """With the driver's context and the allocator's slack: what has to be free."""
    range_bytes: tuple[int, int]
    """Where the peak allocated is expected to lie."""
    can_give_bytes: int
    host_bytes: int
    disk_bytes: int
    trainable_parameters: int
    total_parameters: int
    targets: Mapping[str, int]
    """Modules that each entry of the adapter's targets matches."""
    tokens_at_once: int
    verdict: Verdict
    source: Literal["formula", "measured"] = "formula"
    moment: str = "backward pass"
    """Of the run, the fullest."""
    moments: Mapping[str, int] = field(default_factory=dict)
    """What is allocated at each moment that could be it."""
    decided_by: str = ""
    """The row whose length the peak follows from, as a sentence."""
    tokens_per_second: float | None = None
    """Measured; None where nothing was."""
    cards: int = 1
    """Over which the run is divided; the sizes are those of one."""
    loss_chunk_bytes: int = SMALLEST_CHUNK_BYTES
    """Float32 logits that the run's loss holds at once, where no kernel cuts them."""

    @property
    def spare_bytes(self) -> int:
        """What the device could give beyond; negative where it does not fit."""
        return self.can_give_bytes - self.device_bytes

    @property
    def uncertainty(self) -> float:
        """Half the width of the range, as a share of the peak."""
        return self.range_bytes[1] / max(1, self.peak_allocated_bytes) - 1


def judge(needed_bytes: int, can_give_bytes: int) -> Verdict:
    """Whether `needed_bytes` fit, with how little to spare they are called tight."""
    if needed_bytes > can_give_bytes:
        return "does not fit"
    return "tight" if can_give_bytes - needed_bytes < TIGHT_BYTES else "fits"


def lacks_cards(needs: Estimate, device: Device) -> bool:
    """Whether a run is divided over more cards than there are. Without a card ranks are processes,
    of which `crew_of` says how many are too many."""
    return device.kind == "cuda" and needs.cards > device.cards


def misses(needs: Estimate, device: Device) -> bool:
    """Whether a run cannot be started on its device: too much for a card, or too few cards."""
    return needs.verdict == "does not fit" or lacks_cards(needs, device)


def estimate_document(needs: Estimate) -> dict[str, Any]:
    """An estimate; sizes in bytes."""
    document = asdict(needs)
    return document | {"range_bytes": list(needs.range_bytes)}


def plan_document(
    needs: Estimate, device: Device, reasons: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The content of plan.json: what was predicted, for which cards, and why."""
    return {
        **devices_document(device, needs.cards),
        "estimate": estimate_document(needs),
        "reasons": dict(reasons or {}),
    }

"""Which attention code a run uses, and why: of the installed ones the fastest that fits the card.

Separate from `recommend` because the machine page names what is worth installing, whatever the
model. Facts: FlashAttention 2 runs on Ampere and newer, 3 on Hopper, 4 on Hopper and data-centre
Blackwell with heads up to 128 (on Hopper its backward pass exists only built from source); on
consumer Blackwell 4 has no upstream support.
"""

from dataclasses import dataclass

from engine.plan.device import Device

LARGEST_FLASH_4_HEAD = 128


@dataclass(frozen=True, slots=True)
class Attention:
    """The choice for one model on one device."""

    backend: str
    """A value of `attn_implementation`."""
    reason: str
    worth_installing: str | None = None
    """A package that would serve better here."""
    flash_4: str = ""
    """Whether FlashAttention 4 is eligible, in a sentence."""


def choose_attention(device: Device, head_dim: int | None) -> Attention:
    """The backend for packed text on `device`; `head_dim` None where heads differ in width."""
    if device.kind == "cpu":
        return Attention("sdpa", "the one that a CPU runs")
    installed = device.stack or {}
    flash_4 = flash_4_eligibility(device, head_dim)
    for backend, package, suits, reason in _candidates(device, head_dim):
        if suits and installed.get(package):
            return Attention(backend, reason, flash_4=flash_4)
    better = next(
        (package for _, package, suits, _ in _candidates(device, head_dim) if suits), None
    )
    reason = "PyTorch's own; packed rows then need a mask that grows with sequence_len squared"
    if better is None:
        reason = "FlashAttention needs Ampere or newer"
    return Attention("sdpa", reason, worth_installing=better, flash_4=flash_4)


def flash_4_eligibility(device: Device, head_dim: int | None) -> str:
    """Whether a training run on `device` could use FlashAttention 4, in one sentence."""
    major = (device.compute_capability or (0, 0))[0]
    if major not in (9, 10):
        return "FlashAttention 4 needs Hopper or data-centre Blackwell"
    if head_dim is None or head_dim > LARGEST_FLASH_4_HEAD:
        return f"FlashAttention 4 needs heads of one width up to {LARGEST_FLASH_4_HEAD}"
    if major == 9:
        return "FlashAttention 4 is eligible; on Hopper its backward pass must be built from source"
    return "FlashAttention 4 is eligible"


def _candidates(device: Device, head_dim: int | None) -> tuple[tuple[str, str, bool, str], ...]:
    """Backend, its package, whether it suits, and the reason; the best first."""
    capability = device.compute_capability or (0, 0)
    blackwell = capability[0] == 10 and (head_dim or 999) <= LARGEST_FLASH_4_HEAD
    return (
        ("flash_attention_4", "flash-attn-4", blackwell, "made for this Blackwell card"),
        ("flash_attention_3", "flash-attn-3", capability[0] == 9, "the fastest here: Hopper"),
        (
            "flash_attention_2",
            "flash-attn",
            capability >= (8, 0) and head_dim is not None,
            "packed rows are kept apart without a mask",
        ),
    )

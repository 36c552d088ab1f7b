"""The learning rate by method and size.

Separate because a recommendation and its alternatives, which change the method, both need it. Whole
weights take a tenth of what adapters take (Thinking Machines, "LoRA without regret"); from 70B on
both are halved (NeMo AutoModel's recipe for 128B).
"""

ADAPTER_RATE = 2e-4
LARGE_MODEL = 70 * 10**9


def learning_rate(total_parameters: int, *, whole: bool) -> tuple[float, str]:
    """The rate for a model of this size, and its reason."""
    large = total_parameters >= LARGE_MODEL
    rate = ADAPTER_RATE / (10 if whole else 1) / (2 if large else 1)
    reason = "a tenth of what adapters take: whole weights move" if whole else "usual for adapters"
    if large:
        reason += "; half of the usual: models above 70B need less"
    # 2e-4 / 10 is 1.9999999999999998e-05.
    return float(f"{rate:.2g}"), reason if whole or large else "usual for adapters, at any rank"

"""A model on a device: its verdict, its method and its size, in the words of every printer."""

from collections.abc import Mapping
from typing import Final

from engine.plan import WEIGHTS, Recommendation
from engine.report.line import VERDICT_MARKS, Line
from engine.units import GIB, gib

_METHODS: Final[Mapping[str | None, str]] = {
    "lora": "LoRA",
    "qlora": "QLoRA",
    None: "all weights",
}


def method(plan: Recommendation) -> str:
    """How the plan trains, as people call it."""
    return _METHODS[plan.config.adapter]


def size(parameters: int) -> str:
    """A number of parameters as people say it: 24.0B."""
    if parameters < 10**9:
        return f"{parameters / 10**6:.1f}M"
    return f"{parameters / 10**9:.1f}B"


def model_verdict(plan: Recommendation) -> Line:
    """Whether the model trains on the device: fits, tight, slow, 46.1 over, plan only.

    A model that is not trained yet is not called fitting, and one whose layers are in this
    computer's memory is, with a warning.
    """
    needs = plan.estimate
    given = f"{needs.device_bytes / GIB:.1f} of {gib(needs.can_give_bytes)}"
    mark, word, text = VERDICT_MARKS[needs.verdict], str(needs.verdict), f"needs {given}"
    if needs.verdict == "does not fit":
        word = f"{-needs.spare_bytes / GIB:.1f} over"
    elif plan.not_trained:
        mark, word, text = "·", "plan only", "can be planned and previewed, and is not trained yet"
    elif plan.config.layer_offloading and needs.verdict == "fits":
        mark, word, text = "!", "slow", f"fits with layers in RAM, slow: needs {given}"
    return Line(mark, word, text)


def weights_sentence(plan: Recommendation) -> str:
    """What the weights take, on the device and beside it."""
    needs = plan.estimate
    held = sum(needs.parts.get(name, 0) for name in WEIGHTS)
    shown = gib(held) if held >= GIB / 10 else f"{held / 2**20:.0f} MiB"
    kind = "In 4 bit" if plan.config.load_in_4bit else "Not quantized,"
    if plan.offloads:
        return (
            f"{kind} the weights on the device take {shown}; the others are read from"
            f" {gib(needs.host_bytes)} of this computer's memory"
        )
    return f"{kind} the weights take {shown}"

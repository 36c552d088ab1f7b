"""Will it fit: the memory of a run by part, before anything is loaded.

formula  the estimate: parts, peak, range, verdict; this computer's memory and disk
step     what decides them in one run, and what is trained in it
frozen   the model's own weights, on the device or in RAM
moments  what each moment of a run that can be its fullest holds
ranks    one card's share of a run on several
stack    how a trainer differs from ours with the same config
"""

from engine.plan.memory.formula import (
    Peer,
    cards_needed,
    compare_peer,
    estimate,
    moment_parts,
    on_device,
)
from engine.plan.memory.step import AXOLOTL, WEIGHTS, WINDTUNNEL, Stack, cards_laid_out, is_sharded

__all__ = [
    "AXOLOTL",
    "WEIGHTS",
    "WINDTUNNEL",
    "Peer",
    "Stack",
    "cards_laid_out",
    "cards_needed",
    "compare_peer",
    "estimate",
    "is_sharded",
    "moment_parts",
    "on_device",
]

"""Will it fit: the memory of a run by part, before anything is loaded.

formula  the estimate: parts, peak, range, verdict
frozen   the model's own weights, on the device or in RAM
trainable  adapter, gradients, optimizer
moments  what each moment of a run that can be its fullest holds
ranks    one card's share of a run on several
host     this computer's memory and disk
stack    how a trainer differs from ours with the same config
"""

from engine.plan.memory.formula import (
    Peer,
    compare_peer,
    estimate,
    frozen_of,
    kept_in_ram,
    moment_parts,
    on_device,
    packed_numbers,
    tokens_at_once,
)
from engine.plan.memory.frozen import NF4_BYTES, WEIGHTS
from engine.plan.memory.ranks import cards_of_a_copy
from engine.plan.memory.stack import AXOLOTL, WINDTUNNEL, Stack

__all__ = [
    "AXOLOTL",
    "NF4_BYTES",
    "WEIGHTS",
    "WINDTUNNEL",
    "Peer",
    "Stack",
    "cards_of_a_copy",
    "compare_peer",
    "estimate",
    "frozen_of",
    "kept_in_ram",
    "moment_parts",
    "on_device",
    "packed_numbers",
    "tokens_at_once",
]

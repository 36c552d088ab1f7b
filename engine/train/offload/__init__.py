"""What a run keeps in this computer's RAM, and how it comes to the device in time.

Nothing here changes a number, only where it lies while nobody reads it. On a CPU the same code
swaps between two places in the same RAM, so that everything but the streams is tested without a
GPU.

transfer     host memory, copies beside the computation, tensors whose memory comes and goes
layers       frozen weights of the decoder layers
activations  what activation checkpointing keeps of each layer
tables       the embedding and the head
placement    which weights of a model go where while it loads
"""

from engine.train.offload.activations import OffloadedActivations
from engine.train.offload.layers import LayerTurns
from engine.train.offload.placement import Placement, decoder_layers
from engine.train.offload.tables import head_at_hand, head_for_loss

__all__ = [
    "LayerTurns",
    "OffloadedActivations",
    "Placement",
    "decoder_layers",
    "head_at_hand",
    "head_for_loss",
]

"""The frozen weights of decoder layers, on the device in turns.

A layer comes at the latest when it computes; with it comes the next one, in the forward pass the
one behind it, in the backward pass the one before it. All others go first, so that never more than
two are there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from engine.train.experts import GroupedNF4
from engine.train.offload.transfer import CopyLane, Hosted, HostMemory


class LayerTurns:
    """The first layers of a model, as many as were given to `take`."""

    def __init__(self, device: torch.device, memory: HostMemory) -> None:
        self._lane, self._memory = CopyLane(device), memory
        self._layers: dict[int, list[Hosted]] = {}
        self._present: dict[int, torch.cuda.Event | None] = {}
        """Layers on the device, each with the end of its copy."""

    def take(self, layer: int, tensors: Sequence[Tensor]) -> None:
        """Move `tensors` of `layer`, frozen for good, to RAM."""
        moved = [Hosted(tensor, self._memory.copy(tensor)) for tensor in tensors]
        self._layers.setdefault(layer, []).extend(moved)

    def watch(self, layers: nn.ModuleList) -> None:
        """Let each layer that was taken come before its forward and its backward pass.

        Modules' hooks stay outside of what checkpointing repeats. The repetition comes behind the
        gradient of the layer's output, which calls for the layer, and so does every part of its
        backward pass.
        """
        for number in self._layers:
            layer = layers[number]
            layer.register_forward_pre_hook(lambda *_, number=number: self._go_forward(number))
            layer.register_forward_hook(
                lambda _module, _inputs, output, number=number: self._expect(output, number)
            )

    def _go_forward(self, layer: int) -> None:
        ahead = layer + 1
        if ahead not in self._layers:
            # A backward pass begins where the forward pass ends; the next token at the start.
            ahead = layer if torch.is_grad_enabled() else 0
        self._take_turns(layer, ahead)

    def _expect(self, output: Tensor, layer: int) -> None:
        if output.requires_grad:
            output.register_hook(lambda _gradient: self._take_turns(layer, max(0, layer - 1)))

    def _take_turns(self, layer: int, ahead: int) -> None:
        for other in self._present.keys() - {layer, ahead}:
            del self._present[other]
            for hosted in self._layers[other]:
                hosted.empty()
        self._bring(layer)
        self._lane.wait(self._present[layer])
        self._bring(ahead)

    def _bring(self, layer: int) -> None:
        if layer in self._present:
            return
        with self._lane.beside():
            for hosted in self._layers[layer]:
                hosted.fill()
        self._present[layer] = self._lane.mark()


def movable_tensors(module: nn.Module, name: str) -> list[Tensor]:
    """What can leave the device of a frozen weight `name` of `module`: its matrices in any form.

    Of quantized ones the weights and the scales of their blocks; vectors, and what has one number
    for thousands of weights, are not worth a copy.
    """
    held: Any = getattr(module, name)
    if isinstance(held, GroupedNF4):
        return [held.weight, held.scales]
    if isinstance(held, nn.Module):  # experts as they are
        return list(held.parameters())
    if isinstance(module, Linear4bit) and name == "weight":
        return [held.data, held.quant_state.absmax]
    if isinstance(module, Linear8bitLt) and name == "weight":
        return [held.data]
    return [held] if held.ndim > 1 else []

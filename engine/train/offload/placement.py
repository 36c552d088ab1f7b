"""Which weights of a model go where while it loads: to the device, or to stay in RAM.

What stays in RAM is decided before the first tensor is read, so that a model which only fits
without it never has to fit with it.
"""

import re

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.catalog import ModuleTable
from engine.config import RunConfig
from engine.plan.targets import VISION, trains_vision
from engine.train.offload.layers import LayerTurns, movable_tensors
from engine.train.offload.tables import offload_tables
from engine.train.offload.transfer import HostMemory

_HOST = torch.device("cpu")
_VISION = re.compile(rf"(^|\.)({'|'.join(VISION)})\.")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


class Placement:
    """Where the weights of one model go."""

    def __init__(
        self,
        model: PreTrainedModel,
        table: ModuleTable,
        config: RunConfig,
        device: torch.device,
        *,
        images: bool,
    ) -> None:
        """`model` may still be empty. `images` says whether the run has any."""
        self._model, self._device, self._memory = model, device, HostMemory(device)
        self.vision_offloaded = (
            not images
            and device.type != "cpu"
            and any(_VISION.search(row.name) for row in table.parameters)
            and not trains_vision(table, config)
        )
        """Whether the vision tower and the projector stay in RAM, as nothing will use them."""
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        named = model.named_modules(remove_duplicate=False)
        self._tables = {f"{name}.weight" for name, module in named if module in tables}
        self._offloads_tables = config.offload_embeddings
        self._turns: LayerTurns | None = None
        self._offloaded = 0
        if config.layer_offloading:
            self._turns = LayerTurns(device, self._memory)
            self._offloaded = min(config.offloaded_layers or 2**31, len(decoder_layers(model)))

    def device_of(self, name: str) -> torch.device:
        """Where the tensor `name` is to be once it is read."""
        unused = self.vision_offloaded and _VISION.search(name)
        looked_up = self._offloads_tables and name in self._tables
        return _HOST if unused or looked_up else self._device

    def settle(self, name: str) -> None:
        """Move the weight `name`, which its module has just been given, on to RAM if it goes there.

        At once: the next one may find no room beside it.
        """
        found = _LAYER.search(name)
        if self._turns is None or found is None or _VISION.search(name):
            return
        layer = int(found[1])
        if layer < self._offloaded:
            owner, _, own = name.rpartition(".")
            tensors = movable_tensors(self._model.get_submodule(owner), own)
            self._turns.take(layer, tensors)

    def finish(self) -> None:
        """Call for what stays in RAM from now on; all weights are in their places and tied."""
        if self._turns:
            self._turns.watch(decoder_layers(self._model))
        if self._offloads_tables:
            offload_tables(self._model, self._device, self._memory)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the language model."""
    layers = model.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)
    return layers

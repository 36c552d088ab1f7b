"""What activation checkpointing keeps of each decoder layer, in RAM until its backward pass.

transformers 5.23 has this as `activation_checkpointing_enable(offload=True)`, PyTorch's
`save_on_cpu` around each layer. Both of its copies run on the stream that computes, so the
device waits for each of them, and nothing is fetched ahead. Here they run on a stream of their own,
and while one layer's backward pass runs, the input of the next comes back.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from engine.train.offload.transfer import CopyLane


class _Input:
    """One layer's input in RAM, and on the device from when it is asked for."""

    def __init__(self, state: Tensor, lane: CopyLane, earlier: "_Input | None") -> None:
        self._device, self._lane = state.device, lane
        self._earlier = weakref.ref(earlier) if earlier else None
        self._host = torch.empty(state.shape, dtype=state.dtype, pin_memory=state.is_cuda)
        self._copy: tuple[Tensor, torch.cuda.Event | None] | None = None
        with lane.beside():
            self._host.copy_(state.detach(), non_blocking=True)
        lane.keep(state)

    def read(self) -> Tensor:
        """The input on the device; the one of the layer before it begins to follow."""
        state, mark = self._fetch()
        self._lane.wait(mark)
        self._copy = None
        if self._earlier and (earlier := self._earlier()):
            earlier._copy = earlier._fetch()
        return state

    def _fetch(self) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._copy:
            return self._copy
        with self._lane.beside():
            state = torch.empty_like(self._host, device=self._device)
            state.copy_(self._host, non_blocking=True)
        return state, self._lane.mark()


class OffloadedActivations:
    """Activation checkpointing whose kept states lie in RAM: the same numbers as without."""

    def __init__(self, device: torch.device) -> None:
        self._lane = CopyLane(device)
        self._newest: weakref.ref[_Input] | None = None

    def apply(self, layers: nn.ModuleList) -> None:
        """Take the place of the function with which transformers checkpoints `layers`."""
        for layer in layers:
            layer._gradient_checkpointing_func = self._checkpoint  # type: ignore[assignment]

    def _checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        # Inside, checkpointing's own hooks are the inner ones: these see its arguments alone.
        with saved_tensors_hooks(self._keep, _Input.read):
            return checkpoint(function, *args, use_reentrant=False)

    def _keep(self, state: Tensor) -> _Input:
        kept = _Input(state, self._lane, self._newest() if self._newest else None)
        self._newest = weakref.ref(kept)
        return kept

"""What a run keeps in this computer's RAM, and how it comes to the device in time.

Nothing here changes a number, only where it lies while nobody reads it. On a CPU the same code
swaps between two places in the same RAM, so that everything but the streams is tested without a
GPU. The order of events on a CUDA device is decided by `CopyLane` alone: a copy to the device
starts after everything that was computed before it was asked for, so that memory which that
computation read can be written again; and whoever reads a copy waits for it.
"""

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from engine.catalog import ModuleTable
from engine.config import RunConfig
from engine.plan.targets import VISION, trains_vision
from engine.train.experts import GroupedNF4

BLOCK_BYTES = 256 * 2**20
"""Least size of a block of pinned memory. A power of two, as all are: PyTorch rounds up to one."""
ALIGNMENT_BYTES = 256
"""Where tensors begin in a block: what every type and every copy engine is content with."""


class HostMemory:
    """Room in RAM for good, pinned where a CUDA device is to read it.

    PyTorch rounds each pinned allocation up to a power of two, a third more on average: so tensors
    are cut from blocks of such sizes one after another, and only the ends stay empty.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._blocks: list[Tensor] = []
        """What is left of each block, uint8."""

    def copy(self, tensor: Tensor) -> Tensor:
        """`tensor` in host memory, contiguous."""
        size = -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        place = next((k for k, left in enumerate(self._blocks) if len(left) >= size), None)
        if place is None:
            room = max(BLOCK_BYTES, 1 << (size - 1).bit_length())
            self._blocks.append(torch.empty(room, dtype=torch.uint8, pin_memory=self._pinned))
            place = len(self._blocks) - 1
        block = self._blocks[place]
        self._blocks[place] = block[size:]
        host = block[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        host.copy_(tensor.detach())
        return host


class CopyLane:
    """A CUDA stream for copies; on a CPU they happen at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is copied inside waits for all that was computed so far, and for nothing later.

        That makes memory allocated inside safe to free at any time without `record_stream`: it goes
        back to this stream, and its next use here comes behind every computation that read it.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """The end of what was copied so far."""
        return self._stream.record_event() if self._stream else None

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Let what is computed from here on wait for the copies before `mark`."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def keep(self, tensor: Tensor) -> None:
        """Let a tensor of the computation live until the copies so far are done with it."""
        if self._stream is not None:
            tensor.record_stream(self._stream)


class Hosted:
    """A tensor on the device whose numbers lie in RAM and whose memory there comes and goes.

    The tensor itself stays, with shape, type and device, and only its storage is emptied and filled
    again (as FSDP does it). So all that refers to it stays right: parameters, views, and what
    autograd or bitsandbytes noted in the forward pass for the backward pass. bitsandbytes keeps the
    packed weight outside of saved tensors, where checkpointing does not drop it: a copy handed out
    anew each time would stay on the device until the backward pass.
    """

    def __init__(self, tensor: Tensor, host: Tensor) -> None:
        """`tensor` is to have a storage of its own; it is empty afterwards."""
        if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
            raise ValueError("a tensor that shares its memory cannot leave it")
        self._tensor = tensor.data  # not `detach`: refilling is no change that autograd may count
        self.host = host
        self.empty()

    @property
    def present(self) -> bool:
        """Whether it has its memory."""
        return self._tensor.untyped_storage().nbytes() > 0

    def fill(self) -> None:
        """Give it memory, and its numbers as soon as the current stream gets to it."""
        self._tensor.untyped_storage().resize_(self._tensor.nbytes)
        self._tensor.copy_(self.host, non_blocking=True)

    def empty(self) -> None:
        """Take its memory away."""
        self._tensor.untyped_storage().resize_(0)


class LayerTurns:
    """The frozen weights of a model's first layers, as many as were given to `take`.

    A layer comes at the latest when it computes; with it comes the next one, in the forward pass
    the one behind it, in the backward pass the one before it. All others go first, so that never
    more than two are there.
    """

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


class LentHead(nn.Linear):
    """A head whose weight is on the device only where `head_at_hand` or `head_for_loss` says so."""

    def __init__(self, head: nn.Linear, device: torch.device, memory: HostMemory) -> None:
        """The same head with its numbers, which `head` has in RAM, for `device`."""
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        host = memory.copy(head.weight)
        shell = torch.empty_like(host, device=device, pin_memory=False)
        self.weight = nn.Parameter(shell, requires_grad=False)
        self.hosted = Hosted(shell, host)

    def forward(self, states: Tensor) -> Tensor:
        if not self.hosted.present:
            raise RuntimeError("the head is read where nothing has called for it")
        return super().forward(states)


def offload_tables(model: PreTrainedModel, device: torch.device, memory: HostMemory) -> None:
    """Let the embedding of `model`, which lies in RAM with the head, be read there from now on.

    A tied head gets a place on the device of its own, since the two are read in different places.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    lent = LentHead(head, device, memory)
    if head.weight is embedding.weight:
        embedding.weight = nn.Parameter(lent.hosted.host)
    embedding.weight.requires_grad_(False)
    model.set_output_embeddings(lent)
    embedding.register_forward_pre_hook(lambda _module, inputs: tuple(i.cpu() for i in inputs))
    embedding.register_forward_hook(lambda _module, _inputs, rows: rows.to(device))


@contextmanager
def head_at_hand(head: nn.Module) -> Iterator[None]:
    """`head` on the device while the context is open."""
    if not isinstance(head, LentHead) or head.hosted.present:
        yield
        return
    head.hosted.fill()
    try:
        yield
    finally:
        head.hosted.empty()


@contextmanager
def head_for_loss(head: nn.Module, states: Tensor) -> Iterator[None]:
    """`head` on the device until the loss's gradient has reached `states`, the head's input.

    By then the backward pass is at the first layer, which needs the room.
    """
    with head_at_hand(head):
        if isinstance(head, LentHead) and states.requires_grad:
            states.register_hook(lambda _gradient: head.hosted.empty())
        yield


_HOST = torch.device("cpu")
_VISION = re.compile(rf"(^|\.)({'|'.join(VISION)})\.")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


class Placement:
    """Where the weights of one model go while it loads: to the device, or to stay in RAM.

    Decided before the first tensor is read, so that a model which only fits without what stays in
    RAM never has to fit with it.
    """

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
        self._turns = LayerTurns(device, self._memory)
        layers = config.offloaded_layers or len(decoder_layers(model))
        self._offloaded = layers if config.layer_offloading else 0

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
        if found and int(found[1]) < self._offloaded and not _VISION.search(name):
            owner, _, own = name.rpartition(".")
            tensors = movable_tensors(self._model.get_submodule(owner), own)
            self._turns.take(int(found[1]), tensors)

    def finish(self) -> None:
        """Call for what stays in RAM from now on; all weights are in their places and tied."""
        self._turns.watch(decoder_layers(self._model))
        if self._offloads_tables:
            offload_tables(self._model, self._device, self._memory)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the language model."""
    layers = model.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)
    return layers


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
    """Activation checkpointing whose kept states lie in RAM: the same numbers as without.

    transformers 5.23 has this as `activation_checkpointing_enable(offload=True)`, PyTorch's
    `save_on_cpu` around each layer. Both of its copies run on the stream that computes, so the
    device waits for each of them, and nothing is fetched ahead. Here they run on a stream of their
    own, and while one layer's backward pass runs, the input of the next comes back.
    """

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

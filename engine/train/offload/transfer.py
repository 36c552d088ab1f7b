"""Host memory, copies that run beside the computation, and tensors whose memory comes and goes.

The order of events on a CUDA device is decided here alone: a copy to the device starts after
everything that was computed before it was asked for, so that memory which that computation read can
be written again; and whoever reads a copy waits for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

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

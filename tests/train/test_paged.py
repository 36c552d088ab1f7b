"""Unified memory of paged optimizers is given back before a run begins anew in its process.

bitsandbytes' own `get_paged` and page manager, over a stand-in for its C library and CUDA's runtime
that hands out and takes back real memory.
"""

import ctypes

import bitsandbytes.functional as bnb
import pytest
import torch

from engine.train import optim
from engine.train.optim import free_paged_state

LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p


class UnifiedMemory:
    """What bitsandbytes asks for memory, and what CUDA takes it back by."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.waited = False

    def cget_managed_ptr(self, size: ctypes.c_size_t) -> int:
        pointer = int(LIBC.malloc(size))
        self.held[pointer] = size.value
        return pointer

    def cudaFree(self, pointer: ctypes.c_void_p) -> int:
        assert self.waited, "a kernel may still write there"
        assert pointer.value is not None
        del self.held[pointer.value]  # KeyError for what was not handed out, or twice
        LIBC.free(pointer)
        return 0


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> UnifiedMemory:
    stand_in = UnifiedMemory()
    manager = bnb.GlobalPageManager.get_instance()
    monkeypatch.setattr(bnb, "lib", stand_in)
    monkeypatch.setattr(manager, "paged_tensors", [])
    monkeypatch.setattr(optim, "cuda_runtime", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(stand_in, "waited", True))
    return stand_in


def page(numbers: int) -> torch.Tensor:
    """As the optimizer's `get_state_buffer` makes it for a tensor on a card."""
    room: torch.Tensor = bnb.get_paged(numbers, dtype=torch.uint8, device=torch.device("cuda", 0))
    bnb.GlobalPageManager.get_instance().paged_tensors.append(room)
    return room


def test_what_nobody_holds_is_freed_once(memory: UnifiedMemory) -> None:
    state = {"state1": page(4096), "state2": page(8192)}
    state.clear()
    assert sum(memory.held.values()) == 4096 + 8192
    assert free_paged_state() == 4096 + 8192
    assert not memory.held
    assert free_paged_state() == 0


def test_what_lives_on_keeps_its_memory(memory: UnifiedMemory) -> None:
    alive = page(4096).detach()  # another tensor, of the same memory
    page(8192)
    assert free_paged_state() == 8192
    alive.fill_(7)
    assert list(memory.held.values()) == [4096]
    assert int(alive.sum()) == 7 * 4096


def test_a_run_without_them_asks_for_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.GlobalPageManager.get_instance(), "paged_tensors", [])
    monkeypatch.setattr(optim, "cuda_runtime", None)
    assert free_paged_state() == 0

"""A CUDA card made of this computer's CPU: the branches that only a card takes, run in CI.

Inside `card()` every tensor says that it is on `cuda:0` and computes on the CPU, torch.cuda answers
for a card of the given capability, and what only CUDA has is computed by a slow reference that
asserts the contract of the real thing. It shows no kernel's numbers, no asynchrony and no mixing of
devices: those need a card, and `make gpu` runs the same tests on one.
"""

import ctypes
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tests.fakes.kernels import KERNELS, check_grouped_product, matrix_product

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MEMORY_BYTES = 16 * 2**30
IS_CUDA: Any = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
DEVICE: Any = Tensor.device.__get__
UUID = "12345678-1234-1234-1234-123456789abc"


def on_cpu(value: Any) -> Any:
    """An argument as the CPU takes it."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class PretendCuda(TorchFunctionMode):
    """Sends to the CPU what is meant for the card, and lets the CPU's tensors say `cuda:0`."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.device:
            return function(*args, **kwargs)
        if function == IS_CUDA:
            return not args[0].is_meta
        if function == DEVICE:
            found = function(*args)
            return CUDA if found.type == "cpu" else found
        if function in (Tensor.pin_memory, Tensor.cuda):
            return args[0]
        kwargs.pop("pin_memory", None)
        if function is torch.mm and kwargs.get("out_dtype") is not None:
            return matrix_product(*args, **kwargs)
        if function is torch.nn.functional.grouped_mm:
            check_grouped_product(*args, **kwargs)
        if function is torch.histc:  # a CPU has none of integers
            return function(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        kwargs = {name: on_cpu(value) for name, value in kwargs.items()}
        return function(*map(on_cpu, args), **kwargs)


class Moment:
    """An event or a stream of a card on which everything has happened as soon as it is asked."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, _other: object) -> None: ...

    def wait_event(self, _event: object) -> None: ...

    def record_event(self, event: "Moment | None" = None) -> "Moment":
        return event or Moment()

    def record(self, _stream: object = None) -> None: ...

    def synchronize(self) -> None: ...


class ManagedMemory:
    """The entry points of bitsandbytes' CUDA library for memory that the driver pages."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.made: list[Any] = []

    def cget_managed_ptr(self, size: ctypes.c_size_t) -> int:
        assert isinstance(size, ctypes.c_size_t), "the library takes 64 bits"
        self.made.append(ctypes.create_string_buffer(size.value))
        return ctypes.addressof(self.made[-1])

    def cprefetch(self, address: Any, size: ctypes.c_size_t, device: ctypes.c_int32) -> None:
        assert address, "nothing to prefetch"
        assert isinstance(size, ctypes.c_size_t)
        assert device.value in (-1, 0)

    def cfill_fp32(self, left: Any, _right: Any, value: ctypes.c_float, count: Any) -> None:
        self._fill(left, value.value, count.value, ctypes.c_float)

    def cfill_uint8(self, left: Any, _right: Any, value: Any, count: Any) -> None:
        self._fill(left, int(value.value), count.value, ctypes.c_uint8)

    def _fill(self, address: Any, value: Any, count: int, kind: Any) -> None:
        (kind * count).from_address(address.value)[:] = [value] * count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


def _answers(capability: tuple[int, int]) -> dict[str, Callable[..., Any]]:
    """What torch.cuda says of one card."""
    major, minor = capability

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return major >= 8 or including_emulation  # so torch 2.13 has it

    def set_rng_state(state: Tensor, device: object = None) -> None:
        assert state.dtype == torch.uint8
        torch.set_rng_state(state)

    properties = SimpleNamespace(
        uuid=UUID, name="Stand-in", total_memory=MEMORY_BYTES, major=major, minor=minor,
        multi_processor_count=16, gcnArchName="", warp_size=32, L2_cache_size=2**20,
    )  # fmt: skip
    nothing = dict.fromkeys(("empty_cache", "synchronize", "reset_peak_memory_stats", "init"))
    figures = (
        *("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": is_bf16_supported,
        "mem_get_info": lambda *_: (MEMORY_BYTES // 2, MEMORY_BYTES),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": set_rng_state,
        "manual_seed_all": lambda *_: None,
        "current_stream": Moment,
        "stream": lambda *_: nullcontext(),
        "device": lambda *_: nullcontext(),
        "Stream": Moment,
        "Event": Moment,
        **{name: lambda *_, **__: None for name in nothing},
        **{name: lambda *_, **__: 2**30 for name in figures},
    }


@contextmanager
def card(capability: tuple[int, int] = (9, 0)) -> Iterator[ManagedMemory]:
    """Inside, this process has one card; bitsandbytes' paged memory is given."""
    import bitsandbytes.cextension
    import bitsandbytes.functional as bnb

    begin = torch.amp.autocast_mode.autocast.__init__
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    @functools.wraps(begin)
    def autocast(self: Any, device_type: str, *args: Any, **options: Any) -> None:
        begin(self, on_cpu(device_type), *args, **options)

    with ExitStack() as stack:
        for name, answer in _answers(capability).items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.amp.autocast_mode.autocast, "__init__", autocast))
        ask: dict[str, Any] = {
            "is_autocast_enabled": lambda *kind: enabled(*map(on_cpu, kind)),
            "get_autocast_dtype": lambda kind: dtype(on_cpu(kind)),
        }
        for name, answer in ask.items():
            stack.enter_context(patch.object(torch, name, answer))
        for place, kernel in KERNELS.items():
            stack.enter_context(patch(place, kernel))
        memory = ManagedMemory(bitsandbytes.cextension.lib)
        stack.enter_context(patch.object(bnb, "lib", memory))
        stack.enter_context(patch.object(Tensor, "record_stream", lambda *_: None))
        # Autograd leaves every mode, so what is computed again in it has to enter this one.
        again = {"context_fn": lambda: (nullcontext(), PretendCuda())}
        stack.enter_context(patch.dict(inspect.unwrap(checkpoint).__kwdefaults__, again))
        stack.enter_context(PretendCuda())
        yield memory


def enter(capability: tuple[int, int] = (9, 0)) -> None:
    """Give this process a card for good: what a trainer does before it begins."""
    _entered.enter_context(card(capability))


_entered = ExitStack()

"""One linear layer for all experts of a layer: rows sorted by expert, a matrix for each expert.

Here is how the matrices are held, and that no product and no backward pass has more than one NF4
expert in full precision.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from bitsandbytes.autograd._functions import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from engine.train.quantize import require_countable

NF4_BLOCK = 64
"""Weights that share one scale (QLoRA, arXiv 2305.14314)."""
NESTED_BLOCK = 256
"""Scales that share one scale of scales."""
STRIDE_BYTES = 16
"""torch's grouped product reads rows whose length is a multiple of this."""


class Groups:
    """Where each expert's rows end, for rows that are sorted by expert."""

    def __init__(self, sorted_experts: Tensor, num_experts: int) -> None:
        """`sorted_experts`: expert of each row, ascending, (rows,)."""
        every = torch.arange(num_experts, device=sorted_experts.device)
        self.ends = torch.searchsorted(sorted_experts, every, right=True, out_int32=True)
        """First row behind each expert's, int32 (experts,)."""
        self._sizes: list[int] | None = None

    def sizes(self) -> list[int]:
        """Rows of each expert. The first call waits for the device, later ones do not."""
        if self._sizes is None:
            ends = self.ends.tolist()
            self._sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return self._sizes


def grouped_linear(rows: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Each expert's rows (rows, inputs) times its matrix of (experts, outputs, inputs)."""
    rows = rows.to(weight.dtype)
    if _has_kernel(weight):
        return grouped_mm(rows, weight.transpose(-2, -1), offs=groups.ends)
    parts = rows.split(groups.sizes())
    return torch.cat([part @ weight[e].t() for e, part in enumerate(parts)])


def _has_kernel(weight: Tensor) -> bool:
    sides = (side * weight.element_size() for side in weight.shape[1:])
    if any(side % STRIDE_BYTES for side in sides):
        return False
    return not weight.is_cuda or torch.cuda.get_device_capability(weight.device) >= (8, 0)


class GroupedLinear(nn.Module, ABC):
    """A matrix (outputs, inputs) for each expert; made without memory, filled by `take`."""

    weight: Tensor
    """All matrices in the form in which they are held, (experts, ...)."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, dtype: torch.dtype
    ) -> None:
        """`dtype` is the type of the products, and of the matrices before they are quantized."""
        super().__init__()
        self.num_experts = num_experts
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype
        self.allocate(torch.device("meta"))

    @property
    def device(self) -> torch.device:
        """Where the matrices are; meta before `take`."""
        return self.weight.device

    def take(self, slices: Iterator[Tensor], device: torch.device) -> None:
        """Store the experts' matrices (outputs, inputs), given one by one in expert order.

        Raises ValueError where their number or shape is another.
        """
        self.allocate(device)
        count = 0
        with torch.no_grad():
            for count, matrix in enumerate(slices, start=1):
                if count > self.num_experts or matrix.shape != (
                    self.out_features,
                    self.in_features,
                ):
                    raise ValueError(f"matrix {count} of {self.num_experts}: {matrix.shape}")
                self.store(count - 1, matrix.to(device, self.dtype))
        if count != self.num_experts:
            raise ValueError(f"{count} matrices for {self.num_experts} experts")

    @abstractmethod
    def allocate(self, device: torch.device) -> None:
        """Make room for all matrices on `device`."""

    @abstractmethod
    def store(self, expert: int, matrix: Tensor) -> None:
        """Put one matrix, in `dtype` and on the device, into its place."""

    @abstractmethod
    def matrix(self, expert: int) -> Tensor:
        """One expert's matrix (outputs, inputs) in `dtype`."""

    @abstractmethod
    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """(rows, inputs), sorted by expert, to (rows, outputs)."""

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.out_features}, {self.in_features}), {self.dtype}"


class GroupedStack(GroupedLinear):
    """The matrices as one parameter (experts, outputs, inputs)."""

    def allocate(self, device: torch.device) -> None:
        shape = (self.num_experts, self.out_features, self.in_features)
        stack = torch.empty(shape, dtype=self.dtype, device=device)
        self.weight = nn.Parameter(stack, requires_grad=False)

    def store(self, expert: int, matrix: Tensor) -> None:
        self.weight[expert] = matrix

    def matrix(self, expert: int) -> Tensor:
        return self.weight[expert]

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        return grouped_linear(rows, self.weight, groups)


class GroupedNF4(GroupedLinear):
    """The matrices in NF4 with double quantization, each with its own statistics.

    0.516 byte a weight: the scales of the blocks stay 8-bit and are widened for one expert at a
    time. The tensors are this module's own, so bitsandbytes never repacks them for a CPU kernel
    that has no backward pass, as it does with its own linear layers.
    """

    scales: Tensor
    nested_scales: Tensor
    offset: Tensor

    def allocate(self, device: torch.device) -> None:
        weights = self.out_features * self.in_features
        blocks = -(-weights // NF4_BLOCK)
        self._hold("weight", (-(-weights // 2),), torch.uint8, device)
        self._hold("scales", (blocks,), torch.uint8, device)
        self._hold("nested_scales", (-(-blocks // NESTED_BLOCK),), torch.float32, device)
        self._hold("offset", (), torch.float32, device)
        for name in ("code", "nested_code"):  # the same for all: bitsandbytes' own tables
            self.register_buffer(name, torch.empty(0, device=device), persistent=False)

    def _hold(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        room = torch.empty((self.num_experts, *shape), dtype=dtype, device=device)
        self.register_buffer(name, room, persistent=False)

    def store(self, expert: int, matrix: Tensor) -> None:
        require_countable(matrix)
        packed, state = quantize_4bit(
            matrix.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.weight[expert] = packed.flatten()
        self.scales[expert] = state.absmax
        self.nested_scales[expert] = state.state2.absmax
        self.offset[expert] = state.offset
        self.code, self.nested_code = state.code, state.state2.code

    def state(self, expert: int) -> QuantState:
        """bitsandbytes' description of one expert: views of the tensors here."""
        nested = QuantState(
            absmax=self.nested_scales[expert],
            code=self.nested_code,
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        return QuantState(
            absmax=self.scales[expert],
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
            offset=self.offset[expert],
            state2=nested,
        )

    def matrix(self, expert: int) -> Tensor:
        full: Tensor = dequantize_4bit(self.weight[expert].unsqueeze(1), self.state(expert))
        return full

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        parts = rows.to(self.dtype).split(groups.sizes())
        # Autograd keeps the packed weights of these products and no dequantized one.
        products = [
            matmul_4bit(part, self.weight[e].unsqueeze(1).t(), quant_state=self.state(e))
            for e, part in enumerate(parts)
            if len(part)
        ]
        return torch.cat(products)

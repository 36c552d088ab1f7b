"""Mixture-of-experts layers that can be quantized and adapted: Mistral 4's.

transformers holds all experts of a layer in two fused tensors, which bitsandbytes leaves in 16 bits
and which PEFT adapts by forming every expert's whole update. Here they are linear layers over rows
sorted by expert, and no product and no backward pass has more than one NF4 expert in full
precision. A full fine-tune, and an adapter beside experts that stay as they are, keep transformers'
own layer, unless experts are spread over ranks (`expert_parallel_size`): then each token's row goes
to the rank that has its expert, and what becomes of it comes back. Autograd sends gradients the
same ways, so that an expert's is that of all tokens of its ranks.
"""

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from bitsandbytes.autograd._functions import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import grouped_mm
from transformers import PreTrainedModel
from transformers.models.mistral4.modeling_mistral4 import Mistral4Experts, Mistral4TopkRouter

from engine.config import RunConfig
from engine.train.device import pick_device
from engine.train.quantize import NESTED_BLOCK, NF4_BLOCK, require_countable

HELD = ("weight", "scales", "nested_scales", "offset")
"""Tensors of `GroupedNF4` with a part for each expert."""
STRIDE_BYTES = 16
"""torch's grouped product reads rows whose length is a multiple of this."""

_EMPTY = torch.device("meta")
"""Where a model is that has no memory yet."""


class Groups:
    """Where each expert's rows end, for rows that are sorted by expert."""

    def __init__(self, sorted_experts: Tensor, num_experts: int, first: int = 0) -> None:
        """`sorted_experts`: expert of each row, ascending, (rows,); they are counted from the
        `first` among all of the layer's."""
        self.own = slice(first, first + num_experts)
        """Which of the layer's experts these are."""
        every = torch.arange(num_experts, device=sorted_experts.device)
        self.ends = torch.searchsorted(sorted_experts, every, right=True, out_int32=True)
        """First row behind each expert's, int32 (experts,)."""

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each expert; the first reading waits for the device."""
        ends = self.ends.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def grouped_linear(rows: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Each expert's rows (rows, inputs) times its matrix of (experts, outputs, inputs)."""
    rows = rows.to(weight.dtype)
    if _has_kernel(weight):
        return grouped_mm(rows, weight.transpose(-2, -1), offs=groups.ends)
    parts = rows.split(groups.sizes)
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
        self.take_part(slices, device, self.num_experts)

    def take_part(self, slices: Iterator[Tensor], device: torch.device, experts: int) -> None:
        """Store those of so many `experts`, as many as this rank holds of the layer."""
        count, shape = 0, (self.out_features, self.in_features)
        with torch.no_grad():
            for count, matrix in enumerate(slices, start=1):
                if count > experts or matrix.shape != shape:
                    raise ValueError(f"matrix {count} of {experts}: {matrix.shape}")
                self.store(count - 1, matrix.to(device, self.dtype))
        if count != experts:
            raise ValueError(f"{count} matrices for {experts} experts")

    @abstractmethod
    def allocate(self, device: torch.device) -> None:
        """Make room for all matrices on `device`."""

    @abstractmethod
    def store(self, expert: int, matrix: Tensor) -> None:
        """Put one matrix, in `dtype` and on the device, into its place among this rank's."""

    @abstractmethod
    def matrix(self, expert: int) -> Tensor:
        """One expert's matrix (outputs, inputs) in `dtype`."""

    @abstractmethod
    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """(rows, inputs), sorted by expert, to (rows, outputs)."""


def _own(held: Tensor) -> Tensor:
    """This rank's experts of what is held, sharing its memory."""
    return held.to_local() if isinstance(held, DTensor) else held


class GroupedStack(GroupedLinear):
    """The matrices as one parameter (experts, outputs, inputs)."""

    def allocate(self, device: torch.device) -> None:
        shape = (self.num_experts, self.out_features, self.in_features)
        stack = torch.empty(shape, dtype=self.dtype, device=device)
        self.weight = nn.Parameter(stack, requires_grad=False)

    def store(self, expert: int, matrix: Tensor) -> None:
        _own(self.weight)[expert] = matrix

    def matrix(self, expert: int) -> Tensor:
        return self.weight[expert]

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        return grouped_linear(rows, _own(self.weight), groups)


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

    def hold_as_parameters(self) -> None:
        """Make frozen parameters of what the experts hold, which FSDP divides by expert."""
        for name in HELD:
            held = self.get_buffer(name)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(held, requires_grad=False))

    def store(self, expert: int, matrix: Tensor) -> None:
        require_countable(matrix)
        packed, state = quantize_4bit(
            matrix.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        parts = (packed.flatten(), state.absmax, state.state2.absmax, state.offset)
        for name, part in zip(HELD, parts, strict=True):
            _own(getattr(self, name))[expert] = part
        self.code, self.nested_code = state.code, state.state2.code

    def state(self, expert: int) -> QuantState:
        """bitsandbytes' description of one expert: views of the tensors here."""
        nested = QuantState(
            absmax=_own(self.nested_scales)[expert],
            code=self.nested_code,
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        return QuantState(
            absmax=_own(self.scales)[expert],
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
            offset=_own(self.offset)[expert],
            state2=nested,
        )

    def matrix(self, expert: int) -> Tensor:
        packed = _own(self.weight)[expert].unsqueeze(1)
        full: Tensor = dequantize_4bit(packed, self.state(expert))
        return full

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        parts, weight = rows.to(self.dtype).split(groups.sizes), _own(self.weight)
        # Autograd keeps the packed weights of these products and no dequantized one.
        products = [
            matmul_4bit(part, weight[e].unsqueeze(1).t(), quant_state=self.state(e))
            for e, part in enumerate(parts)
            if len(part) or not len(rows)
        ]
        return torch.cat(products)


class Experts(nn.Module):
    """Same numbers as transformers' Mistral4Experts, from grouped linear layers, or where there is
    no `form` from its own stacks."""

    gate_up_proj: Any
    down_proj: Any
    group: dist.ProcessGroup | None = None
    """Ranks that have equal parts of the experts, in their order; None where all are here."""

    def __init__(
        self, stock: Mistral4Experts, form: type[GroupedLinear] | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_experts = stock.num_experts
        hidden, width = stock.hidden_dim, stock.intermediate_dim
        if form is None:
            self.gate_up_proj, self.down_proj = stock.gate_up_proj, stock.down_proj
        else:
            self.gate_up_proj = form(self.num_experts, hidden, 2 * width, dtype)
            self.down_proj = form(self.num_experts, width, hidden, dtype)
        self.act_fn = stock.act_fn

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states (tokens, width) through each token's experts, (tokens, k), weighted.

        Summed token by token, in no order that depends on the device's scheduling.
        """
        tokens, chosen = top_k_index.shape
        sorted_experts, order = top_k_index.reshape(-1).sort(stable=True)
        groups, rows = Groups(sorted_experts, self.num_experts), hidden[order // chosen]
        rows = self._here(rows, groups) if self.group is None else self._there(rows, groups)
        rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        summed = rows[places].view(tokens, chosen, -1).sum(dim=1)
        return summed.type_as(hidden)

    def _here(self, rows: Tensor, groups: Groups) -> Tensor:
        """Rows of this rank's experts through them."""
        gate, up = _product(self.gate_up_proj, rows, groups).chunk(2, dim=-1)
        return _product(self.down_proj, self.act_fn(gate) * up, groups)

    def _there(self, rows: Tensor, groups: Groups) -> Tensor:
        """Rows through the experts of all ranks of the group, which call it together."""
        coming, sent, got = self._counts(groups)
        count, device = len(coming) // len(got), rows.device
        arrived: Tensor = _Exchange.apply(rows, sent, got, self.group)
        experts = torch.arange(count, device=device).repeat(len(got))
        experts = experts.repeat_interleave(coming, output_size=len(arrived))
        sorted_experts, order = experts.sort(stable=True)
        own = Groups(sorted_experts, count, count * dist.get_rank(self.group))
        made = self._here(arrived[order], own)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=device)
        back: Tensor = _Exchange.apply(made[places], got, sent, self.group)
        return back

    def _counts(self, groups: Groups) -> tuple[Tensor, list[int], list[int]]:
        """Rows that come from each rank for each expert here, (ranks x experts here,), and those
        that go to each rank and come from it."""
        sending = groups.ends.diff(prepend=groups.ends.new_zeros(1))
        coming = torch.empty_like(sending)
        dist.all_to_all_single(coming, sending, group=self.group)
        by_rank = torch.stack([sending, coming]).view(2, dist.get_world_size(self.group), -1).sum(2)
        sent, got = by_rank.tolist()  # waits for the device
        return coming, sent, got


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, so many `sent` to each, and `got` from each; gradients go back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.back = got, sent, group
        arrived = rows.new_empty(sum(got), rows.shape[1])
        dist.all_to_all_single(arrived, rows.contiguous(), got, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        found: Tensor = _Exchange.apply(outputs[0], *ctx.back)
        return found, None, None, None


def _product(part: nn.Module | Tensor, rows: Tensor, groups: Groups) -> Tensor:
    made: Tensor = (
        part(rows, groups)
        if isinstance(part, nn.Module)
        else grouped_linear(rows, _own(part), groups)
    )
    return made


def replace_experts(model: nn.Module, config: RunConfig, dtype: torch.dtype) -> int:
    """Put `Experts` where transformers' experts are; returns how many layers were changed.

    With `quantize_moe_experts` they are held in NF4. Otherwise they stay in `dtype`, also beside
    `load_in_4bit`, as in Axolotl, and only those that get an adapter or are spread over ranks
    are replaced. The new ones have no memory yet: each `GroupedLinear` is filled by its `take`.
    """
    form: type[GroupedLinear] | None = None
    if config.quantize_moe_experts:
        form = GroupedNF4
    elif config.adapter and config.lora_target_parameters:
        form = GroupedStack
    elif (config.expert_parallel_size or 1) == 1:
        return 0
    found = [name for name, module in model.named_modules() if isinstance(module, Mistral4Experts)]
    for name in found:
        stock = model.get_submodule(name)
        assert isinstance(stock, Mistral4Experts)
        model.set_submodule(name, Experts(stock, form, dtype))
    return len(found)


def expert_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the grouped linear layers."""
    return tuple(n for n, module in model.named_modules() if isinstance(module, GroupedLinear))


Routing: TypeAlias = tuple[Tensor, Tensor]
"""What one router decided: logits (tokens, experts) and each token's experts (tokens, k)."""
DEFAULT_WEIGHT = 0.001
"""`router_aux_loss_coef` where only `output_router_logits` is given: Mixtral's own."""


def balance_weight(config: RunConfig) -> float:
    """The weight of the balance in the loss, 0 where the config does not ask for it."""
    overrides = config.overrides_of_model_config or {}
    if not overrides.get("output_router_logits"):
        return 0.0
    weight = overrides.get("router_aux_loss_coef", DEFAULT_WEIGHT)
    assert isinstance(weight, int | float)
    return float(weight)


@contextmanager
def watch_routers(model: nn.Module, enabled: bool = True) -> Iterator[list[Routing]]:
    """A list that every router adds its decisions to while the context is open, if `enabled`."""
    seen: list[Routing] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits, _, chosen = output
        seen.append((logits, chosen))

    routers = [m for m in model.modules() if enabled and isinstance(m, Mistral4TopkRouter)]
    hooks = [router.register_forward_hook(keep) for router in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(routings: Sequence[Routing], real: Tensor) -> Tensor:
    """Experts times the sum, over experts, of their share of tokens and their mean probability.

    Equations 4 to 6 of Switch Transformer (arXiv 2101.03961), over all layers at once as
    transformers' load_balancing_loss_func has it: k where every expert is used alike. `real` says
    which tokens are no padding, bool, as many as the routers saw.
    """
    kept = real.reshape(-1, 1).float()
    rows = kept.sum() * len(routings)
    experts = routings[0][0].shape[1]
    used = kept.new_zeros(experts)
    probability = kept.new_zeros(experts)
    for logits, chosen in routings:
        used = used.scatter_add(0, chosen.reshape(-1), kept.expand_as(chosen).reshape(-1))
        probability = probability + (torch.softmax(logits, -1, torch.float32) * kept).sum(0)
    return experts * (used / rows * probability / rows).sum()


class LoraGrouped(nn.Module, LoraLayer):
    """A grouped linear layer with rank r for each expert, as PEFT calls its layers.

    `lora_A` is (r x experts, inputs) with the experts one after another, `lora_B` is (outputs,
    r x experts) with the experts innermost: the layout of PEFT's ParamWrapper.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    base_layer: GroupedLinear

    def __init__(
        self, base_layer: GroupedLinear, adapter_name: str, config: LoraConfig, **options: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, options["r"], options["lora_alpha"], config)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **_: Any
    ) -> None:
        """Add the matrices of one adapter, in float32; PEFT calls it."""
        base = self.base_layer
        ranks = r * base.num_experts
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = nn.Identity()
        device = pick_device() if base.device == _EMPTY else base.device
        on_device: dict[str, Any] = {"bias": False, "device": device, "dtype": torch.float32}
        self.lora_A[adapter_name] = nn.Linear(base.in_features, ranks, **on_device)
        self.lora_B[adapter_name] = nn.Linear(ranks, base.out_features, **on_device)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The adapter as A (experts, r, inputs) and B (experts, outputs, r)."""
        experts = self.base_layer.num_experts
        a = self.lora_A[adapter_name].get_parameter("weight")
        b = self.lora_B[adapter_name].get_parameter("weight")
        return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        result: Tensor = self.base_layer(rows, groups)
        acting = () if self.disable_adapters else self.active_adapters
        for name in (each for each in acting if each in self.lora_A):
            a, b = (factor[groups.own].to(result.dtype) for factor in self.factors(name))
            small = grouped_linear(rows, a, groups) * self.scaling[name]
            result = result + grouped_linear(small, b.contiguous(), groups)
        return result


def adapt(model: PreTrainedModel, settings: LoraConfig, experts: Sequence[str]) -> PeftModel:
    """`get_peft_model` that also adapts the grouped linear layers called `experts`.

    The settings that stay on the model, and are saved, are those with which stock PEFT puts the
    same adapter on transformers' own experts: `target_parameters`.
    """
    linears = settings.target_modules
    if experts:
        parameters = _shortest(experts, expert_modules(model))
        settings._register_custom_module({GroupedLinear: LoraGrouped})
        if isinstance(linears, str):
            settings.target_modules = "|".join([linears, *map(re.escape, experts)])
        else:
            settings.target_modules = [*(linears or ()), *experts]
    with warnings.catch_warnings(), _never_empty():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # of every layer of ours
        adapted = get_peft_model(model, settings)
    assert isinstance(adapted, PeftModel)
    if experts:
        stored: Any = adapted.peft_config["default"]
        stored.target_modules, stored.target_parameters = linears or [], parameters
    return adapted


@contextmanager
def _never_empty() -> Iterator[None]:
    """Inside, PEFT lets an adapter keep its values where its base layer has no memory yet; left to
    itself it moves the adapter there, in three places."""
    tuner, module = cast(Any, BaseTunerLayer), cast(Any, nn.Module)
    settle, move = tuner._move_adapter_to_device_of_base_layer, module.to

    def settled(layer: Any, name: str, device: torch.device | None = None) -> None:
        found, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
        settle(layer, name, pick_device() if found == _EMPTY else device)

    def moved(layer: nn.Module, *where: Any, **keys: Any) -> nn.Module:
        return layer if where == (_EMPTY,) else move(layer, *where, **keys)

    tuner._move_adapter_to_device_of_base_layer, module.to = settled, moved
    try:
        yield
    finally:
        tuner._move_adapter_to_device_of_base_layer, module.to = settle, move


def _shortest(experts: Sequence[str], every: Sequence[str]) -> list[str]:
    """Ends of names where the same layer of experts is adapted everywhere, else whole names."""
    found = []
    for end in sorted({".".join(name.rsplit(".", 3)[1:]) for name in experts}):
        meant = [name for name in every if name.endswith(f".{end}")]
        found += [end] if set(meant) <= set(experts) else [n for n in meant if n in experts]
    return found


def stock_names(model: nn.Module) -> dict[str, str]:
    """Names of the adapted expert layers here, and where stock PEFT keeps the same tensors.

    PEFT wraps the layer of experts once for each adapted parameter, in their order: the last one
    is outermost and each one before lies a `base_layer` deeper.
    """
    by_parent: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraGrouped):
            by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: parent + ".base_layer" * (len(names) - 1 - place)
        for parent, names in by_parent.items()
        for place, name in enumerate(names)
    }

"""One copy of a model divided over ranks, and gradients added up once an optimizer step.

FSDP2 (`fully_shard`) after the adapter is attached. Each decoder layer, the embedding, the last
norm, the vision tower, the projector and the head is a unit: whole on every rank only while it
computes. Each parameter belongs to exactly one unit and the root holds none, so that every rank
calls the same collectives in the same order, whatever its batch holds. Gradients are sums over
ranks and never means: the loss is already divided by the learned tokens of the whole step.

The optimizer sees plain tensors, each rank's own rows of each parameter: a state has the same form
and the same arithmetic as on one card.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from engine.config import RunConfig
from engine.errors import UserError
from engine.plan.trainer import BUCKET_NUMBERS, names_cut_loss
from engine.train.experts import HELD, Experts, GroupedLinear, GroupedNF4
from engine.train.forward import Model, head_module, unwrapped
from engine.train.offload import decoder_layers
from engine.train.quantize import FlatLinear8bit, statistics
from engine.train.ranks import EXPERT, REPLICATE, SHARD, Ranks

DEFERRED_SHARE = 0.3
"""Of the memory that is free once the model is loaded; activations need the most of it."""
_VISION = re.compile(r"\.(vision_tower|multi_modal_projector)\.")
_LOCAL: Any = WeakIdKeyDictionary()
"""Plain parameters by the sharded ones whose memory they share."""


def shard(model: Model, config: RunConfig, ranks: Ranks) -> Model:
    """Divide `model` over the ranks of its copy, in place, and return it; a lone rank's is whole.

    Afterwards a parameter is a DTensor, this rank's rows of it are its `to_local()`, and it is
    whole only inside its unit's forward and backward pass. Where a copy is one rank's alone nothing
    is divided: `add_up` makes its gradients those of all ranks. Raises UserError for what cannot be
    divided.
    """
    if ranks.is_alone or ranks.shards == 1:
        return model
    _refuse(config)
    assert ranks.mesh is not None
    for module in model.modules():
        if isinstance(module, GroupedNF4):
            module.hold_as_parameters()
        elif isinstance(module, FlatLinear8bit):
            module.hold_apart()
    mesh = ranks.mesh if ranks.replicas > 1 else ranks.mesh[SHARD]
    # Gradients of bfloat16 weights are added up in float32, as many as there are ranks.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    inner: Any = unwrapped(model)
    body = inner.model
    own = spread_experts(model, ranks, policy)
    for unit in (*units(model), body):
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=own)
    if hasattr(body, "vision_tower"):
        register_fsdp_forward_method(body, "get_image_features")
    head = head_module(model)
    assert isinstance(body, FSDPModule)
    assert isinstance(head, FSDPModule)
    if not names_cut_loss(config):  # a kernel that reads the head in its backward pass
        # An embedding's gradient takes no weights, and the head's is formed in the forward pass.
        for table in (inner.get_input_embeddings(), head):
            table.set_unshard_in_backward(False)
    if whole := [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]:
        raise AssertionError(f"{whole[0]} and {len(whole) - 1} others are in no unit")
    for unit in (each for each in model.modules() if isinstance(each, FSDPModule)):
        unit.set_gradient_divide_factor(1.0)  # of this unit alone, whatever is inside
        # gloo has no product with a factor, and with 1 the sum is the same.
        unit.set_force_sum_reduction_for_comms(True)
    return model


def spread_experts(model: Model, ranks: Ranks, policy: MixedPrecisionPolicy) -> set[nn.Parameter]:
    """Give each part of a copy's ranks experts of its own, which the others never gather.

    A stack stays divided by its rows. Ranks of one part gather that part as a unit of its own;
    where a rank is alone in it its experts are simply there, and returned: FSDP would copy them.
    """
    mesh, alone = ranks.expert_mesh, set[nn.Parameter]()
    if mesh is None:
        return alone
    gathers = ranks.shards > ranks.experts
    for layer in [module for module in model.modules() if isinstance(module, Experts)]:
        layer.group = mesh.get_group(EXPERT)
        stacks = [part for part in layer.modules() if isinstance(part, GroupedLinear)]
        owners: list[nn.Module] = [*stacks] or [layer]
        for owner in owners:
            for name, whole in list(owner.named_parameters(recurse=False)):
                part = whole.detach().chunk(ranks.experts)[mesh.get_local_rank(EXPERT)]
                held = DTensor.from_local(part.clone(), mesh[EXPERT], [Shard(0)], run_check=False)
                parameter = nn.Parameter(held, requires_grad=whole.requires_grad)
                owner.register_parameter(name, parameter)
                alone.add(parameter)
        if gathers:
            within = mesh[REPLICATE, SHARD] if ranks.replicas > 1 else mesh[SHARD]
            fully_shard(owners, mesh=within, mp_policy=policy)
    return set() if gathers else alone


def units(model: Model) -> list[nn.Module | list[nn.Module]]:
    """What is gathered together: each layer, the embedding (with the head where the two are tied),
    the rest of the language model, the vision tower and the projector, the head."""
    inner = unwrapped(model)
    body, text = inner.model, inner.get_decoder()
    found: list[nn.Module | list[nn.Module]] = list(decoder_layers(inner))
    embedding, head = inner.get_input_embeddings(), head_module(model)
    found += [[embedding, head]] if _tied(model) else [embedding, head]
    found += [part for name, part in text.named_children() if name == "norm"]
    if text is not body:
        # The tower's parts together, not itself: transformers knows by its class what to record.
        found.append([part for part in body.vision_tower.children() if _has_parameters(part)])
        found.append(body.multi_modal_projector)
    return found


def _tied(model: Model) -> bool:
    inner: Any = unwrapped(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    return any(a is b for a in embedding.parameters() for b in head.parameters())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _refuse(config: RunConfig) -> None:
    """Raises UserError for what keeps weights in RAM, or moves them behind FSDP's back."""
    for key in ("offload_embeddings", "layer_offloading"):
        if getattr(config, key):
            raise UserError(
                f"{key} cannot be used by several GPUs that hold one copy together.",
                "A sharded layer is whole on a GPU only while it computes: what the key saves on "
                "one GPU is saved by sharding.",
                f"Remove {key}; a larger dp_shard_size saves more.",
            )


def sync_gradients(model: Model, last: bool) -> None:
    """Say whether the backward pass that follows is the `last` of its optimizer step, in which
    gradients are added up over ranks; before it each rank keeps its own."""
    for root in {id(m): m for m in (unwrapped(model).model, head_module(model))}.values():
        if isinstance(root, FSDPModule):
            root.set_requires_gradient_sync(last)
            root.set_is_last_backward(last)
    for name, unit in model.named_modules():
        seeing = _VISION.search(f".{name}.") and isinstance(unit, FSDPModule)
        if seeing and not _was_whole(unit):
            unit.set_requires_gradient_sync(True)


def _was_whole(unit: FSDPModule) -> bool:
    """Whether a unit has ever computed. One that has not, a tower where no row has an image, has no
    gradient to keep, and torch 2.13 fails where it looks for one."""
    groups = unit._get_fsdp_state()._fsdp_param_groups
    return all(hasattr(each, "_unsharded_param") for group in groups for each in group.fsdp_params)


def can_defer(model: Model, ranks: Ranks) -> bool:
    """Whether gradients are added up once an optimizer step, not after each micro-batch.

    Until then each rank of a sharded model keeps the whole of them, in float32: an adapter's are
    small, a full fine-tune's may take `DEFERRED_SHARE` of what its card has free. Where text
    reaches nothing that is trained, the last pass of a step may be none.
    """
    if ranks.shards == 1:
        return True
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    reached = any(not _VISION.search(name) for name, _ in trained)
    fits = True
    if ranks.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(ranks.device)
        numbers = sum(p.numel() // (ranks.experts if is_spread(p) else 1) for _, p in trained)
        fits = 4 * numbers < DEFERRED_SHARE * free
    return not ranks.max(torch.tensor([not (fits and reached)]).int()).any()


def is_spread(tensor: Tensor) -> bool:
    """Whether a sharded tensor is a stack of experts that are spread over ranks."""
    names = tensor.device_mesh.mesh_dim_names if isinstance(tensor, DTensor) else None
    return EXPERT in (names or ())


def add_up(model: Model, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Give `parameters`, as the optimizer sees them, the gradients of all ranks.

    FSDP has added up those of a sharded model, but of experts that it does not gather. Those of
    replicas are added up here, in float32, in as few collectives as `BUCKET_NUMBERS` allows: a
    parameter that got none here and one elsewhere takes part with zeros; one that got none anywhere
    keeps none.
    """
    if ranks.is_alone:
        return
    if ranks.shards > 1:
        for p in model.parameters():
            if p.grad is not None:
                local_parameter(p).grad, p.grad = local_part(p.grad), None
        if ranks.shards == ranks.experts and ranks.replicas > 1:
            spread = [p for p in model.parameters() if p.requires_grad and is_spread(p)]
            _add_up([local_parameter(p) for p in spread], ranks.sum_of_copies)
        return
    _add_up(parameters, ranks.sum)


def _add_up(parameters: Sequence[nn.Parameter], total: Callable[[Tensor], Tensor]) -> None:
    if not parameters:
        return
    device = parameters[0].device
    reached = total(torch.tensor([p.grad is not None for p in parameters]).float().to(device))
    moved = [p for p, count in zip(parameters, reached.tolist(), strict=True) if count]
    for bucket in _buckets(moved):
        sizes = [p.numel() for p in bucket]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        for p, part in zip(bucket, flat.split(sizes), strict=True):
            if p.grad is not None:
                part.copy_(p.grad.reshape(-1))
        for p, part in zip(bucket, total(flat).split(sizes), strict=True):
            p.grad = part.view_as(p).to(p.dtype)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    numbers = 0
    for parameter in parameters:
        if bucket and numbers + parameter.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket, numbers = [], 0
        bucket.append(parameter)
        numbers += parameter.numel()
    if bucket:
        yield bucket


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; of another one the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter as the optimizer sees it, always the same one: itself, or where it is sharded a
    plain one that shares the memory of this rank's rows."""
    if not isinstance(parameter, DTensor):
        return parameter
    if parameter not in _LOCAL:
        _LOCAL[parameter] = nn.Parameter(local_part(parameter.detach()))
    found: nn.Parameter = _LOCAL[parameter]
    return found


def local_parameters(named: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Each parameter as the optimizer sees it."""
    return [(name, local_parameter(p)) for name, p in named]


def write_back(optimizer: Optimizer, model: Model) -> None:
    """Let what `optimizer` makes of a sharded model's bfloat16 weights get to where FSDP gathers
    them from: it gives its parameters other memory."""
    homes = {
        local_parameter(p): local_part(p.detach())
        for p in model.parameters()
        if p.requires_grad and isinstance(p, DTensor)
    }

    def put(optimizer: Optimizer, *_: object) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            home = homes[parameter]
            if parameter.data_ptr() != home.data_ptr():
                parameter.data = home.copy_(parameter.data)

    if homes:
        optimizer.register_step_post_hook(put)


@contextmanager
def same_in_replicas(ranks: Ranks, seed: int) -> Iterator[None]:
    """Inside, ranks that hold the same rows draw the same random numbers, for this `seed`: what is
    rounded at random stays one model."""
    if ranks.replicas == 1:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed * ranks.shards + ranks.shard)
        yield


def local_bytes(model: Model) -> dict[str, int]:
    """Bytes that this rank holds of the model, by part: what is sharded by its share.

    `layers`, `embeddings`, `head`, `vision` and `norm`; `adapter` is what is trained beside a
    frozen base; `statistics` is what quantized weights hold beside their parameters, and `buffers`
    the rest, both whole on every rank.
    """
    found = Counter[str]()
    of_head = {id(p) for p in head_module(model).parameters()}
    of_embedding = {id(p) for p in unwrapped(model).get_input_embeddings().parameters()}
    adapted = unwrapped(model) is not model
    for name, parameter in model.named_parameters():
        if adapted and parameter.requires_grad:
            part = "adapter"
        elif id(parameter) in of_embedding:
            part = "embeddings"
        elif id(parameter) in of_head:
            part = "head"
        elif _VISION.search(name):
            part = "vision"
        else:
            part = "layers" if ".layers." in name else "norm"
        found[part] += local_part(parameter.detach()).nbytes
    for module in model.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            found["statistics"] += sum(each.nbytes for each in statistics(module))
    for name, buffer in model.named_buffers():
        owner, _, own = name.rpartition(".")
        of_experts = own in HELD and isinstance(model.get_submodule(owner), GroupedNF4)
        found["layers" if of_experts else "buffers"] += buffer.nbytes
    return dict(found)

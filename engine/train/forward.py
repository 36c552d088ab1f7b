"""One forward pass: from a batch to hidden states, in the one way that keeps packed rows apart.

This is where a model that was loaded right can be used wrongly: a mask or a cache mixes packed rows
without a word.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from engine.train.batches import pad, tower_groups
from engine.train.offload import OffloadedActivations, decoder_layers

Model: TypeAlias = PreTrainedModel | PeftModel
"""A model as it trains: bare, or with an adapter around it."""
T = TypeVar("T")


def unwrapped(model: Model) -> PreTrainedModel:
    """transformers' model below PEFT's wrapper, its adapter still acting."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def head_module(model: Model) -> nn.Module:
    """The head itself, whose weight is not always on the device: see `offload.LentHead`."""
    head: nn.Module = unwrapped(model).get_output_embeddings()
    return head


def head_of(model: Model) -> Tensor:
    """The head's weight, (vocabulary, width); the embedding's own where the two are tied."""
    weight: Tensor = head_module(model).get_parameter("weight")
    return weight


def is_unit(module: nn.Module) -> bool:
    """Whether `shard` has made a unit of the module: its weights are whole only inside its forward
    and backward pass."""
    return isinstance(module, FSDPModule)


def use_head(model: Model, states: Tensor, use: Callable[[Tensor, Tensor], T]) -> T:
    """`use(states, the head's weight)`, inside the head's own forward pass where it is sharded."""
    head: Any = head_module(model)
    if not is_unit(head):
        return use(states, head_of(model))
    head.forward = lambda inputs: use(inputs, head_of(model))
    try:
        found: T = head(states)
    finally:
        del head.forward
    return found


def put_head_away(model: Model) -> None:
    """Divide a sharded head again. One that is the embedding's too stays whole for the backward
    pass after it was used, and without one for good: its parameters would pass for unsharded."""
    head = head_module(model)
    if isinstance(head, FSDPModule):
        head.reshard()


def hidden_states(model: Model, batch: dict[str, Tensor], tower_calls: int = 0) -> Tensor:
    """Last hidden states, (batch, length, width).

    The vision tower of a sharded model is called `tower_calls` times, as on every other rank.
    Never with an attention mask and never with a cache: transformers separates packed rows by
    `position_ids` only when both are absent, and otherwise mixes them silently.
    """
    body: Any = unwrapped(model).model
    with half_precision(model):
        features = image_features(model, batch)
        with _taking_part(model, batch, tower_calls):
            states: Tensor = body(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                use_cache=False,
                **features,
            ).last_hidden_state
    return states


def image_features(model: Model, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a vision model's forward pass takes for the images of a batch; nothing without images.

    The tower sees a few images at a time. It lays all that it is given side by side under one mask
    of (patches, patches): 18 GiB for eight images of 1540 x 1540, of which only the blocks on the
    diagonal count.
    """
    if "pixels" not in batch:
        return {}
    body: Any = unwrapped(model).model
    kind = body.vision_tower.patch_conv.weight.dtype
    sizes = batch["image_sizes"].tolist()
    left = batch["pixels"]
    side = body.vision_tower.patch_size * body.config.spatial_merge_size
    features: Any = []  # one tensor an image, where transformers declares one for all
    for start, end in tower_groups(sizes, body.vision_tower.patch_size):
        group = sizes[start:end]
        numbers = sum(3 * height * width for height, width in group)
        pixels, left = pad(left[:numbers], group, kind), left[numbers:]
        if group == [[side, side]]:
            # transformers squeezes an only token away with the batch: a second image keeps it.
            group, pixels = group * 2, pixels.expand(2, -1, -1, -1)
        found = body.get_image_features(pixel_values=pixels, image_sizes=group, return_dict=True)
        features += found.pooler_output[: end - start]
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}


@contextmanager
def _taking_part(model: Model, batch: Mapping[str, Tensor], tower_calls: int) -> Iterator[None]:
    """The vision tower sees the smallest image as often as this rank's images call it less than
    `tower_calls`, and a zero that reaches it is added to the embeddings inside.

    A rank that skipped a call would leave the others waiting for its part of the weights, and one
    whose text alone reached the first layer would add up its gradients in another order.
    """
    body: Any = unwrapped(model).model
    if not tower_calls or not is_unit(body):
        yield
        return
    sizes = batch["image_sizes"].tolist() if "pixels" in batch else []
    own = len(list(tower_groups(sizes, body.vision_tower.patch_size))) if sizes else 0
    side = body.vision_tower.patch_size * body.config.spatial_merge_size
    device = batch["input_ids"].device
    blank = {
        "pixels": torch.ones(3 * side * side, device=device),
        "image_sizes": torch.tensor([[side, side]]),
    }
    nothing = torch.zeros((), device=device)
    for _ in range(tower_calls - own):
        seen = image_features(model, blank)["mm_encoder_outputs"]["image"].pooler_output
        nothing = nothing + 0.0 * seen[0].float().sum()
    embedding = unwrapped(model).get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _m, _i, rows: rows + nothing.to(rows.dtype))
    try:
        yield
    finally:
        hook.remove()


def half_precision(model: Model) -> AbstractContextManager[object]:
    """bfloat16 products for a bfloat16 base, whose adapter is kept in float32.

    Without it PEFT widens every adapted layer's input to float32 and keeps it: one layer's share of
    the backward pass takes 1.6 times the memory (`tests.research.layer_memory`), and the adapter's
    products run at float32 speed.
    """
    head = head_of(model)
    return torch.autocast(
        head.device.type, dtype=torch.bfloat16, enabled=head.dtype == torch.bfloat16
    )


@contextmanager
def frozen_inputs(model: PreTrainedModel) -> Iterator[None]:
    """Inside, what `model`'s embeddings and its patch convolution give out is not made to require
    gradients, as transformers and PEFT do for the reentrant kind of checkpointing.

    Ours needs none, and a frozen vision tower would be gone back through for nothing: twice its
    work more in a step with images, and its masks, of (patches, patches), kept meanwhile.
    """
    held: Any = model
    held.enable_input_require_grads = lambda: None
    try:
        yield
    finally:
        del held.enable_input_require_grads


def checkpoint_activations(
    model: PreTrainedModel, first: int | None = None, *, offload_from: torch.device | None = None
) -> None:
    """Keep one state a layer and recompute the rest in the backward pass.

    Of the language model only the `first` layers, if given: what the last ones keep is freed before
    any layer is computed again, so that it adds nothing to the room that a recomputation takes.
    With `offload_from`, the device that trains, these states wait in RAM for their layer's turn.
    """
    kind = {"use_reentrant": False}
    with frozen_inputs(model):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kind)
    layers = decoder_layers(model)
    for layer in layers[len(layers) if first is None else first :]:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    if offload_from:
        OffloadedActivations(offload_from).apply(layers)

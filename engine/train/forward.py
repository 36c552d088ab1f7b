"""One forward pass: from a batch to hidden states, in the one way that keeps packed rows apart.

Apart from `model` because loading is where a checkpoint can be wrong, and this is where a right one
can be used wrongly: a mask or a cache mixes packed rows without a word.
"""

from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

Model: TypeAlias = PreTrainedModel | PeftModel
"""A model as it trains: bare, or with an adapter around it."""


def unwrapped(model: Model) -> PreTrainedModel:
    """transformers' model below PEFT's wrapper, its adapter still acting."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def head_of(model: Model) -> Tensor:
    """The head's weight, (vocabulary, width); the embedding's own where the two are tied."""
    weight: Tensor = unwrapped(model).get_output_embeddings().weight
    return weight


def hidden_states(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Last hidden states, (batch, length, width).

    Never with an attention mask and never with a cache: transformers separates packed rows by
    `position_ids` only when both are absent, and otherwise mixes them silently.
    """
    body: Any = unwrapped(model).model
    with half_precision(model):
        states: Tensor = body(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
    return states


def half_precision(model: Model) -> AbstractContextManager[object]:
    """bfloat16 products for a bfloat16 base, whose adapter is kept in float32.

    Without it PEFT widens every adapted layer's input to float32 and keeps it: one layer's share of
    the backward pass takes 1.6 times the memory (`tests.make.layer_memory`), and the adapter's
    products run at float32 speed.
    """
    head = head_of(model)
    return torch.autocast(
        head.device.type, dtype=torch.bfloat16, enabled=head.dtype == torch.bfloat16
    )


def use_checkpointing(model: PreTrainedModel) -> None:
    """Keep one state a layer and recompute the rest in the backward pass."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

"""A tiny model on an attention backend, and a batch of packed rows."""

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.train.attention import use_attention
from tests.support.tiny import VOCABULARY

CUT = "flash_attention_torch"
SIZES = ([13, 20, 7], [25, 15])


def positions(sizes: tuple[list[int], ...] = SIZES) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in sizes])


@cache
def tokens() -> Tensor:
    return torch.randint(20, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))


def tiny(architecture: dict[str, Any], backend: str, **keys: Any) -> Any:
    model_class = getattr(transformers, architecture["architectures"][0])
    config = model_class.config_class.from_dict(architecture | keys)
    use_attention(config, backend)
    torch.manual_seed(0)
    return model_class(config).train()


def states(model: Any, ids: Tensor, where: Tensor) -> Tensor:
    found = model.model(input_ids=ids, position_ids=where, use_cache=False).last_hidden_state
    assert isinstance(found, Tensor)
    return found

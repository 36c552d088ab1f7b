"""Text from a prompt, token by token, with the tuned model or with its base.

It is the one place where a key-value cache exists: a cache turns off the separation of packed rows,
so it stays out of every training and scoring path.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

from engine.chat.tokenizer import ChatTokenizer
from engine.train.evaluate import evaluating
from engine.train.forward import Model, half_precision, image_features, unwrapped


def generate(
    model: Model,
    device: torch.device,
    prompt: Sequence[int],
    *,
    images: Mapping[str, torch.Tensor] = MappingProxyType({}),
    end: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    on_token: Callable[[int], None] = lambda token: None,
) -> list[int]:
    """Token ids that follow `prompt`, up to and with `end`; greedy at temperature 0.

    `images` are those of the prompt, in the order of its image tokens, as `images.stack` makes
    them. `on_token` gets each token as soon as it is chosen.
    """
    inner: Any = unwrapped(model)
    current = torch.tensor([list(prompt)], device=device)
    cache, out = None, []
    with evaluating(model), half_precision(model):
        seen = image_features(model, {k: v.to(device) for k, v in images.items()})
        for _ in range(max_new_tokens):
            result = inner(
                input_ids=current, past_key_values=cache, use_cache=True, logits_to_keep=1, **seen
            )
            seen = {}  # from here on the cache holds them
            cache = result.past_key_values
            token = _choose(result.logits[0, -1].float(), temperature, top_p)
            out.append(token)
            on_token(token)
            if token == end:
                break
            current = torch.tensor([[token]], device=device)
    return out


def _choose(logits: torch.Tensor, temperature: float, top_p: float) -> int:
    if temperature <= 0.0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1)])


def readable(tokens: Sequence[int], tokenizer: ChatTokenizer) -> str:
    """Generated tokens as text, control tokens by their names, the end of the answer left out."""
    kept = [token for token in tokens if token != tokenizer.specials.eos]
    tekken = tokenizer.tekken
    return tekken.decode(kept, special_token_policy=SpecialTokenPolicy.KEEP)

"""A smaller model of the same make, for a computer that could not build the real one in minutes.

It decides what a measurement stands for: two of the layers, and, where even those are too much, all
widths divided by one number. The formula is then asked for exactly this model, so that what is
compared is the formula, not the card.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from engine.catalog import Architecture
from engine.catalog.rows import module_table
from engine.catalog.sizes import Mistral3Sizes, Mistral4Sizes, TextSizes, read_sizes
from engine.config import RunConfig
from engine.plan import Device, Statistics, estimate

LAYERS = 2
"""Enough for a kept state to lie between two layers, and for the last one to be freed first."""
PRODUCTS = 1e11
"""Tokens times weights of one forward pass. Three steps of Ministral 3 3B, Small 4 and Medium 3.5
in 4 bits, 2,048 tokens at once, took 35, 44 and 78 seconds on one core."""
NUMBERS = 10**9
"""Weights that are drawn and quantized in less than a minute."""
FACTORS = (1, 2, 4, 8, 16, 32)
BLOCK = 64
"""bitsandbytes' NF4 takes whole blocks of so many numbers on a CPU."""


@dataclass(frozen=True, slots=True)
class Built:
    """The model that is measured."""

    architecture: Architecture
    layers: int
    of_layers: int
    factor: int = 1
    """What all widths are divided by."""
    whole: bool = True
    """Whether it is the model itself."""

    def sentence(self) -> str:
        """What was left out, and what the measurement therefore stands for."""
        widths = f" with all widths divided by {self.factor}" if self.factor > 1 else ""
        return (
            f"Built on the CPU with {self.layers} of {self.of_layers} layers{widths}: this checks "
            "the formula for that small model, and says nothing of a card's memory or speed."
        )


def as_it_is(architecture: Architecture) -> Built:
    """The model itself."""
    *_, text = read_sizes(architecture.config, architecture.name)
    layers = text.num_hidden_layers
    return Built(architecture, layers, layers)


def reduce_for_cpu(
    architecture: Architecture,
    config: RunConfig,
    device: Device,
    statistics: Statistics | None,
) -> Built:
    """The largest model of the same make that is built and trained here in about a minute.

    The model itself where it is so small. Raises UserError where the adapter's targets name only
    layers that are left out.
    """

    def affordable(model: Architecture) -> bool:
        needs = estimate(config, model, device, statistics)
        products = needs.tokens_at_once * model.table.active_parameters
        quick = products <= PRODUCTS and model.table.total_parameters <= NUMBERS
        return needs.verdict != "does not fit" and quick

    built = as_it_is(architecture)
    if affordable(architecture):
        return built
    layers = min(LAYERS, built.of_layers)
    for factor in FACTORS:
        content = shrink(architecture.config, layers, factor)
        smaller = replace(architecture, config=content, table=module_table(content))
        if affordable(smaller):
            break
    return Built(smaller, layers, built.of_layers, factor, whole=False)


def shrink(config: Mapping[str, Any], layers: int, factor: int) -> dict[str, Any]:
    """The content of a config.json with fewer layers, and with widths divided by `factor`.

    Heads become fewer and keep their width; a width stays a multiple of 64; vocabulary and experts
    keep their number.
    """
    content = deepcopy(dict(config))
    _, sizes, text = read_sizes(config, "config.json")
    part = content["text_config"] if isinstance(sizes, Mistral3Sizes) else content
    for key, value in list(part.items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            part[key] = value[:layers]  # one entry a layer
    part |= {"num_hidden_layers": layers} | dict(_text_widths(text, factor))
    if isinstance(text, Mistral4Sizes):
        part["first_k_dense_replace"] = min(text.first_k_dense_replace, layers - 1)
    if isinstance(sizes, Mistral3Sizes):
        vision = sizes.vision_config
        # A tower's head is what its width leaves to each.
        heads = content["vision_config"].get("num_attention_heads", 16)
        fewer = max(1, heads // factor)
        content["vision_config"] |= {
            "num_hidden_layers": min(layers, vision.num_hidden_layers),
            "num_attention_heads": fewer,
            "hidden_size": vision.hidden_size // heads * fewer,
            "intermediate_size": _part(vision.intermediate_size, factor),
        }
        content["vision_feature_layer"] = -1
    return content


def _text_widths(text: TextSizes, factor: int) -> Iterator[tuple[str, int]]:
    yield "hidden_size", _part(text.hidden_size, factor)
    yield "intermediate_size", _part(text.intermediate_size, factor)
    heads = max(1, text.num_attention_heads // factor)
    if isinstance(text, Mistral4Sizes):
        yield "num_attention_heads", heads
        yield "num_key_value_heads", heads
        yield "moe_intermediate_size", _part(text.moe_intermediate_size, factor)
        yield "kv_lora_rank", _part(text.kv_lora_rank, factor)
        if text.q_lora_rank is not None:
            yield "q_lora_rank", _part(text.q_lora_rank, factor)
        return
    of_keys = max(1, text.num_key_value_heads // factor)
    yield "num_key_value_heads", of_keys
    yield "num_attention_heads", -(-heads // of_keys) * of_keys
    yield "head_dim", text.head_dim or text.hidden_size // text.num_attention_heads


def _part(width: int, factor: int) -> int:
    return width if factor == 1 else max(BLOCK, -(-width // factor // BLOCK) * BLOCK)

"""The numbers of a config.json that decide shapes, checked, with transformers' own defaults.

A config.json is a stranger's file: an architecture that is not on the allow-list, a size of -1 or a
billion layers ends here in a sentence. A test holds every default against the config class of
transformers.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from engine.errors import UserError
from engine.visible import visible

ARCHITECTURES = {
    "MistralForCausalLM": "mistral",
    "Ministral3ForCausalLM": "ministral3",
    "Mistral4ForCausalLM": "mistral4",
    "Mistral3ForConditionalGeneration": "mistral3",
}
"""Allowed transformers class -> the `model_type` that belongs to it."""

# Far above any model (Medium 3.5 has 88 layers and a width of 28,672), and low enough that a
# hostile file cannot make the table of rows fill the memory.
Size = Annotated[int, Field(strict=True, gt=0, le=2**24)]
Depth = Annotated[int, Field(strict=True, gt=0, le=1024)]


class _Sizes(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


SizesT = TypeVar("SizesT", bound=_Sizes)


class _LanguageSizes(_Sizes):
    """What all language models have."""

    vocab_size: Size = 131072
    hidden_size: Size = 4096
    intermediate_size: Size = 14336
    num_hidden_layers: Depth = 34
    num_attention_heads: Size = 32
    tie_word_embeddings: StrictBool = False


class Ministral3Sizes(_LanguageSizes):
    """`ministral3`."""

    num_key_value_heads: Size = 8
    head_dim: Size | None = 128


class MistralSizes(Ministral3Sizes):
    """`mistral`: the same shapes, other defaults."""

    vocab_size: Size = 32000
    num_hidden_layers: Depth = 32
    head_dim: Size | None = None


class Mistral4Sizes(_LanguageSizes):
    """`mistral4`: latent attention and a mixture of experts."""

    intermediate_size: Size = 12288
    num_hidden_layers: Depth = 36
    moe_intermediate_size: Size = 2048
    n_routed_experts: Size = 128
    n_shared_experts: Size = 1
    num_experts_per_tok: Size = 4
    first_k_dense_replace: Annotated[int, Field(strict=True, ge=0)] = 0
    q_lora_rank: Size | None = 1024
    kv_lora_rank: Size = 256
    qk_nope_head_dim: Size = 64
    qk_rope_head_dim: Size = 64
    v_head_dim: Size = 128
    attention_bias: StrictBool = False


TextSizes: TypeAlias = Ministral3Sizes | Mistral4Sizes


class PixtralSizes(_Sizes):
    """`pixtral`, the vision tower; a head is always `hidden_size / num_attention_heads` wide."""

    hidden_size: Size = 1024
    intermediate_size: Size = 4096
    num_hidden_layers: Depth = 24
    num_channels: Size = 3
    patch_size: Size = 16


class Mistral3Sizes(_Sizes):
    """`mistral3`: a text model, a vision tower and the projector between them."""

    text_config: TextSizes
    vision_config: PixtralSizes
    spatial_merge_size: Annotated[int, Field(strict=True, gt=0, le=64)] = 2
    vision_feature_layer: (
        StrictInt | Annotated[list[StrictInt], Field(min_length=1, max_length=1024)]
    ) = -1
    multimodal_projector_bias: StrictBool = False
    tie_word_embeddings: StrictBool = True


_TEXT_SIZES: dict[str, type[Ministral3Sizes] | type[Mistral4Sizes]] = {
    "mistral": MistralSizes,
    "ministral3": Ministral3Sizes,
    "mistral4": Mistral4Sizes,
}


def read_sizes(
    config: Mapping[str, Any], where: str
) -> tuple[str, TextSizes | Mistral3Sizes, TextSizes]:
    """The class that builds the model, its checked sizes, and those of its language model.

    Raises UserError where the model may not or cannot be built.
    """
    class_name = _class_name(config, where)
    expected = ARCHITECTURES[class_name]
    _check_type(config, expected, (expected,), where)
    if expected in _TEXT_SIZES:
        text = _validate(_TEXT_SIZES[expected], config, where, ())
        return class_name, text, text
    part = _part(config, "text_config", where)
    part_type = _check_type(part, "mistral", tuple(_TEXT_SIZES), f"text_config in {where}")
    text = _validate(_TEXT_SIZES[part_type], part, where, ("text_config",))
    part = _part(config, "vision_config", where)
    _check_type(part, "pixtral", ("pixtral",), f"vision_config in {where}")
    vision = _validate(PixtralSizes, part, where, ("vision_config",))
    parts = {"text_config": text, "vision_config": vision}
    return class_name, _validate(Mistral3Sizes, {**config, **parts}, where, ()), text


def _part(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    part = config.get(key)
    if not isinstance(part, Mapping):
        raise UserError(
            f"{where} has no {key}.",
            "A model that reads images has a language model and a vision tower, and each has to be "
            "described.",
            "Use the config.json that came with the weights.",
        )
    return part


def _class_name(config: Mapping[str, Any], where: str) -> str:
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    allowed = ", ".join(ARCHITECTURES)
    if first is None:
        raise UserError(
            f"{where} names no architecture.",
            "The list `architectures` decides which class builds the model, and it is not there.",
            f"Use the config.json that came with the weights; trained here are: {allowed}.",
        )
    if not isinstance(first, str) or first not in ARCHITECTURES:
        raise UserError(
            f"{where} names {_shown(first)}, which is not a model that can be trained here.",
            f"Only these are known, and no other code is run: {allowed}.",
            "Pick a model that `windtunnel models` lists, or a folder of one of its fine-tunes.",
        )
    return first


def _check_type(
    config: Mapping[str, Any], default: str, allowed: tuple[str, ...], where: str
) -> str:
    found = config.get("model_type", default)
    if not isinstance(found, str) or found not in allowed:
        raise UserError(
            f"The model_type {_shown(found)} of {where} cannot be trained here.",
            f"With this architecture it has to be {' or '.join(allowed)}.",
            "Use the config.json that came with the weights.",
        )
    return found


def _validate(
    model: type[SizesT], config: Mapping[str, Any], where: str, prefix: tuple[str, ...]
) -> SizesT:
    try:
        return model.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in (*prefix, first["loc"][0]))
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(
            f"{where} describes a model that cannot be built.",
            f"`{key}` is {_shown(first['input'])}: {message}.",
            "Use the config.json that came with the weights.",
        ) from None


def _shown(value: object) -> str:
    """`value` in a sentence: a list or an object only by its kind, since it can be of any depth."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = visible(json.dumps(value, ensure_ascii=False, default=str), one_line=True)
    return text if len(text) <= 60 else text[:57] + "..."

"""Which parameters each architecture is made of, in the order of transformers' modules.

The only place that knows the names below a layer and the keys that decide their shapes: it changes
with transformers. A config.json is a stranger's file: an architecture that is not on the
allow-list, a size of -1 or a billion layers ends here in a sentence. A test holds every default
against the config class of transformers.
"""

import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from engine.catalog.modules import Group, ModuleTable, Parameter
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


# Names by which transformers 5.23 looks up a function; a test holds these against its tables.
ACTIVATIONS = frozenset(
    {
        *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python"),
        *("gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear"),
        *("mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu"),
        *("sqrtsoftplus", "swish", "tanh", "xielu"),
    }
)
ROPE_TYPES = frozenset(
    {"default", "dynamic", "linear", "llama3", "longrope", "proportional", "yarn"}
)
VISION_ROPE_TYPES = frozenset({"default", "axial"})


def _one_of(known: frozenset[str]) -> AfterValidator:
    def check(word: str) -> str:
        if word not in known:
            raise PydanticCustomError("unknown", "none that transformers knows")
        return word

    return AfterValidator(check)


Activation = Annotated[str, _one_of(ACTIVATIONS)]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]
RopeType = Annotated[str, _one_of(ROPE_TYPES)]


def _refuse_huge(value: object) -> object:
    """Words for numbers pass: they are reported as contradictions."""
    if isinstance(value, int | float) and not abs(value) <= _LARGEST:
        raise PydanticCustomError("huge", "a number of no model")
    return value


# Above every base of RoPE; 10^400 is no float.
_LARGEST = 1e12
Number = Annotated[object, AfterValidator(_refuse_huge)]


class _TextRope(_Sizes):
    rope_type: RopeType | None = None
    type: RopeType | None = None
    rope_theta: Number | None = None
    factor: Number | None = None
    attention_factor: Number | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    beta_fast: Number | None = None
    beta_slow: Number | None = None
    llama_4_scaling_beta: Number | None = None
    partial_rotary_factor: Number | None = None
    original_max_position_embeddings: Number | None = None
    max_position_embeddings: Number | None = None


class _VisionRope(_TextRope):
    rope_type: Annotated[str, _one_of(VISION_ROPE_TYPES)] | None = None


class _Words(_Sizes):
    """What changes no shape and is looked up when the model is built, after the plan is made."""

    hidden_act: Activation | None = None
    projector_hidden_act: Activation | None = None
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None
    rope_parameters: _TextRope | None = None
    rope_scaling: _TextRope | None = None
    rope_theta: Number | None = None
    rms_norm_eps: Number | None = None
    sliding_window: Size | None = None
    max_position_embeddings: Number | None = None
    attention_dropout: Number | None = None
    initializer_range: Number | None = None


class _VisionWords(_Words):
    rope_parameters: _VisionRope | None = None


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
    check_words(config, where)
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


def check_words(config: Mapping[str, Any], where: str) -> None:
    """Raises UserError where config.json has an activation, a dtype or a type of RoPE by which
    transformers finds nothing, or a number that is none."""
    _validate(_Words, config, where, ())
    for key, words in (("text_config", _Words), ("vision_config", _VisionWords)):
        part = config.get(key)
        if isinstance(part, Mapping):
            _validate(words, part, where, (key,))


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


def module_table(config: Mapping[str, Any], *, where: str = "config.json") -> ModuleTable:
    """The table of the model that `config`, the content of a config.json, describes.

    A size that is left out is transformers' default. `where` names the config in an error. Raises
    UserError for an architecture that is not on the allow-list, and for sizes that are no positive
    whole numbers, or absurd.
    """
    class_name, sizes, text = read_sizes(config, where)
    routed = Fraction(1)
    if isinstance(text, Mistral4Sizes):
        routed = Fraction(text.num_experts_per_tok, text.n_routed_experts)
    return ModuleTable(class_name, tuple(_rows(sizes, text)), routed)


def _rows(sizes: TextSizes | Mistral3Sizes, text: TextSizes) -> Iterator[Parameter]:
    """Every parameter of the model that `sizes` describes; `text` is its language model."""
    prefix = "model."
    if isinstance(sizes, Mistral3Sizes):
        yield from _vision_rows("model.vision_tower.", sizes.vision_config)
        yield from _projector_rows("model.multi_modal_projector.", sizes)
        prefix = "model.language_model."
    yield from _text_rows(prefix, text)
    head = (text.vocab_size, text.hidden_size)
    # The outer config decides: a nested tie_word_embeddings has no effect.
    yield Parameter("lm_head.weight", head, "head", False, tied=sizes.tie_word_embeddings)


def _text_rows(prefix: str, sizes: TextSizes) -> Iterator[Parameter]:
    hidden = sizes.hidden_size
    yield Parameter(f"{prefix}embed_tokens.weight", (sizes.vocab_size, hidden), "embedding", False)
    for index in range(sizes.num_hidden_layers):
        layer = f"{prefix}layers.{index}."
        if isinstance(sizes, Mistral4Sizes):
            yield from _latent_attention_rows(f"{layer}self_attn.", sizes)
        else:
            yield from _attention_rows(f"{layer}self_attn.", sizes)
        if isinstance(sizes, Mistral4Sizes) and index >= sizes.first_k_dense_replace:
            yield from _expert_rows(f"{layer}mlp.", sizes)
        else:
            yield from _mlp_rows(f"{layer}mlp.", hidden, sizes.intermediate_size, "mlp")
        yield _norm(f"{layer}input_layernorm", hidden)
        yield _norm(f"{layer}post_attention_layernorm", hidden)
    yield _norm(f"{prefix}norm", hidden)


def _attention_rows(prefix: str, sizes: Ministral3Sizes) -> Iterator[Parameter]:
    hidden = sizes.hidden_size
    head_dim = sizes.head_dim or hidden // sizes.num_attention_heads
    queries = sizes.num_attention_heads * head_dim
    keys = sizes.num_key_value_heads * head_dim
    yield from _linear(f"{prefix}q_proj", queries, hidden, "attention")
    yield from _linear(f"{prefix}k_proj", keys, hidden, "attention")
    yield from _linear(f"{prefix}v_proj", keys, hidden, "attention")
    yield from _linear(f"{prefix}o_proj", hidden, queries, "attention")


def _latent_attention_rows(prefix: str, sizes: Mistral4Sizes) -> Iterator[Parameter]:
    """Multi-head latent attention: queries, keys and values pass through narrow latents."""
    hidden, heads, bias = sizes.hidden_size, sizes.num_attention_heads, sizes.attention_bias
    queries = heads * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim)
    if sizes.q_lora_rank is None:
        yield from _linear(f"{prefix}q_proj", queries, hidden, "attention")
    else:
        yield from _linear(f"{prefix}q_a_proj", sizes.q_lora_rank, hidden, "attention", bias=bias)
        yield _norm(f"{prefix}q_a_layernorm", sizes.q_lora_rank)
        yield from _linear(f"{prefix}q_b_proj", queries, sizes.q_lora_rank, "attention")
    latent = sizes.kv_lora_rank
    shared = latent + sizes.qk_rope_head_dim
    yield from _linear(f"{prefix}kv_a_proj_with_mqa", shared, hidden, "attention", bias=bias)
    yield _norm(f"{prefix}kv_a_layernorm", latent)
    expanded = heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
    yield from _linear(f"{prefix}kv_b_proj", expanded, latent, "attention")
    values = heads * sizes.v_head_dim
    yield from _linear(f"{prefix}o_proj", hidden, values, "attention", bias=bias)


def _mlp_rows(prefix: str, hidden: int, intermediate: int, group: Group) -> Iterator[Parameter]:
    yield from _linear(f"{prefix}gate_proj", intermediate, hidden, group)
    yield from _linear(f"{prefix}up_proj", intermediate, hidden, group)
    yield from _linear(f"{prefix}down_proj", hidden, intermediate, group)


def _expert_rows(prefix: str, sizes: Mistral4Sizes) -> Iterator[Parameter]:
    hidden, width, experts = sizes.hidden_size, sizes.moe_intermediate_size, sizes.n_routed_experts
    gate_up, down = (experts, 2 * width, hidden), (experts, hidden, width)
    yield Parameter(f"{prefix}experts.gate_up_proj", gate_up, "experts", False)
    yield Parameter(f"{prefix}experts.down_proj", down, "experts", False)
    yield Parameter(f"{prefix}gate.weight", (experts, hidden), "router", False)
    yield from _mlp_rows(f"{prefix}shared_experts.", hidden, width * sizes.n_shared_experts, "mlp")


def _vision_rows(prefix: str, sizes: PixtralSizes) -> Iterator[Parameter]:
    hidden = sizes.hidden_size
    patch = (hidden, sizes.num_channels, sizes.patch_size, sizes.patch_size)
    yield Parameter(f"{prefix}patch_conv.weight", patch, "vision", False)
    yield _norm(f"{prefix}ln_pre", hidden, "vision")
    for index in range(sizes.num_hidden_layers):
        layer = f"{prefix}transformer.layers.{index}."
        yield _norm(f"{layer}attention_norm", hidden, "vision")
        yield from _mlp_rows(f"{layer}feed_forward.", hidden, sizes.intermediate_size, "vision")
        for leaf in ("k_proj", "v_proj", "q_proj", "o_proj"):
            yield from _linear(f"{layer}attention.{leaf}", hidden, hidden, "vision")
        yield _norm(f"{layer}ffn_norm", hidden, "vision")


def _projector_rows(prefix: str, sizes: Mistral3Sizes) -> Iterator[Parameter]:
    vision, text = sizes.vision_config.hidden_size, sizes.text_config.hidden_size
    chosen = sizes.vision_feature_layer
    features = vision * (1 if isinstance(chosen, int) else len(chosen))
    merged = vision * sizes.spatial_merge_size**2
    bias = sizes.multimodal_projector_bias
    yield _norm(f"{prefix}norm", vision, "projector")
    yield from _linear(f"{prefix}patch_merger.merging_layer", vision, merged, "projector")
    yield from _linear(f"{prefix}linear_1", text, features, "projector", bias=bias)
    yield from _linear(f"{prefix}linear_2", text, text, "projector", bias=bias)


def _linear(
    module: str, out_features: int, in_features: int, group: Group, *, bias: bool = False
) -> Iterator[Parameter]:
    yield Parameter(f"{module}.weight", (out_features, in_features), group, True)
    if bias:
        yield Parameter(f"{module}.bias", (out_features,), group, False)


def _norm(module: str, width: int, group: Group = "norm") -> Parameter:
    return Parameter(f"{module}.weight", (width,), group, False)

"""Which parameters each architecture is made of, in the order of transformers' modules.

The only place that knows the names below a layer: it changes with transformers.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from engine.catalog.modules import Group, ModuleTable, Parameter
from engine.catalog.sizes import (
    Ministral3Sizes,
    Mistral3Sizes,
    Mistral4Sizes,
    PixtralSizes,
    TextSizes,
    read_sizes,
)


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

"""The catalog's tables against the models that transformers builds, on the meta device."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PixtralVisionConfig
from transformers.activations import ACT2FN
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.quantizers.base import get_keys_to_not_convert

from engine.catalog import ModuleTable, find_model, linear_targets, list_models
from engine.catalog.rows import ACTIVATIONS, ROPE_TYPES, VISION_ROPE_TYPES, module_table
from tests.support import tiny

# Of latent attention no two widths are alike, so that none can stand in another's place.
SIZES = {"vocab_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
LATENT = {
    **{"num_key_value_heads": 4, "moe_intermediate_size": 48, "q_lora_rank": 40},
    **{"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20},
}
VISION = tiny.VISION | {"hidden_size": 32, "num_hidden_layers": 2, "image_size": 224}


def tie_not_said(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of one's own: transformers writes into what it is given."""
    return {k: v for k, v in deepcopy(config).items() if k != "tie_word_embeddings"}


MISTRAL = tie_not_said(tiny.MISTRAL) | SIZES
MINISTRAL3 = tie_not_said(tiny.MINISTRAL3) | SIZES
MISTRAL4 = tie_not_said(tiny.MISTRAL4) | SIZES | LATENT


def with_vision(text: dict[str, Any], **outer: Any) -> dict[str, Any]:
    return tie_not_said(tiny.with_vision(text)) | {"vision_config": VISION} | outer


VARIANTS = {
    "mistral": MISTRAL,
    "mistral, tied": MISTRAL | {"tie_word_embeddings": True},
    "mistral, no head_dim": {k: v for k, v in MISTRAL.items() if k != "head_dim"},
    "mistral4, key heads not said": MISTRAL4 | {"num_key_value_heads": None},
    "ministral3": MINISTRAL3,
    "ministral3, tied": MINISTRAL3 | {"tie_word_embeddings": True},
    "mistral4": MISTRAL4,
    "mistral4, tied": MISTRAL4 | {"tie_word_embeddings": True},
    "mistral4, queries without a latent": MISTRAL4 | {"q_lora_rank": None},
    "mistral4, first layer dense": MISTRAL4 | {"first_k_dense_replace": 1},
    "mistral4, all layers dense": MISTRAL4 | {"first_k_dense_replace": 2},
    "mistral4, two shared experts": MISTRAL4 | {"n_shared_experts": 2},
    "mistral4, attention with bias": MISTRAL4 | {"attention_bias": True},
    "mistral with vision": with_vision(MISTRAL, tie_word_embeddings=False),
    "ministral3 with vision, tied": with_vision(MINISTRAL3, tie_word_embeddings=True),
    "ministral3 with vision, tie not said": with_vision(MINISTRAL3),
    "a tie that only the text says": with_vision(
        MINISTRAL3 | {"tie_word_embeddings": True}, tie_word_embeddings=False
    ),
    "mistral4 with vision": with_vision(MISTRAL4, tie_word_embeddings=False),
    "projector with bias, wider merge, two layers": with_vision(
        MISTRAL, multimodal_projector_bias=True, spatial_merge_size=3, vision_feature_layer=[-1, -2]
    ),
}
# Sizes left out of a config.json are the defaults of transformers.
DEFAULTS = {
    "mistral": {"architectures": ["MistralForCausalLM"]},
    "ministral3": {"architectures": ["Ministral3ForCausalLM"]},
    "mistral4": {"architectures": ["Mistral4ForCausalLM"]},
    "mistral3": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral"},
    },
}


def meta_model(config: dict[str, Any]) -> Any:
    model_class = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        return model_class(model_class.config_class.from_dict(config))


def assert_same(table: ModuleTable, model: nn.Module) -> None:
    """Name by name, shape by shape and in the same order, tied duplicates as PyTorch has them."""
    rows = [(row.name, row.shape) for row in table.parameters]
    assert rows == [(n, tuple(p.shape)) for n, p in model.named_parameters(remove_duplicate=False)]
    own = [row.name for row in table.parameters if not row.tied]
    assert own == [name for name, _ in model.named_parameters()]
    assert table.total_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [card.name for card in list_models()])
def test_every_catalog_model_has_the_parameters_that_transformers_builds(name: str) -> None:
    config = dict(find_model(name).config)
    assert_same(module_table(config), meta_model(config))


@pytest.mark.parametrize("name", [card.name for card in list_models()])
def test_every_field_of_a_catalog_config_is_one_that_transformers_knows(name: str) -> None:
    config = find_model(name).config
    config_class = getattr(transformers, config["architectures"][0]).config_class
    read = config_class.from_dict(dict(config))
    known, default = read.to_dict(), config_class().to_dict()
    for part in ("text_config", "vision_config"):
        if part in config:
            own_class = type(getattr(read, part))
            assert config[part].items() <= known[part].items()
            assert set(config[part]) <= set(own_class().to_dict())
    flat = {key: value for key, value in config.items() if not isinstance(value, dict)}
    assert flat.items() <= known.items()
    assert set(flat) <= set(default)


@pytest.mark.parametrize(
    "config",
    [*VARIANTS.values(), *DEFAULTS.values()],
    ids=[*VARIANTS, *(f"{name}, no size said" for name in DEFAULTS)],
)
def test_every_variant_has_the_parameters_that_transformers_builds(config: dict[str, Any]) -> None:
    assert_same(module_table(config), meta_model(config))


def test_words_that_are_looked_up_are_those_of_transformers() -> None:
    assert set(ACT2FN) == ACTIVATIONS
    assert {"default", *ROPE_INIT_FUNCTIONS} == ROPE_TYPES
    vision: Any = PixtralVisionConfig()
    assert vision.rope_parameters["rope_type"] in VISION_ROPE_TYPES


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_what_is_quantizable_is_what_bitsandbytes_makes_4_bit(config: dict[str, Any]) -> None:
    model = meta_model(config)
    replace_with_bnb_linear(
        model,
        modules_to_not_convert=get_keys_to_not_convert(model),
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
    )
    made = {n for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert {row.module for row in module_table(config).parameters if row.quantizable} == made


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_lora_targets_are_all_linear_modules_of_the_language_model(config: dict[str, Any]) -> None:
    body = meta_model(config).model
    text, prefix = (
        (body.language_model, "model.language_model.")
        if hasattr(body, "language_model")
        else (body, "model.")
    )
    linear = [prefix + n for n, m in text.named_modules() if isinstance(m, nn.Linear)]
    assert list(linear_targets(module_table(config))) == linear


def test_the_groups_of_mistral_small_4_add_up_as_measured() -> None:
    # Millions of parameters, counted on the meta device when the architectures were collected.
    counts = module_table(find_model("mistral-small-4").config).counts_by_group()
    millions = {group: count / 1e6 for group, count in counts.items()}
    assert millions["attention"] + millions["mlp"] == pytest.approx(1915.7, abs=0.05)
    assert millions["experts"] == pytest.approx(115964.12, abs=0.005)
    assert millions["router"] == pytest.approx(18.87, abs=0.005)
    assert millions["norm"] == pytest.approx(0.35, abs=0.005)
    assert millions["embedding"] == millions["head"] == pytest.approx(536.87, abs=0.005)
    assert millions["vision"] == pytest.approx(403.31, abs=0.005)
    assert millions["projector"] == pytest.approx(25.17, abs=0.005)


widths = st.integers(1, 12).map(lambda n: 4 * n)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["mistral", "ministral3", "mistral4"]))
    keys, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    text = {
        "vocab_size": draw(st.integers(16, 64)),
        "hidden_size": keys * groups * draw(widths),
        "intermediate_size": draw(widths),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": keys * groups,
        "num_key_value_heads": keys,
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 11,
    }
    if kind == "mistral4":
        text |= {
            "moe_intermediate_size": draw(widths),
            "n_routed_experts": draw(st.integers(1, 5)),
            "num_experts_per_tok": 1,
            "n_shared_experts": draw(st.integers(1, 2)),
            "first_k_dense_replace": draw(st.integers(0, 3)),
            "q_lora_rank": draw(st.none() | widths),  # type: ignore[dict-item]
            "kv_lora_rank": draw(widths),
            "qk_nope_head_dim": draw(widths),
            "qk_rope_head_dim": draw(widths),
            "v_head_dim": draw(widths),
            "attention_bias": draw(st.booleans()),
        }
    else:
        text["head_dim"] = draw(widths)
    if draw(st.booleans()):
        classes = {"mistral": "Mistral", "ministral3": "Ministral3", "mistral4": "Mistral4"}
        return text | {"architectures": [f"{classes[kind]}ForCausalLM"], "model_type": kind}
    heads = draw(st.integers(1, 3))
    vision = {
        "hidden_size": heads * draw(widths),
        "intermediate_size": draw(widths),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_channels": draw(st.sampled_from([1, 3])),
        "patch_size": draw(st.sampled_from([2, 14])),
        "image_size": 28,
    }
    return with_vision(
        text | {"model_type": kind},
        spatial_merge_size=draw(st.integers(1, 3)),
        multimodal_projector_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    ) | {"vision_config": vision}


@settings(max_examples=60, deadline=None)
@given(configs())
def test_any_small_config_has_the_parameters_of_transformers(config: dict[str, Any]) -> None:
    assert_same(module_table(config), meta_model(config))

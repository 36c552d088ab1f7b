"""A config.json is held against its model's card, and what an override puts right is right."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from engine.catalog import (
    Architecture,
    attention_factor,
    contradictions,
    find_model,
    list_models,
    read_architecture,
    repaired_rope,
    with_overrides,
)
from engine.config import ConfigError, read_config, require_supported
from engine.plan import remarks
from tests.support.extras import needs_trainer
from tests.support.machines import config

RECIPES = Path(__file__).parents[2] / "presets" / "recipes"
CARDS = [card for card in list_models() if card.sources]
MEDIUM = find_model("mistral-medium-3.5")


def text_of(config: Any) -> Any:
    return config.get("text_config", config)


@pytest.fixture
def beside_weights(tmp_path: Path) -> Callable[..., Architecture]:
    """A card's config.json in a folder, with changes to its text part."""

    def write(name: str, **changes: object) -> Architecture:
        content = deepcopy(dict(find_model(name).config))
        for key, value in changes.items():
            if key == "rope_parameters" and isinstance(value, dict):
                text_of(content)[key] |= value
            elif value is ...:
                del text_of(content)[key]
            else:
                text_of(content)[key] = value
        (tmp_path / "config.json").write_text(json.dumps(content), "utf-8")
        return read_architecture(tmp_path)

    return write


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_does_not_contradict_itself(
    card: Any, beside_weights: Callable[..., Architecture]
) -> None:
    assert contradictions(beside_weights(card.name), card) == ()


def test_the_first_config_of_medium_is_reported_with_what_repairs_it(
    beside_weights: Callable[..., Architecture],
) -> None:
    read = beside_weights(MEDIUM.name, rope_parameters={"mscale_all_dim": 1.0})
    # No name says which model the folder holds: its shape and the value do.
    (said,) = remarks(config(base_model=str(read.folder)), read)
    assert said.startswith("config.json says mscale_all_dim: 1.0, Mistral Medium 3.5 has 0.0: ")
    assert "attention is scaled by 1 instead of 1.416" in said
    override = said.partition("write ")[2]
    (Path(str(read.folder)) / "run.yml").write_text(
        f"base_model: {read.folder}\nadapter: lora\nlora_target_linear: true\n"
        f"datasets: [{{path: rows.jsonl, type: chat_template}}]\n{override}\n"
    )
    file = read_config(Path(str(read.folder)) / "run.yml")
    file.require_supported()
    assert remarks(file.config, read) == ()
    built = with_overrides(read, file.config.overrides_of_model_config)
    assert text_of(built.config)["rope_parameters"] == text_of(MEDIUM.config)["rope_parameters"]
    assert text_of(read.config)["rope_parameters"]["mscale_all_dim"] == 1.0


@pytest.mark.parametrize("rope", [{"rope_type": 3}, {"rope_type": "yarn", "factor": "16"}, "yarn"])
def test_a_rotation_that_is_no_numbers_is_refused(rope: object) -> None:
    with pytest.raises(ConfigError, match="overrides_of_model_config"):
        require_supported(config(overrides_of_model_config={"rope_parameters": rope}))


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("ministral-3-8b", {"rope_parameters": {"rope_theta": 1e9}}, "rope_parameters.rope_theta"),
        ("ministral-3-14b", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters.rope_theta"),
        ("ministral-3-8b", {"rope_parameters": ...}, "rope_parameters"),
        ("mistral-small-4", {"num_experts_per_tok": 8}, "num_experts_per_tok"),
        ("mistral-small-4", {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        ("magistral-small-2507", {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ("magistral-small-2507", {"sliding_window": ...}, "sliding_window"),  # 4,096 by default
        ("magistral-small-2509", {"rms_norm_eps": ...}, "rms_norm_eps"),
    ],
)
def test_what_a_source_vouches_for_is_compared(
    name: str, changes: dict[str, Any], key: str, beside_weights: Callable[..., Architecture]
) -> None:
    read = beside_weights(name, **changes)
    (found,) = contradictions(read, find_model(name))
    assert found.key == key
    (said,) = remarks(config(base_model=name), read)
    assert said.startswith("config.json says ")
    assert find_model(name).title in said


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # Low confidence: of another model of the same shape.
        ("mistral-medium-3.5", {"rope_parameters": {"beta_fast": 32.0, "rope_theta": 5e6}}),
        ("mistral-medium-3.5", {"rope_parameters": {"mscale_all_dim": 0}}),
        ("mistral-medium-3.5", {"max_position_embeddings": 131072, "use_cache": False}),
    ],
)
def test_what_nobody_is_sure_of_is_not(
    name: str, changes: dict[str, Any], beside_weights: Callable[..., Architecture]
) -> None:
    assert contradictions(beside_weights(name, **changes), find_model(name)) == ()


def test_another_model_of_the_same_shape_is_not_taken_for_it(
    beside_weights: Callable[..., Architecture],
) -> None:
    # Mistral Small 2501 has the shape of Magistral Small 2507 and a tenth of its rope_theta.
    read = beside_weights("magistral-small-2507", rope_parameters={"rope_theta": 1e8})
    assert contradictions(read) == ()
    assert contradictions(read, find_model("magistral-small-2507"))


def test_files_from_before_transformers_5_are_read_alike(
    beside_weights: Callable[..., Architecture],
) -> None:
    rope = dict(text_of(find_model("ministral-3-8b").config)["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    old = {"rope_parameters": ..., "rope_theta": theta, "rope_scaling": {"type": kind, **rope}}
    read = beside_weights("ministral-3-8b", **old)
    assert contradictions(read, find_model("ministral-3-8b")) == ()
    wrong = old | {"rope_theta": 1e4}
    read = beside_weights("ministral-3-8b", **wrong)
    (found,) = contradictions(read, find_model("ministral-3-8b"))
    assert (found.key, found.given) == ("rope_parameters.rope_theta", 1e4)
    right = repaired_rope(read, (found,))
    assert right == text_of(find_model("ministral-3-8b").config)["rope_parameters"]


def copies() -> Iterator[Any]:
    """Each recipe, and one wrong value of a key that is vouched for."""
    for path in sorted(RECIPES.glob("*/*.yml")):
        sources = find_model(path.parent.name).sources
        vouched = [key for s in sources if s.confidence == "high" for key in s.keys]
        for key in vouched[:1]:
            section, _, name = key.rpartition(".")
            wrong = {section: {name: 2.0}} if section else {key: 2.0}
            yield pytest.param(path, wrong, id=f"{path.parent.name}/{path.stem}")


@pytest.mark.parametrize(("path", "wrong"), copies())
def test_the_copy_that_a_recipe_names_is_checked(
    path: Path, wrong: dict[str, Any], beside_weights: Callable[..., Architecture]
) -> None:
    run = read_config(path).config
    # The folder that the hub's files come to lie in has no card: the recipe's name says which.
    sound = beside_weights(path.parent.name)
    assert not any("config.json" in said for said in remarks(run, sound))
    read = beside_weights(path.parent.name, **wrong)
    assert any(said.startswith("config.json says") for said in remarks(run, read))


def test_words_for_numbers_are_reported_like_other_contradictions(
    beside_weights: Callable[..., Architecture],
) -> None:
    read = beside_weights("ministral-3-8b", rope_parameters={"factor": "16", "mscale": "one"})
    (said,) = remarks(config(base_model="ministral-3-8b"), read)
    assert said.startswith("config.json says ")


@needs_trainer
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_attention_factor_is_transformers_own(card: Any) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = getattr(transformers, card.config["architectures"][0]).config_class
    settings = kind.from_dict(deepcopy(dict(card.config))).get_text_config()
    rope = text_of(card.config)["rope_parameters"]
    if rope["rope_type"] == "yarn":
        _, expected = ROPE_INIT_FUNCTIONS["yarn"](settings, "cpu")
        assert attention_factor(rope) == pytest.approx(expected, abs=1e-12)
    else:
        assert attention_factor(rope) == 1.0


@needs_trainer
@pytest.mark.parametrize("kind", ["mistral", "ministral3", "mistral4"])
def test_what_a_silent_file_means_is_transformers_default(kind: str) -> None:
    from transformers import AutoConfig

    from engine.catalog.architecture import _LEFT_OUT_BY_TYPE

    default = AutoConfig.for_model(kind)
    for key, value in _LEFT_OUT_BY_TYPE[kind].items():
        assert getattr(default, key) == value

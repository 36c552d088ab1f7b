"""What a config does less of on its model than it seems to say, and what cannot be done at all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.catalog import list_models
from engine.config import read_config
from engine.errors import DOES_NOT_FIT, UserError
from engine.plan import estimate, refuse_answering, remarks
from engine.plan.remarks import answering_bytes
from engine.units import GIB
from tests.support.machines import at, card, config, model, sized

EXAMPLE = Path(__file__).parent.parent / "golden" / "config" / "mistral4-qlora-text.yml"
ROUTERS = {"overrides_of_model_config": {"output_router_logits": True}}


def test_an_expression_that_reaches_few_layers_is_counted_and_the_others_named() -> None:
    (remark,) = remarks(read_config(EXAMPLE).config, model("mistral-small-4"))
    assert remark.startswith("the adapter sits on o_proj alone: 36 of 288 linear layers; ")
    for missed in ("q_a_proj", "kv_b_proj", "gate_proj", "up_proj", "down_proj"):
        assert missed in remark.split(";")[1]


@pytest.mark.parametrize("name", [card.name for card in list_models()])
def test_every_linear_layer_is_no_surprise(name: str) -> None:
    assert remarks(config(base_model=name), model(name)) == ()


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_target_modules": ["o_proj"]},  # a list says what it means
        {"lora_target_modules": r".*\.(q|k|v|o)_proj"},  # 4 of 7
        {"lora_target_modules": r".*_proj", "peft_layers_to_transform": [3]},
        {"adapter": None, "lora_target_modules": r".*\.o_proj"},
    ],
)
def test_a_wish_that_reaches_what_it_names_is_no_surprise(keys: dict[str, Any]) -> None:
    assert remarks(config(**keys), model("ministral-3-3b")) == ()


def test_one_layer_of_all_is_a_surprise_without_endings_that_are_left_out() -> None:
    asked = config(lora_target_modules=r".*\.layers\.0\..*")
    (remark,) = remarks(asked, model("ministral-3-3b"))
    assert "alone: 7 of 182 linear layers. " in remark


def test_routers_are_balanced_only_where_there_are_experts() -> None:
    (remark,) = remarks(config(**ROUTERS), model("mistral-medium-3.5"))
    assert remark.startswith("output_router_logits has no effect")
    assert remarks(config(**ROUTERS), model("mistral-small-4")) == ()


def test_weights_that_cannot_be_read_are_reported_before_a_run_is_refused() -> None:
    (remark,) = remarks(config(), replace(model("ministral-3-3b"), checkpoint="gptq"))
    assert remark.startswith("Its weights are stored as GPTQ")


@pytest.mark.parametrize("says", [{"sliding_window": 4096}, {}], ids=["it says so", "it is silent"])
def test_rows_beyond_a_window_of_attention_alone_are_refused(says: dict[str, int]) -> None:
    found = model("magistral-small-2506")
    silent = {key: value for key, value in found.config.items() if key != "sliding_window"}
    windowed = replace(found, config=silent | says)
    assert remarks(config(sequence_len=4096), windowed) == remarks(config(sequence_len=4096), found)
    with pytest.raises(UserError, match="attention sees 4,096 tokens") as caught:
        remarks(config(sequence_len=4097), windowed)
    assert caught.value.fix == "Set sequence_len to 4096 or less."


def test_asking_takes_the_weights_and_the_adapter_but_no_step() -> None:
    asked, device = config(adapter="qlora"), card("RTX 4090")
    needed = answering_bytes(asked, model("ministral-3-8b"), device)
    assert needed < estimate(asked, at("ministral-3-8b", device)).device_bytes
    wide = answering_bytes(config(), model("ministral-3-8b"), device)
    assert wide == pytest.approx(8.92e9 * 2 * 1.03 + 0.55 * GIB, rel=0.03)
    assert needed < wide / 2


def test_a_model_that_does_not_fit_is_refused_with_figures() -> None:
    refuse_answering(config(), model("ministral-3-3b"), sized(9))
    with pytest.raises(UserError, match=r"8\.\d GiB are needed to ask it") as caught:
        refuse_answering(config(), model("ministral-3-3b"), sized(8))
    assert caught.value.exit_status == DOES_NOT_FIT
    assert "adapter: qlora" in caught.value.fix

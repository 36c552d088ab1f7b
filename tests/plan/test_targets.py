"""Which modules a config's adapter lands on, counted before anything is loaded."""

from typing import Any

import pytest

from engine.catalog import linear_targets, list_models, module_table
from engine.errors import UserError
from engine.plan.targets import (
    ALL_LINEAR,
    adapter_parameters,
    choose_targets,
    count_targets,
    trained_parameters,
)
from tests.plan.machines import MODELS, config, model

TABLES = {card.name: module_table(card.config) for card in list_models()}
EYES = ("vision", "projector", "lm_head", "embed")


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
class TestTargets:
    def test_without_a_wish_every_linear_of_the_language_model(self, table: Any) -> None:
        targets = choose_targets(table, config())
        assert targets == linear_targets(table)
        assert not [name for name in targets if any(word in name for word in EYES)]

    @pytest.mark.parametrize("leaves", [["o_proj"], ["o_proj", "down_proj"]])
    def test_a_list_means_ends_of_names(self, table: Any, leaves: list[str]) -> None:
        asked = config(lora_target_modules=leaves)
        targets = choose_targets(table, asked)
        wanted = [n for n in linear_targets(table) if n.rpartition(".")[2] in leaves]
        assert sorted(targets) == sorted(wanted)
        assert len(set(targets)) == len(targets)

    @pytest.mark.parametrize("expression", [r".*\.o_proj", r".*layers\.0\..*", ".*"])
    def test_an_expression_means_whole_names_and_does_not_reach_the_eyes(
        self, table: Any, expression: str
    ) -> None:
        asked = config(lora_target_modules=expression)
        targets = choose_targets(table, asked)
        assert targets
        assert set(targets) <= set(linear_targets(table))

    @pytest.mark.parametrize(
        "wish",
        [
            ["q_proj_typo"],
            ["o_proj", "query"],
            ["proj"],  # an end of a word is no end of a name
            ["vision_tower.transformer.layers.0.attention.o_proj"],
            ["lm_head"],
            "q_proj",  # an expression has to match the whole name
            r".*vision_tower.*",
        ],
        ids=str,
    )
    def test_a_wish_that_matches_nothing_is_refused(self, table: Any, wish: Any) -> None:
        asked = config(lora_target_modules=wish)
        with pytest.raises(UserError, match="matches no module") as caught:
            choose_targets(table, asked)
        assert "o_proj" in caught.value.why

    def test_all_linears_may_be_joined_to_a_wish(self, table: Any) -> None:
        asked = config(lora_target_modules=["o_proj"], lora_target_linear=True)
        targets = choose_targets(table, asked)
        assert sorted(targets) == sorted(linear_targets(table))

    def test_no_target_at_all_is_refused(self, table: Any) -> None:
        asked = config().model_copy(update={"lora_target_linear": False})
        with pytest.raises(UserError, match="no module at all"):
            choose_targets(table, asked)


class TestCounts:
    def test_each_entry_says_how_many_modules_it_matches(self) -> None:
        table = model("magistral-small-2509").table
        assert count_targets(table, config()) == {ALL_LINEAR: 280}
        asked = config(lora_target_modules=["q_proj", "layers.3.mlp.up_proj"])
        assert count_targets(table, asked) == {"q_proj": 40, "layers.3.mlp.up_proj": 1}
        asked = config(lora_target_modules=r".*\.(q|v)_proj")
        assert count_targets(table, asked) == {r".*\.(q|v)_proj": 80}

    def test_the_adapter_is_rank_times_inputs_and_outputs_of_each_module(self) -> None:
        table = model("magistral-small-2507").table  # width 5120, 32 heads of 128
        asked = config(lora_r=16, lora_target_modules=["q_proj"])
        assert adapter_parameters(table, asked) == 40 * 16 * (5120 + 4096)
        twice = config(lora_r=32, lora_target_modules=["q_proj"])
        assert adapter_parameters(table, twice) == 2 * adapter_parameters(table, asked)

    def test_a_module_that_two_entries_match_has_one_adapter(self) -> None:
        table = model("ministral-3-3b").table
        once = config(lora_target_modules=["q_proj"])
        again = config(lora_target_modules=["q_proj", "self_attn.q_proj"])
        assert adapter_parameters(table, once) == adapter_parameters(table, again)
        joined = config(lora_target_modules=["q_proj"], lora_target_linear=True)
        assert adapter_parameters(table, joined) == adapter_parameters(table, config())

    def test_every_expert_of_a_fused_tensor_gets_its_own(self) -> None:
        table = model("mistral-small-4").table
        experts = ["gate_up_proj", "down_proj"]
        stacks = [p for p in table.parameters if p.group == "experts"]
        asked = config(lora_r=8, lora_target_modules=["o_proj"], lora_target_parameters=experts)
        alone = config(lora_r=8, lora_target_modules=["o_proj"])
        added = adapter_parameters(table, asked) - adapter_parameters(table, alone)
        assert added == 8 * sum(p.shape[0] * (p.shape[1] + p.shape[2]) for p in stacks)

    @pytest.mark.parametrize("name", MODELS)
    def test_a_full_fine_tune_moves_the_language_model(self, name: str) -> None:
        table = model(name).table
        counts = table.counts_by_group()
        seen = counts["vision"] + counts["projector"]
        assert trained_parameters(table, config(adapter=None)) == table.total_parameters - seen

    def test_unfrozen_parameters_are_counted_by_the_start_of_their_names(self) -> None:
        table = model("ministral-3-3b").table  # its head is the embedding
        asked = config(adapter=None, unfrozen_parameters=[r".*embed_tokens", r".*lm_head"])
        assert trained_parameters(table, asked) == table.counts_by_group()["embedding"]
        nothing = config(adapter=None, unfrozen_parameters=["layers"])
        assert trained_parameters(table, nothing) == 0

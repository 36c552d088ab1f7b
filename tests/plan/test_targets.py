"""Which modules a config's adapter lands on, counted before anything is loaded."""

from typing import Any

import pytest

from engine.catalog import linear_targets, list_models
from engine.catalog.rows import module_table
from engine.errors import UserError
from engine.plan.targets import (
    ALL_LINEAR,
    adapter_parameters,
    choose_saved,
    choose_stacks,
    choose_targets,
    count_targets,
    trainable_names,
    trainable_parameters,
)
from tests.support.machines import MODELS, config, model

TABLES = {card.name: module_table(card.config) for card in list_models()}
EYES = ("vision", "projector", "lm_head", "embed")


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
class TestTargets:
    def test_without_a_wish_every_linear_of_the_language_model(self, table: Any) -> None:
        targets = choose_targets(table, config())
        assert targets == linear_targets(table)
        assert not [name for name in targets if any(word in name for word in EYES)]
        joined = config(lora_target_modules=["o_proj"], lora_target_linear=True)
        assert sorted(choose_targets(table, joined)) == sorted(targets)

    @pytest.mark.parametrize("leaves", [["o_proj"], ["o_proj", "down_proj"]])
    def test_a_list_means_ends_of_names(self, table: Any, leaves: list[str]) -> None:
        targets = choose_targets(table, config(lora_target_modules=leaves))
        expected = [n for n in linear_targets(table) if n.rpartition(".")[2] in leaves]
        assert sorted(targets) == sorted(expected)
        assert len(set(targets)) == len(targets)

    @pytest.mark.parametrize("expression", [r".*\.o_proj", r".*layers\.0\..*", ".*"])
    def test_an_expression_means_whole_names_of_text(self, table: Any, expression: str) -> None:
        targets = choose_targets(table, config(lora_target_modules=expression))
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
            r".*vision_tower\.layers.*",
        ],
        ids=str,
    )
    def test_a_wish_that_matches_nothing_is_refused(self, table: Any, wish: Any) -> None:
        with pytest.raises(UserError, match="matches no module") as caught:
            choose_targets(table, config(lora_target_modules=wish))
        assert "o_proj" in caught.value.why

    def test_no_target_at_all_is_refused(self, table: Any) -> None:
        asked = config().model_copy(update={"lora_target_linear": False})
        with pytest.raises(UserError, match="no module at all"):
            choose_targets(table, asked)


def adapter(name: str, **keys: Any) -> int:
    """Numbers of the adapter, on the queries' layers where nothing else is asked for."""
    given = config(**{"lora_target_modules": ["q_proj"]} | keys)
    return adapter_parameters(model(name).table, given)


class TestCounts:
    def test_each_entry_says_how_many_modules_it_matches(self) -> None:
        table = model("magistral-small-2509").table
        assert count_targets(table, config()) == {ALL_LINEAR: 280}
        for counts in ({"q_proj": 40, "layers.3.mlp.up_proj": 1}, {r".*\.(q|v)_proj": 80}):
            asked = list(counts) if len(counts) > 1 else next(iter(counts))
            assert count_targets(table, config(lora_target_modules=asked)) == counts

    def test_the_adapter_is_rank_times_inputs_and_outputs_of_each_module_once(self) -> None:
        one = adapter("magistral-small-2507", lora_r=16)  # width 5120, 32 heads of 128
        assert one == 40 * 16 * (5120 + 4096)
        assert adapter("magistral-small-2507", lora_r=32) == 2 * one
        dora = adapter("magistral-small-2507", lora_r=16, peft_use_dora=True)
        assert dora - one == 40 * 4096, "DoRA adds the length of every output"
        again = adapter("ministral-3-3b", lora_target_modules=["q_proj", "self_attn.q_proj"])
        assert adapter("ministral-3-3b") == again
        joined = adapter("ministral-3-3b", lora_target_linear=True)
        assert joined == adapter("ministral-3-3b", lora_target_modules=None)

    def test_every_expert_of_a_fused_tensor_gets_its_own(self) -> None:
        stacks = [p for p in model("mistral-small-4").table.parameters if p.group == "experts"]
        keys: dict[str, Any] = {"lora_r": 8, "lora_target_modules": ["o_proj"]}
        experts = ["gate_up_proj", "down_proj"]
        added = adapter("mistral-small-4", **keys, lora_target_parameters=experts)
        added -= adapter("mistral-small-4", **keys)
        assert added == 8 * sum(p.shape[0] * (p.shape[1] + p.shape[2]) for p in stacks)

    @pytest.mark.parametrize("name", MODELS)
    def test_a_full_fine_tune_trains_the_language_model(self, name: str) -> None:
        table = model(name).table
        counts = table.counts_by_group()
        seen = counts["vision"] + counts["projector"]
        assert trainable_parameters(table, config(adapter=None)) == table.total_parameters - seen


class TestVisionTower:
    """Only an expression that spells the tower or the projector reaches them."""

    TABLE = model("magistral-small-2509").table

    @pytest.mark.parametrize("word", ["vision_tower", "multi_modal_projector"])
    def test_an_expression_that_spells_them_reaches_them(self, word: str) -> None:
        targets = choose_targets(self.TABLE, config(lora_target_modules=rf".*\.{word}\..*"))
        assert targets
        assert all(word in name for name in targets)

    def test_one_word_does_not_open_the_other_door(self) -> None:
        asked = config(lora_target_modules=r".*(vision_tower|language_model|linear_).*")
        targets = choose_targets(self.TABLE, asked)
        assert any("vision_tower" in name for name in targets)
        assert any("language_model" in name for name in targets)
        assert not any("multi_modal_projector" in name for name in targets)

    @pytest.mark.parametrize("entry", ["vision_tower", "linear_1", "patch_conv"])
    def test_a_list_does_not_reach_them(self, entry: str) -> None:
        with pytest.raises(UserError, match="matches no module"):
            choose_targets(self.TABLE, config(lora_target_modules=[entry]))


class TestExperts:
    TABLE = model("mistral-small-4").table

    def test_without_them_attention_and_the_shared_expert_of_each_layer_learn(self) -> None:
        targets = choose_targets(self.TABLE, config())
        assert len(targets) == 36 * (5 + 3)
        leaves = {name.partition(".layers.0.")[2] for name in targets} - {""}
        attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        shared = ("gate_proj", "up_proj", "down_proj")
        assert leaves == {
            *(f"self_attn.{leaf}" for leaf in attention),
            *(f"mlp.shared_experts.{leaf}" for leaf in shared),
        }

    def test_the_adapter_is_counted_with_and_without_them(self) -> None:
        # Inputs plus outputs of one layer's linears, and of one expert's two matrices.
        linears = (4096 + 1024) + (1024 + 4096) + (4096 + 320) + (256 + 6144) + (4096 + 4096)
        linears += 3 * (4096 + 2048)
        expert = (4096 + 4096) + (2048 + 4096)
        without = config(lora_r=16)
        stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        asked = config(lora_r=16, lora_target_linear=True, lora_target_parameters=stacks)
        assert adapter_parameters(self.TABLE, without) == 36 * 16 * linears == 27_463_680
        assert adapter_parameters(self.TABLE, asked) == 36 * 16 * (linears + 128 * expert)

    def test_an_entry_matches_the_end_of_a_name(self) -> None:
        asked = config(lora_target_parameters=["mlp.experts.gate_up_proj", "down_proj"])
        layers = len([p for p in self.TABLE.parameters if p.name.endswith("experts.down_proj")])
        counts = count_targets(self.TABLE, asked)
        assert counts == {"mlp.experts.gate_up_proj": layers, "down_proj": layers}
        assert len(choose_stacks(self.TABLE, asked)) == 2 * layers
        assert choose_stacks(self.TABLE, config()) == ()

    @pytest.mark.parametrize("name", ["mistral-small-4", "ministral-3-3b"])
    @pytest.mark.parametrize("entry", ["experts.up_proj", "up_proj_typo", "roj"])
    def test_an_entry_that_matches_nothing_is_refused(self, name: str, entry: str) -> None:
        asked = config(lora_target_modules=["o_proj"], lora_target_parameters=[entry])
        for count in (choose_stacks, count_targets, adapter_parameters):
            with pytest.raises(UserError, match="matches no expert tensor"):
                count(model(name).table, asked)


class TestLayers:
    TABLE = model("mistral-small-4").table

    @pytest.mark.parametrize("layers", [3, [0, 3], [3, 3]])
    def test_only_the_numbered_layers_get_an_adapter(self, layers: Any) -> None:
        keys = {"lora_target_modules": ["o_proj"], "lora_target_parameters": ["experts.down_proj"]}
        asked = config(peft_layers_to_transform=layers, **keys)
        expected = {layers} if isinstance(layers, int) else set(layers)
        assert len(choose_targets(self.TABLE, asked)) == len(expected)
        assert len(choose_stacks(self.TABLE, asked)) == len(expected)
        chosen = choose_targets(self.TABLE, asked)
        assert all(".layers.0." in n or ".layers.3." in n for n in chosen)

    def test_a_layer_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(UserError, match="there is no layer 99") as caught:
            choose_targets(self.TABLE, config(peft_layers_to_transform=[0, 99]))
        assert "from 0 to 35" in caught.value.why


class TestSavedWhole:
    def test_embedding_and_head_by_the_end_of_their_names(self) -> None:
        table = model("magistral-small-2509").table
        asked = config(lora_modules_to_save=["lm_head", "model.language_model.embed_tokens"])
        assert choose_saved(table, asked) == ("lm_head", "model.language_model.embed_tokens")
        counts = table.counts_by_group()
        saved = trainable_parameters(table, asked) - adapter_parameters(table, asked)
        assert saved == counts["head"] + counts["embedding"]

    @pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
    def test_a_tied_head_is_the_embedding(self, names: list[str]) -> None:
        table = model("ministral-3-3b").table
        asked = config(lora_modules_to_save=names)
        assert choose_saved(table, asked) == ("model.language_model.embed_tokens",)
        saved = trainable_parameters(table, asked) - adapter_parameters(table, asked)
        assert saved == table.counts_by_group()["embedding"]

    @pytest.mark.parametrize("name", ["q_proj", "tokens", "multi_modal_projector"])
    def test_anything_else_is_refused(self, name: str) -> None:
        with pytest.raises(UserError, match=f"{name} cannot be trained whole"):
            choose_saved(model("ministral-3-3b").table, config(lora_modules_to_save=[name]))


class TestTrainableNames:
    TABLE = model("magistral-small-2509").table

    def names(self, *expressions: str) -> frozenset[str]:
        return trainable_names(self.TABLE, config(adapter=None, unfrozen_parameters=expressions))

    def test_an_expression_is_held_against_the_start_of_names(self) -> None:
        names = {row.name for row in self.TABLE.parameters}
        found = self.names("model.language_model.*")
        assert found == {n for n in names if n.startswith("model.language_model.")}
        assert self.names(r"model\.multi_modal_projector") == {
            n for n in names if n.startswith("model.multi_modal_projector.")
        }
        assert self.names("^lm_head.weight$") == {"lm_head.weight"}

    def test_else_against_the_start_of_a_part_of_the_language_models(self) -> None:
        assert self.names("embed_tokens", "lm_head") == {
            "model.language_model.embed_tokens.weight",
            "lm_head.weight",
        }
        assert self.names(r"layers\.1\.self_attn.q_proj") == {
            "model.language_model.layers.1.self_attn.q_proj.weight"
        }

    def test_a_tied_head_trains_the_embedding(self) -> None:
        table = model("ministral-3-3b").table
        asked = config(adapter=None, unfrozen_parameters=["lm_head"])
        assert trainable_names(table, asked) == {"model.language_model.embed_tokens.weight"}
        assert trainable_parameters(table, asked) == table.counts_by_group()["embedding"]

    @pytest.mark.parametrize("expression", ["^embed_tokens", "ayers", "lm_head2"])
    def test_one_that_matches_nothing_is_refused(self, expression: str) -> None:
        with pytest.raises(UserError, match="matches no parameter"):
            self.names("lm_head", expression)

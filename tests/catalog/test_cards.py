"""The named models of presets/, and the tables that are made from them, without torch."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.catalog import find_model, linear_targets, list_models, read_architecture
from engine.catalog.rows import module_table
from engine.cli import main
from engine.errors import UserError
from tests.support.sizes import BILLIONS

ROOT = Path(__file__).parents[2]


class TestCards:
    def test_the_catalog_has_the_names_of_the_contract(self) -> None:
        assert {card.name for card in list_models()} == set(BILLIONS)

    @pytest.mark.parametrize("name", BILLIONS)
    def test_sizes_are_those_of_the_real_models(self, name: str) -> None:
        total = module_table(find_model(name).config).total_parameters
        assert round(total / 1e9, 3) == BILLIONS[name]

    @pytest.mark.parametrize("card", list_models(), ids=lambda card: card.name)
    def test_a_card_agrees_with_itself(self, card: Any) -> None:
        groups = module_table(card.config).counts_by_group()
        sees = "vision" in card.modalities
        assert sees == (groups["vision"] > 0) == (card.tokenizer.image is not None)
        if card.tokenizer.image:
            vision = card.config["vision_config"]
            merge = card.config["spatial_merge_size"]
            assert card.tokenizer.image == (vision["patch_size"], vision["image_size"], merge)
        assert card.tokenizer.think == (card.thinking in ("tokens", "effort"))
        assert card.tokenizer.settings == (card.thinking == "effort")
        text = card.config.get("text_config", card.config)
        assert card.context_tokens <= text["max_position_embeddings"]
        assert "\n" not in card.description.strip()
        assert all(source.link.startswith("https://") for source in card.sources)
        assert bool(card.sources) == bool(card.repositories)

    def test_no_hub_id_belongs_to_two_cards(self) -> None:
        ids = [repository.id for card in list_models() for repository in card.repositories]
        assert len(ids) == len(set(ids))

    @pytest.mark.parametrize(
        ("typed", "meant"),
        [
            ("Ministral-3-3B-", "ministral-3-3b"),
            ("ministral-3b", "ministral-3-3b"),
            ("mistral-smal-4", "mistral-small-4"),
            ("medium", "mistral-medium-3.5"),
            ("demo", "demo-tiny"),
        ],
    )
    def test_a_mistyped_name_is_answered_with_the_nearest(self, typed: str, meant: str) -> None:
        for ask in (find_model, read_architecture):
            with pytest.raises(UserError) as caught:
                ask(typed)
            assert "Did you mean" in caught.value.fix
            assert meant in caught.value.fix

    def test_a_name_like_no_other_is_answered_without_a_guess(self) -> None:
        with pytest.raises(UserError) as caught:
            find_model("../presets\x1b[31m")
        assert caught.value.fix.startswith("`windtunnel models` lists the names; ")
        assert "\x1b" not in str(caught.value)

    def test_a_file_is_read_once(self) -> None:
        assert find_model("ministral-3-3b") is find_model("ministral-3-3b")


class TestTable:
    def test_a_tied_head_is_listed_and_counted_once(self) -> None:
        small = find_model("demo-tiny").config
        tied = module_table(small)
        apart = module_table({**small, "tie_word_embeddings": False})
        assert tied.parameters[-1].tied
        assert [row.name for row in tied.parameters] == [row.name for row in apart.parameters]
        assert apart.total_parameters - tied.total_parameters == 131072 * 128

    def test_lora_never_reaches_the_vision_tower_or_the_head(self) -> None:
        targets = linear_targets(find_table("ministral-3-3b"))
        assert len(targets) == 26 * 7
        assert all(name.startswith("model.language_model.layers.") for name in targets)

    def test_active_parameters_leave_out_images_and_idle_experts(self) -> None:
        # The model's own page says 6.5B a token, and 3.4B for the 3B's language model.
        assert find_table("mistral-small-4").active_parameters / 1e9 == pytest.approx(
            6.63, abs=0.01
        )
        assert find_table("ministral-3-3b").active_parameters / 1e9 == pytest.approx(3.43, abs=0.01)


def find_table(name: str) -> Any:
    return module_table(find_model(name).config)


OFFERED = [name for name in BILLIONS if name != "demo-tiny-vision"]


class TestCommand:
    @staticmethod
    def run(*arguments: str) -> None:
        assert main(["models", *arguments]) == 0

    def test_the_table_names_every_model_in_80_cells(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.run()
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        table = {line.split()[0]: line for line in lines[1:] if line and line[0] != " "}
        assert set(table) >= set(OFFERED)
        assert "119.4B    6.6B" in table["mistral-small-4"]
        assert "Modified MIT" in table["mistral-medium-3.5"]

    def test_json_has_a_full_entry_for_each_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.run("--json")
        models = json.loads(capsys.readouterr().out)["models"]
        assert [m["name"] for m in models] == sorted(OFFERED, key=lambda n: sizes()[n])
        for model in models:
            assert model["total_parameters"] == sizes()[model["name"]]
            assert model["total_parameters"] >= model["active_parameters"] > 0
            assert {"title", "licence", "context_tokens", "modalities", "thinking"} <= set(model)
            assert {"repositories", "tokenizer", "sampling", "sources"} <= set(model)
            assert "config" not in model


def sizes() -> dict[str, int]:
    return {card.name: module_table(card.config).total_parameters for card in list_models()}

"""The command `models`, as a table and as JSON."""

import json

import pytest

from engine.catalog import list_models
from engine.catalog.modules import module_table
from engine.cli import main
from tests.support.sizes import BILLIONS

OFFERED = [name for name in BILLIONS if name != "demo-tiny-vision"]


class TestCommand:
    @staticmethod
    def run(*arguments: str) -> None:
        assert main(["models", *arguments]) == 0

    def test_the_table_fits_80_columns_and_names_every_model(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.run()
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        table = {line.split()[0]: line for line in lines[1:] if line and line[0] != " "}
        assert set(table) >= set(OFFERED)
        assert "119.4B    6.6B" in table["mistral-small-4"]
        assert "Modified MIT" in table["mistral-medium-3.5"]

    def test_json_has_one_document_with_a_full_entry_for_each_model(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
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

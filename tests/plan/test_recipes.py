"""The recipes that ship: each is planned here, and follows the rules by which Axolotl reads it.

Axolotl's rules are those of its 0.21 release, written down from its validation: a recipe that
breaks one would stop there, or worse, train something else.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from engine.catalog import find_repository, linear_targets, read_architecture
from engine.cli import main
from engine.config import RunConfig, read_config, require_supported
from engine.errors import UserError
from engine.hardware import assume
from engine.plan import Place, best_device, estimate
from engine.plan.layout import layout_of
from engine.plan.memory import cards_needed

FOLDER = Path(__file__).parents[2] / "presets" / "recipes"
MINISTRAL = {"qlora-text", "qlora-think", "qlora-vision", "lora", "full"}
NAMES = {
    "mistral-medium-3.5": {
        *("qlora-text", "qlora-vision", "lora", "full-vision-64gpu", "medpix-64gpu")
    },
    "mistral-small-4": {
        *("qlora-text", "qlora-text-experts", "qlora-vision", "full-text", "full-vision")
    },
    "magistral-small-2506": {"qlora-text", "full"},
    "magistral-small-2507": {"qlora-think", "full"},
    "magistral-small-2509": {"qlora-vision", "full"},
    **{f"ministral-3-{size}": MINISTRAL for size in ("3b", "8b", "14b")},
}
RECIPES = sorted(path for path in FOLDER.glob("*/*.yml") if path.parent.name != "demo-tiny")
AXOLOTL_KEYS = {
    *("base_model", "tokenizer_use_mistral_common", "processor_type", "datasets", "val_set_size"),
    *("chat_template_kwargs", "skip_prepare_dataset", "remove_unused_columns", "sample_packing"),
    *("adapter", "load_in_4bit", "quantize_moe_experts", "lora_r", "lora_alpha", "lora_dropout"),
    *("lora_target_linear", "lora_target_modules", "lora_target_parameters", "lora_mlp_kernel"),
    *("lora_qkv_kernel", "lora_o_kernel", "unfrozen_parameters", "sequence_len", "num_epochs"),
    *("micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "optimizer"),
    *("gradient_checkpointing_kwargs", "learning_rate", "lr_scheduler", "warmup_ratio", "bf16"),
    *("weight_decay", "max_grad_norm", "plugins", "fsdp_version", "fsdp_config", "dp_shard_size"),
    *("evals_per_epoch", "saves_per_epoch", "save_total_limit", "seed", "attn_implementation"),
}
FSDP2_KEYS = {
    *("offload_params", "cpu_ram_efficient_loading", "state_dict_type", "auto_wrap_policy"),
    *("transformer_layer_cls_to_wrap", "reshard_after_forward"),
}
DATASET_KEYS = {"path", "type", "field_messages", "message_property_mappings"}
LAYERS = {
    "mistral": "MistralDecoderLayer",
    "ministral3": "Ministral3DecoderLayer",
    "mistral4": "Mistral4DecoderLayer",
}
NOT_FOR_AXOLOTL = {"medpix-64gpu"}
"""It reads no tables of images and questions."""


def each(paths: list[Path]) -> pytest.MarkDecorator:
    names = [f"{path.parent.name}-{path.stem}" for path in paths]
    return pytest.mark.parametrize("path", paths, ids=names)


each_recipe = each(RECIPES)
each_for_axolotl = each([path for path in RECIPES if path.stem not in NOT_FOR_AXOLOTL])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDTUNNEL_RUNS", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def raw(path: Path) -> dict[str, Any]:
    content = YAML(typ="safe", pure=True).load(path.read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def test_every_model_has_its_recipes() -> None:
    found: dict[str, set[str]] = {}
    for path in RECIPES:
        found.setdefault(path.parent.name, set()).add(path.stem)
    assert found == NAMES


def broken_by(values: dict[str, Any]) -> Iterator[str]:
    """Which of Axolotl's rules a config breaks."""
    adapter, sharded = values.get("adapter"), "fsdp_config" in values
    quantized = bool(values.get("load_in_4bit"))
    vision = "processor_type" in values
    rules = {
        "a key that Axolotl does not have": set(values) <= AXOLOTL_KEYS,
        "a dataset's key": all(set(dataset) <= DATASET_KEYS for dataset in values["datasets"]),
        "a sample of ours": not any("sample:" in one["path"] for one in values["datasets"]),
        "mistral-common renders and masks": values["tokenizer_use_mistral_common"] is True,
        "qlora and 4 bits together": (adapter == "qlora") == quantized,
        "no optimizer of bitsandbytes under FSDP2": not sharded or "bnb" not in values["optimizer"],
        "torchao's optimizer under FSDP2": sharded == (values["optimizer"] == "adamw_torch_8bit"),
        "FSDP2": values.get("fsdp_version") == (2 if sharded else None),
        "FSDP2's keys": set(values.get("fsdp_config", {})) <= FSDP2_KEYS,
        "packed rows are kept apart by a backend that can": not values["sample_packing"]
        or values.get("attn_implementation") == "flash_attention_2",
        "no 4 bits under FSDP2": not (sharded and quantized),
        "experts without dropout": "lora_target_parameters" not in values
        or values["lora_dropout"] == 0,
        "experts not as linears": not (
            values.get("quantize_moe_experts") and values.get("lora_target_linear")
        ),
        "frozen parts without reentrant checkpointing": values["gradient_checkpointing_kwargs"]
        == {"use_reentrant": False},
        "images whole": vision == (values.get("skip_prepare_dataset") is True)
        and vision == (values.get("remove_unused_columns") is False)
        and not (vision and (values["sample_packing"] or values["micro_batch_size"] > 1)),
        "full fine-tunes name no adapter": adapter or not any(key[:5] == "lora_" for key in values),
    }
    yield from (rule for rule, kept in rules.items() if not kept)


@each_for_axolotl
class TestForAxolotl:
    def test_no_rule_is_broken(self, path: Path) -> None:
        assert list(broken_by(raw(path))) == []

    def test_numbers_are_numbers_to_every_yaml_reader(self, path: Path) -> None:
        """YAML 1.1, which Axolotl reads, takes 1e-5 for a word."""
        rate = re.search(r"^learning_rate: (\S+)", path.read_text("utf-8"), re.MULTILINE)
        assert rate
        assert re.fullmatch(r"0\.\d+", rate[1])

    def test_the_base_is_a_repository_of_the_folders_model(self, path: Path) -> None:
        found = find_repository(raw(path)["base_model"])
        assert found is not None
        card, repository = found
        assert (card.name, repository.checkpoint) == (path.parent.name, "bf16")

    def test_images_go_to_models_that_see(self, path: Path) -> None:
        found = find_repository(raw(path)["base_model"])
        assert found is not None
        assert ("vision" in path.stem) == ("processor_type" in raw(path))
        assert "vision" not in path.stem or "vision" in found[0].modalities

    def test_a_wrapped_layer_is_the_models(self, path: Path) -> None:
        architecture = read_architecture(raw(path)["base_model"])
        text = architecture.config.get("text_config", architecture.config)
        wrapped = raw(path).get("fsdp_config", {}).get("transformer_layer_cls_to_wrap")
        assert wrapped in (None, LAYERS[text["model_type"]])

    def test_a_pattern_finds_all_linears_of_the_language_model_alone(self, path: Path) -> None:
        pattern = raw(path).get("lora_target_modules")
        table = read_architecture(raw(path)["base_model"]).table
        if pattern is None:
            assert "adapter" not in raw(path) or not table.counts_by_group()["vision"]
            return
        modules = {row.module for row in table.parameters}
        assert {n for n in modules if re.fullmatch(pattern, n)} == set(linear_targets(table))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"optimizer": "adamw_bnb_8bit"}, "no optimizer of bitsandbytes under FSDP2"),
        ({"fsdp_version": 1}, "FSDP2"),
        ({"fsdp_config": {"sharding_strategy": "FULL_SHARD"}}, "FSDP2's keys"),
        ({"load_in_4bit": True, "adapter": "qlora"}, "no 4 bits under FSDP2"),
        ({"sample_packing": True}, "images whole"),
        ({"sample_prompts": ["Hello"]}, "a key that Axolotl does not have"),
        ({"lora_target_parameters": ["x"], "lora_dropout": 0.05}, "experts without dropout"),
    ],
)
def test_a_broken_rule_is_seen(change: dict[str, Any], rule: str) -> None:
    values = raw(FOLDER / "mistral-medium-3.5" / "full-vision-64gpu.yml")
    assert rule in list(broken_by(values | change))


def cards_laid_out(config: RunConfig) -> int:
    """Cards that a recipe is written for, which it always says."""
    layout = layout_of(config)
    assert layout
    return layout.cards


@each_recipe
class TestHere:
    def test_nothing_in_it_is_refused(self, path: Path) -> None:
        file = read_config(path)
        assert not file.notes
        file.require_supported(sharded=True)

    def test_it_can_be_run_unless_cards_share_a_matrix(self, path: Path) -> None:
        config = read_config(path).config
        layout = layout_of(config)
        assert layout
        if layout.tensor * layout.expert == 1:
            require_supported(config)
        else:
            with pytest.raises(UserError):
                require_supported(config)

    def test_the_cards_that_it_names_hold_it(self, path: Path) -> None:
        said = re.search(r"# (One|\d+) GPUs? with (\d+) GB hold", path.read_text("utf-8"))
        assert said
        config, card = read_config(path).config, best_device(assume(f"{said[2]} GB"))
        architecture = read_architecture(config.base_model)
        count = 1 if said[1] == "One" else int(said[1])
        assert cards_laid_out(config) == count
        if count == 1:
            assert estimate(config, Place(architecture, card)).verdict == "fits"
        else:
            fewest = cards_needed(config, Place(architecture, card))
            assert fewest is not None
            assert 1 < fewest <= count

    def test_estimate_takes_it(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["estimate", str(path), "--assume", "B200", "--json"]) in (0, 3)
        printed = json.loads(capsys.readouterr().out)
        assert printed["trainable_parameters"] > 0
        assert all(printed["targets"].values())


@pytest.mark.parametrize(
    "recipe",
    [
        "ministral-3-3b/qlora-think.yml",
        "mistral-medium-3.5/full-vision-64gpu.yml",
        "mistral-small-4/qlora-text-experts.yml",
    ],
)
def test_a_dry_run_takes_a_copy_beside_the_rows(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(FOLDER / recipe, tmp_path, capsys)


@pytest.mark.slow
@each_for_axolotl
def test_a_dry_run_takes_every_recipe(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(path, tmp_path, capsys)


def dry_run(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`train --max-steps 0` on a copy of the recipe with one row beside it."""
    (folder / "data").mkdir()
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    (folder / "data" / "train.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    assert main(["train", str(copy), "--max-steps", "0"]) in (0, 3)
    said = capsys.readouterr().out
    assert said.startswith("Dry run, nothing was loaded: it would train ")
    assert "on 1 row" in said
    laid_out = cards_laid_out(read_config(path).config)
    assert (f"on {laid_out} GPUs." in said) == (laid_out != 1)
    assert not (folder / "home").exists(), "a dry run makes no run folder"

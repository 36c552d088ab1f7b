"""A whole config from a model, a device and a dataset: it can be saved and trained as it is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.catalog import find_model
from engine.cli import main
from engine.config import DatasetConfig, parse_config, require_supported, write_config
from engine.errors import UserError
from engine.hardware import listed_gpus
from engine.plan import (
    Device,
    Recommendation,
    Statistics,
    changed,
    estimate,
    make_fit,
    price_lengths,
    propose,
    recommend,
    survey,
)
from engine.plan.duration import count_steps
from engine.units import GIB, counted, gib
from tests.support.machines import MODELS, at, card, config, cpu, dataset, sized

GPUS = [gpu.name for gpu in listed_gpus()]
SMALLER = ("2 GB", "4 GB", "8 GB", "12 GB", "16 GB")
ROWS = {
    "unknown": None,
    "few": dataset(20, 30, 33),
    "some": dataset(200, 300, 700, prompts=("One?", "Two?", "Three?", "Four?")),
    "long": dataset(5000, 3000, 30_000, thinking=1000),
    "many": dataset(50_000, 900, 3000),
}
OWN = DatasetConfig(path="rows.jsonl", type="chat_template")
NEEDS_NO_REASON = {"base_model", "datasets", "test_datasets"}


def advised(name: str, device: Device | str, rows: Any = None, **fixed: Any) -> Recommendation:
    return recommend(at(name, device, rows), dataset=OWN if rows else None, fixed=fixed)


def check(name: str, device: Device | str, rows: Any) -> Recommendation:
    advice = advised(name, device, rows)
    assert not set(advice.config.file_values()) - NEEDS_NO_REASON - set(advice.reasons)
    assert all(advice.reasons.values())
    if advice.not_trained is None:
        require_supported(advice.config)
    if advice.estimate.verdict != "fits":
        rungs = make_fit(advice.config, at(name, device, rows))
        assert not rungs or rungs[-1].estimate.verdict != "fits"
    return advice


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", ["unknown", "some"])
def test_every_known_gpu_gets_a_config_no_worse_than_it_need_be(name: str, rows: str) -> None:
    for gpu in (*GPUS, *SMALLER):
        check(name, gpu, ROWS[rows])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "device",
    [cpu(2), cpu(32), sized(1.9), sized(11.4), card("RTX 4090"), card("H100")],
    ids=lambda device: f"{device.name} {device.can_give_bytes / GIB:.1f}",
)
def test_any_dataset_gets_one_read_back_with_its_reasons(rows: str, device: Device) -> None:
    for name in ("demo-tiny", "ministral-3-3b", "ministral-3-14b", "mistral-medium-3.5"):
        advice = check(name, device, ROWS[rows])
    text = write_config(advice.config, advice.reasons)
    again = parse_config(text).config
    assert again.file_values() == advice.config.file_values()
    assert advice.reasons["learning_rate"] in " ".join(text.replace("\n# ", " ").split())


class TestWhatMemoryDecides:
    def test_the_method_is_lora_where_it_fits_and_else_qlora(self) -> None:
        large, small = (advised("ministral-3-14b", name) for name in ("H100", "RTX 4090"))
        assert (large.config.adapter, large.config.load_in_4bit) == ("lora", False)
        assert (small.config.adapter, small.config.load_in_4bit) == ("qlora", True)
        assert small.estimate.verdict == large.estimate.verdict == "fits"
        assert "16-bit weights would need" in small.reasons["adapter"]
        assert "22.8 GiB" in small.reasons["adapter"]
        assert "4-bit weights would save" in large.reasons["adapter"]

    def test_values_grow_only_while_the_plan_still_fits(self) -> None:
        plans = [advised("magistral-small-2509", sized(size)) for size in (16, 18, 20, 24, 40, 80)]
        batches = [p.config.micro_batch_size * p.config.sequence_len for p in plans]
        assert batches == sorted(batches)
        assert [p.config.lora_r for p in plans] == sorted(p.config.lora_r for p in plans)

    def test_the_exact_optimizer_is_kept_where_it_fits(self) -> None:
        plans = [advised("ministral-3-3b", device) for device in ("H100", cpu(64))]
        assert {p.config.optimizer for p in plans} == {"adamw_torch_fused"}

    def test_layers_are_computed_again_only_where_there_is_no_room_to_keep_them(self) -> None:
        plans = [advised("ministral-3-8b", sized(size)) for size in (75, 36, 26, 21)]
        configs = [each.config for each in plans]
        again = [each.checkpointed_layers or 34 * each.gradient_checkpointing for each in configs]
        assert again[0] == 0 < again[1] < again[2] < 34
        assert again[3] == 34
        paces = [p.tokens_per_second for p in plans]
        assert {p.estimate.verdict for p in plans} == {"fits"}
        assert "every layer computed once: about 4" in plans[0].reasons["gradient_checkpointing"]
        assert "all computed twice need" in plans[1].reasons["gradient_checkpointing"]
        assert plans[1].config.micro_batch_size * plans[1].config.sequence_len == 4096
        assert paces == [None] * 4, "a card by its memory alone has no data sheet"
        once, twice = (
            advised("ministral-3-8b", "H100", **keys).tokens_per_second or 0
            for keys in ({}, {"gradient_checkpointing": True})
        )
        assert once > 1.4 * twice > 0

    def test_this_computers_own_memory_is_not_filled_with_layers(self) -> None:
        assert advised("ministral-3-3b", cpu(400)).config.gradient_checkpointing

    def test_one_card_of_several_is_written_as_one(self) -> None:
        """A config without a number is trained on all cards that there are."""
        device = card("RTX 4090 x4")
        found = advised("ministral-3-3b", device, ROWS["few"])
        assert (found.estimate.cards, found.config.dp_replicate_size) == (1, 1)
        assert "few updates" in found.reasons["dp_replicate_size"]
        picked = replace(device, others=(), unused=3)
        assert advised("ministral-3-3b", picked, ROWS["many"]).config.dp_replicate_size == 1
        assert advised("ministral-3-3b", card("RTX 4090")).config.dp_replicate_size is None

    def test_cards_share_a_copy_before_each_waits_for_weights_in_memory_not_counted(self) -> None:
        device = card("RTX 4090 x4")
        for rows in (None, ROWS["few"]):
            shared = advised("mistral-small-4", device, rows).config
            assert (shared.dp_shard_size, bool(shared.layer_offloading)) == (4, False)
        counted_memory = replace(device, ram_bytes=1024 * GIB)
        assert advised("mistral-small-4", counted_memory).config.dp_replicate_size == 4

    def test_a_longer_method_says_that_its_layers_are_computed_again(self) -> None:
        advice = advised("ministral-3-8b", "H200")
        assert advice.config.gradient_checkpointing is False
        (full,) = [other for other in advice.alternatives if other.name == "full"]
        assert full.estimate.verdict == "fits"
        assert full.changes["gradient_checkpointing"] is True
        assert "with gradient_checkpointing" in full.trade

    def test_what_would_only_be_tight_is_made_to_fit(self) -> None:
        advice = advised("mistral-medium-3.5", "80 GB", ROWS["long"])
        assert advice.estimate.verdict == "fits"
        assert advice.config.offload_embeddings
        assert "without it" in advice.reasons["offload_embeddings"]
        assert advice.offloads

    def test_no_row_is_left_out_while_something_can_be_offloaded(self) -> None:
        advice = advised("magistral-small-2509", "RTX 4090", dataset(500, 300, 9000))
        assert advice.config.sequence_len == 16_384
        assert advice.estimate.verdict == "fits"
        assert advice.config.activation_offloading

    def test_experts_are_planned_in_4_bit_with_what_that_needs(self) -> None:
        advice = advised("mistral-small-4", "H200")
        assert advice.config.quantize_moe_experts
        assert not advice.config.lora_target_linear
        assert "o_proj" in advice.config.lora_target_modules
        assert advice.not_trained is None
        needed = float(advice.reasons["load_in_4bit"].split("bits: ")[1].split()[0])
        assert needed < 100

    def test_attention_that_the_trainer_takes_by_itself_is_reported_and_not_written(self) -> None:
        here = replace(card("RTX 4090"), planned=False, stack={"torch": "2.13.0"})
        advice = advised("ministral-3-3b", here)
        assert advice.config.attn_implementation is None
        assert advice.attention.backend == "flash_attention_torch"


class TestWhatTheRowsDecide:
    """Statistics -> values."""

    @staticmethod
    def on_a_card(rows: Statistics | None, **fixed: object) -> Recommendation:
        return advised("ministral-3-3b", "H100", rows, **fixed)

    @pytest.mark.parametrize(
        ("longest", "length"),
        [(10, 1024), (1024, 1024), (1025, 2048), (3000, 4096), (30_000, 32_768)],
    )
    def test_a_sequence_holds_the_longest_row(self, longest: int, length: int) -> None:
        advice = self.on_a_card(dataset(200, min(longest, 300), longest))
        assert advice.config.sequence_len == length
        assert f"{longest:,} tokens, so none is left out" in advice.reasons["sequence_len"]

    def test_a_sequence_is_no_longer_than_the_model_reads(self) -> None:
        most = find_model("magistral-small-2506").context_tokens
        advice = advised("magistral-small-2506", sized(10_000), dataset(200, 300, 3 * most))
        assert advice.config.sequence_len == most
        assert "the model reads no more" in advice.reasons["sequence_len"]

    def test_a_sequence_that_does_not_fit_says_what_it_costs(self) -> None:
        rows = dataset(500, 300, 90_000)
        advice = advised("magistral-small-2509", "RTX 4090", rows)
        assert advice.config.sequence_len < 90_000
        assert "of 500 rows are longer and left out" in advice.reasons["sequence_len"]

    def test_one_odd_row_decides_no_length(self) -> None:
        rows = replace(dataset(500, 300, 1100), longest_tokens=9000, longest_row=77)
        rows = replace(rows, longest_rows=(9000, *rows.longest_rows[1:]))
        advice = self.on_a_card(rows)
        assert advice.config.sequence_len == 2048
        reason = advice.reasons["sequence_len"]
        assert "99 in 100 rows" in reason
        assert "row 77 9,000; 1 of 500 rows are longer and left out" in reason

    @pytest.mark.parametrize(("goal", "length"), [("text", 2048), ("tools", 4096), ("think", 8192)])
    def test_unknown_rows_have_the_usual_length_of_their_goal(self, goal: Any, length: int) -> None:
        advice = recommend(at("ministral-3-3b", "H100"), goal=goal)
        assert advice.config.sequence_len == length

    def test_a_long_epoch_is_saved_more_often(self) -> None:
        short, long = self.on_a_card(ROWS["some"]), self.on_a_card(dataset(150_000, 3000, 9000))
        assert short.config.saves_per_epoch == 2
        assert long.config.saves_per_epoch == long.config.evals_per_epoch == 8
        assert "minutes at most" in long.reasons["saves_per_epoch"]
        assert long.config.load_best_model_at_end

    def test_steps_duration_and_price_follow_from_rows_and_card(self) -> None:
        advice = self.on_a_card(ROWS["many"])
        assert advice.duration
        assert advice.duration.steps > 100
        trained = ROWS["many"].total_tokens * 0.95
        seconds = trained / advice.duration.tokens_per_second
        assert advice.duration.seconds == pytest.approx(seconds, rel=0.05)
        assert advice.duration.usd == pytest.approx(advice.duration.seconds / 3600 * 3.0)
        assert advised("ministral-3-3b", sized(24), ROWS["many"]).duration is None

    def test_uneven_rows_share_a_sequence(self) -> None:
        uneven, even = self.on_a_card(dataset(200, 300, 1200)), self.on_a_card(dataset(200, 30, 33))
        assert uneven.config.sample_packing
        assert uneven.reasons["sample_packing"] == "padding would waste 75% of a batch"
        assert not even.config.sample_packing
        assert "nearly one length" in even.reasons["sample_packing"]

    @pytest.mark.parametrize(
        ("rows", "epochs"), [(20, 3), (999, 3), (1000, 2), (9999, 2), (10_000, 1)]
    )
    def test_more_rows_need_fewer_passes(self, rows: int, epochs: int) -> None:
        advice = self.on_a_card(dataset(rows, 300, 700))
        assert advice.config.num_epochs == epochs
        assert f"{rows:,} rows" in advice.reasons["num_epochs"]

    @pytest.mark.parametrize(
        ("rows", "share", "held"), [(39, 0, "too few"), (40, 0.1, "4 rows"), (1000, 0.05, "50 ")]
    )
    def test_rows_are_held_out_where_enough(self, rows: int, share: float, held: str) -> None:
        advice = self.on_a_card(dataset(rows, 300, 700))
        assert advice.config.val_set_size == share
        assert held in advice.reasons["val_set_size"]

    @pytest.mark.parametrize("rows", ["some", "long", "many"])
    def test_a_step_is_small_enough_for_the_rate_to_fall(self, rows: str) -> None:
        known = ROWS[rows]
        assert known is not None
        advice = self.on_a_card(known)
        tokens = advice.config.gradient_accumulation_steps * advice.estimate.tokens_at_once
        assert tokens <= 32_768
        updates = known.total_tokens / tokens
        assert updates >= 30 or advice.config.gradient_accumulation_steps == 1
        steps = count_steps(advice.config.model_copy(update={"num_epochs": 1}), known)
        assert steps
        assert steps == pytest.approx(updates * (1 - advice.config.val_set_size), rel=0.05, abs=1)
        reason = advice.reasons["gradient_accumulation_steps"]
        assert reason == f"{counted(steps, 'update')} an epoch"

    def test_its_questions_are_asked_before_during_and_after(self) -> None:
        assert self.on_a_card(ROWS["some"]).config.sample_prompts == ("One?", "Two?", "Three?")
        assert not self.on_a_card(ROWS["few"]).config.sample_prompts

    def test_thinking_in_the_rows_is_learned(self) -> None:
        assert self.on_a_card(ROWS["long"]).config.train_on_thinking
        assert "1,000 tokens" in self.on_a_card(ROWS["long"]).reasons["train_on_thinking"]


CHOSEN: dict[str, tuple[Any, ...]] = {
    "lora_r": (64, 32),
    "lora_alpha": (7,),
    "adapter": ("lora", "qlora", None),
    "load_in_4bit": (True, False),
    "unfrozen_parameters": (["lm_head"],),
    "sequence_len": (512, 65_536),
    "sample_packing": (False,),
    "micro_batch_size": (64,),
    "gradient_checkpointing": (False, True),
    "optimizer": ("paged_adamw_8bit",),
    "learning_rate": (2e-4,),
    "lora_target_modules": (["q_proj"],),
    "warmup_steps": (4,),
    "warmup_ratio": (0.2,),
    "save_steps": (3,),
    "save_strategy": ("epoch",),
    "eval_steps": (4,),
    "evals_per_epoch": (4,),
    "eval_strategy": ("epoch",),
    "val_set_size": (0, 0.3),
    "test_datasets": ((OWN,),),
    "max_steps": (5,),
    "bf16": (False,),
    "attn_implementation": ("eager",),
}


class TestWhatThePersonChose:
    """Fixed values are kept, and the rest goes around them."""

    @pytest.mark.parametrize(
        "fixed",
        [
            *({key: value} for key, values in CHOSEN.items() for value in values),
            {"adapter": None, "load_in_4bit": False, "lora_target_linear": False},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("rows", ["unknown", "few", "some"])
    @pytest.mark.parametrize("name", ["ministral-3-3b", "demo-tiny"])
    def test_it_is_kept_and_says_so(self, fixed: dict[str, Any], rows: str, name: str) -> None:
        advice = advised(name, "RTX 4090", ROWS[rows], **fixed)
        for key, value in fixed.items():
            assert getattr(advice.config, key) == value
            assert advice.reasons[key].startswith("yours")
        assert not set(advice.config.file_values()) - NEEDS_NO_REASON - set(advice.reasons)

    def test_its_reason_names_what_would_be_recommended_and_why(self) -> None:
        plain = advised("ministral-3-3b", "RTX 4090")
        for key, value in (("lora_r", 64), ("micro_batch_size", 1), ("adapter", "qlora")):
            own = advised("ministral-3-3b", "RTX 4090", **{key: value})
            advice = f"{getattr(plain.config, key)}: {plain.reasons[key]}"
            assert own.reasons[key] == f"yours (recommended {advice})"
        same = advised("ministral-3-3b", "RTX 4090", lora_r=32)
        assert same.reasons["lora_r"] == f"yours, as recommended: {plain.reasons['lora_r']}"

    def test_only_the_modules_that_were_chosen_get_an_adapter(self) -> None:
        advice = advised("ministral-3-3b", "RTX 4090", lora_target_modules=["q_proj"])
        assert advice.estimate.targets == {"q_proj": 26}

    def test_nothing_that_was_chosen_is_given_up_to_fit(self) -> None:
        fixed: dict[str, Any] = {"adapter": "lora", "lora_r": 128, "sequence_len": 4096}
        advice = advised("magistral-small-2509", "RTX 4090", **fixed)
        assert advice.estimate.verdict == "does not fit"
        assert (advice.config.adapter, advice.config.lora_r) == ("lora", 128)

    def test_layers_are_offloaded_unasked_only_where_the_model_cannot_do_without(self) -> None:
        alone = advised("mistral-medium-3.5", "RTX 4090")
        changed = advised("mistral-medium-3.5", "RTX 4090", lora_r=8)
        assert alone.config.layer_offloading
        assert changed.config.layer_offloading
        assert changed.estimate.verdict == alone.estimate.verdict == "fits"

    @pytest.mark.parametrize(
        ("fixed", "why"),
        [
            ({"adapter": "qlora", "load_in_4bit": False}, "without load_in_4bit"),
            ({"adapter": "lora", "load_in_4bit": True}, "load_in_4bit is true"),
            ({"adapter": None, "load_in_4bit": True}, "there is no adapter"),
            ({"adapter": "lora", "lora_target_linear": False}, "nothing gets one"),
            ({"warmup_steps": 3, "warmup_ratio": 0.1}, "both set"),
            ({"unfrozen_parameters": ["lm_head"], "adapter": "lora"}, "with an adapter"),
        ],
        ids=str,
    )
    def test_a_contradiction_is_a_sentence(self, fixed: dict[str, Any], why: str) -> None:
        with pytest.raises(UserError, match="contradict each other") as caught:
            advised("ministral-3-3b", "RTX 4090", **fixed)
        assert why in caught.value.why

    def test_a_target_that_matches_nothing_is_refused(self) -> None:
        with pytest.raises(UserError, match="matches no module"):
            advised("ministral-3-3b", "RTX 4090", lora_target_modules=["query"])


class TestGoals:
    @pytest.mark.parametrize(
        ("name", "goal", "why"),
        [
            ("magistral-small-2507", "vision", "reads no images"),
            ("mistral-small-3.2", "think", "does not think"),
        ],
    )
    def test_a_goal_that_cannot_be_met_is_refused(self, name: str, goal: Any, why: str) -> None:
        with pytest.raises(UserError, match=why):
            recommend(at(name, "H100"), goal=goal)

    def test_images_get_room_for_the_largest_and_no_flash_attention_4(self) -> None:
        place = at("ministral-3-3b", "H100")
        text, seen = (recommend(place, goal=goal) for goal in ("text", "vision"))
        assert (text.config.sequence_len, seen.config.sequence_len) == (2048, 4096)
        assert "3,080 tokens" in seen.reasons["sequence_len"]
        assert seen.config.processor_type == "AutoProcessor"
        assert seen.attention.backend != "flash_attention_4"
        assert seen.estimate.uncertainty == pytest.approx(0.15, abs=1e-6)
        assert text.estimate.uncertainty < 0.15

    def test_a_model_that_thinks_on_request_is_asked_to(self) -> None:
        advice = recommend(at("mistral-small-4", "H200"), goal="think")
        assert advice.config.chat_template_kwargs == {"reasoning_effort": "high"}
        assert not recommend(at("mistral-small-4", "H200")).config.chat_template_kwargs
        assert recommend(at("magistral-small-2509", "H100"), goal="think")

    @pytest.mark.parametrize("goal", ["text", "tools"])
    @pytest.mark.parametrize("name", MODELS)
    def test_text_and_tools_suit_every_model(self, name: str, goal: Any) -> None:
        assert recommend(at(name, "H100"), goal=goal)


class TestReasonsAreTrue:
    """What a reason says is what the plan counts."""

    @pytest.mark.parametrize("rows", [40, 57, 180, 200])
    def test_updates_of_an_epoch_are_the_steps_of_the_run(self, rows: int) -> None:
        advice = advised("demo-tiny", cpu(8), dataset(rows, 30, 33))
        assert advice.duration is None
        steps = count_steps(advice.config, dataset(rows, 30, 33))
        assert steps
        updates = int(advice.reasons["gradient_accumulation_steps"].split()[0])
        assert steps == updates * advice.config.num_epochs

    @pytest.mark.parametrize(
        ("rows", "key", "reason"),
        [
            (4, "gradient_accumulation_steps", "1 update an epoch"),
            (2, "micro_batch_size", "all 2 rows at once"),
        ],
    )
    def test_few_rows_are_said_as_few(self, rows: int, key: str, reason: str) -> None:
        assert advised("demo-tiny", cpu(8), dataset(rows, 30, 33)).reasons[key] == reason

    @pytest.mark.parametrize("rows", [40, 57, 200])
    def test_no_reason_of_a_recipe_names_the_rows_of_another_dataset(self, rows: int) -> None:
        advice = advised("demo-tiny", cpu(8), dataset(rows, 30, 33))
        assert not any("104" in reason for reason in advice.reasons.values())

    @pytest.mark.parametrize("device", [cpu(8), card("H100"), card("RTX 4090"), sized(4)])
    def test_a_size_that_would_need_more_does_not_fit(self, device: Device) -> None:
        for name in ("demo-tiny", "ministral-3-3b"):
            advice = advised(name, device, ROWS["some"])
            reason, micro = advice.reasons["micro_batch_size"], advice.config.micro_batch_size
            if "would need" in reason:
                twice = advice.config.model_copy(update={"micro_batch_size": 2 * micro})
                needs = estimate(twice, at(name, device, ROWS["some"]))
                assert needs.verdict != "fits"
                assert reason == f"{2 * micro} would need {gib(needs.device_bytes)}"
            else:
                assert "busy" in reason or f"{2 * micro} would fit too" in reason

    def test_a_step_of_more_rows_than_there_are_takes_no_longer_than_a_pass(self) -> None:
        rows = dataset(88, 30, 33)
        durations = [
            advised("ministral-3-3b", "H100", rows, gradient_accumulation_steps=number).duration
            for number in (1, 64)
        ]
        one, many = durations
        assert one
        assert many
        assert many.steps < one.steps
        assert many.seconds == pytest.approx(one.seconds, rel=0.3)


class TestRecipes:
    """The model that is made here comes with a recipe that was tried."""

    def test_without_a_dataset_the_recipe_is_followed_whole(self) -> None:
        advice = recommend(at("demo-tiny", cpu(8)))
        config = advice.config
        assert (config.learning_rate, config.max_steps, config.lora_alpha) == (0.005, 150, 32)
        assert len(config.datasets) == 1
        assert len(config.test_datasets) == 2
        assert advice.reasons["lora_alpha"] == "a scale of 2 at rank 16"

    def test_another_dataset_keeps_what_suits_the_model_and_gives_the_lengths(self) -> None:
        advice = recommend(at("demo-tiny", cpu(8), dataset(60, 300, 700)), dataset=OWN)
        config = advice.config
        assert (config.learning_rate, config.lora_alpha, config.bf16) == (0.005, 32, False)
        assert (config.sequence_len, config.max_steps) == (1024, None)
        assert config.datasets == (OWN,)
        assert config.test_datasets == ()

    def test_rows_that_a_person_holds_out_replace_the_recipes(self) -> None:
        config = advised("demo-tiny", cpu(8), val_set_size=0.2).config
        assert (config.val_set_size, config.test_datasets) == (0.2, ())

    @pytest.mark.parametrize(
        ("name", "fixed", "rate"),
        [
            ("ministral-3-3b", {}, 2e-4),
            ("mistral-medium-3.5", {}, 1e-4),  # above 70B half of it
            ("ministral-3-3b", {"adapter": None}, 2e-5),  # whole weights: a tenth
        ],
    )
    def test_a_downloaded_model_has_no_recipe_and_a_rate_by_size_and_method(
        self, name: str, fixed: dict[str, Any], rate: float
    ) -> None:
        chosen = advised(name, "H200", **fixed).config
        assert (chosen.learning_rate, chosen.max_steps) == (rate, None)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (card("RTX 4090"), "magistral-small-2509"),
        (card("24 GB"), "magistral-small-2509"),
        (card("H100"), "mistral-small-4"),
        (card("16 GB"), "ministral-3-14b"),
        (card("8 GB"), "ministral-3-3b"),
        (cpu(4), "demo-tiny"),  # the one that is made here
        (cpu(1000), "demo-tiny"),
        (sized(0.1), "demo-tiny"),  # nothing fits: the smallest
        (sized(10_000), "mistral-medium-3.5"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_the_largest_model_that_fits_is_proposed(device: Device, name: str) -> None:
    assert propose(survey(device), device).card.name == name


def test_every_model_of_the_catalog_can_be_trained_where_there_is_room() -> None:
    prospects = survey(sized(10_000))
    assert not any(p.plan.not_trained for p in prospects)
    assert all(p.plan.estimate.verdict == "fits" for p in prospects)


def test_every_model_is_planned_and_the_smallest_comes_first() -> None:
    prospects = survey(card("RTX 4090"))
    sizes = [p.plan.estimate.total_parameters for p in prospects]
    assert sizes == sorted(sizes)
    assert {p.card.name for p in prospects} == {*MODELS} - {"demo-tiny-vision"}, (
        "that one is its demo's alone"
    )


QLORA = {
    "adapter": "qlora",
    "sequence_len": 2048,
    "sample_packing": True,
    "gradient_checkpointing": True,
}


@pytest.mark.parametrize("name", MODELS)
def test_prices_reach_the_context_and_grow_with_the_length(name: str) -> None:
    keys = QLORA if name != "mistral-small-4" else QLORA | {"quantize_moe_experts": True}
    if name == "mistral-small-4":
        keys |= {"lora_target_modules": ["o_proj"]}
    prices = price_lengths(config(**keys), at(name, "H200"))
    assert prices[-1].sequence_len == find_model(name).context_tokens
    needed = [price.device_bytes for price in prices]
    assert needed == sorted(needed)
    for price in prices:
        if price.verdict == "fits":
            assert price.fitting_bytes == price.device_bytes
            assert price.changes == ()
        elif price.fitting_bytes is not None:
            assert price.fitting_bytes < price.device_bytes
            assert price.changes


def test_a_price_is_the_estimate_of_that_length() -> None:
    run = config(**QLORA, micro_batch_size=4)
    prices = price_lengths(run, at("ministral-3-8b", "RTX 4090"))
    one = changed(run, {"micro_batch_size": 1, "sequence_len": 16_384})
    (price,) = [price for price in prices if price.sequence_len == 16_384]
    needs = estimate(one, at("ministral-3-8b", "RTX 4090"))
    assert (price.device_bytes, price.verdict) == (needs.device_bytes, needs.verdict)


def test_the_command_says_a_row_is_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yml"
    file.write_text("base_model: ministral-3-3b\nadapter: lora\n", "utf-8")
    assert main(["estimate", str(file), "--lengths", "--assume", "H100 80GB"]) == 0
    out = capfd.readouterr().out
    assert "262,144" in out
    assert "A row has to fit on one card" in out
    assert main(["estimate", str(file), "--lengths", "--assume", "H100 80GB", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)["lengths"]
    assert printed[0].keys() >= {"sequence_len", "device_bytes", "verdict", "tokens_per_second"}

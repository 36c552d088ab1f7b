"""`fit`: the measured peak against the formula, what is measured, and where memory runs out."""

import gc
import math
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from engine.catalog import list_models, read_architecture
from engine.catalog.rows import module_table
from engine.chat.render import IGNORED_LABEL
from engine.config import RunConfig, write_config
from engine.errors import UserError
from engine.hardware import GpuProcess, Machine, assume
from engine.plan import Place, estimate
from engine.plan.trainer import IMAGE_TOKEN
from engine.runs import RunFolder
from engine.train.batches import PAD, Rows
from engine.train.fitcheck import CpuPeakMemory, check, used_by_process
from engine.train.model import build_empty, load_base
from engine.train.stand_in import (
    DrawnTensor,
    as_it_is,
    count_rows,
    draw_weights,
    heaviest_step,
    reduce_for_cpu,
    shrink,
    synthetic_step,
)
from tests.support.live_bytes import LiveBytes
from tests.support.machines import cpu
from tests.support.pictured_rows import MIXED, seeing, write_pictured
from tests.support.tiny import MINISTRAL3, WIDE, describe, settings, with_vision

PACKED = {"sequence_len": 512, "sample_packing": True, "gradient_accumulation_steps": 2}
LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 16}
QLORA = LORA | {"adapter": "qlora", "load_in_4bit": True}
CHECKPOINTED = {"gradient_checkpointing": True}
MIB = 2**20


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `leave_hub` switches off comes back after the test."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return describe(tmp_path_factory.mktemp("wide") / "model", WIDE)


def measure(folder: Path, config: RunConfig, steps: int = 2) -> list[Mapping[str, Any]]:
    """All that a measurement emits, its record last."""
    folder.mkdir()
    write_config(config, {}, folder / "config.yml")
    found: list[Mapping[str, Any]] = []
    check(RunFolder(folder), steps, found.append)
    return found


@contextmanager
def memory_at_most(more_bytes: int) -> Iterator[None]:
    """Inside, the system gives this process no more than so much beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora, checkpointed": LORA | CHECKPOINTED,
    "lora, one row a sequence": LORA | {"sample_packing": False},
    "lora, rank 64": LORA | CHECKPOINTED | {"lora_r": 64},
    "lora, 8-bit states": LORA | {"optimizer": "adamw_bnb_8bit"},
    "qlora": QLORA,
    "qlora, checkpointed": QLORA | CHECKPOINTED,
    "full": {},
    "full, checkpointed": CHECKPOINTED,
    "full, one pass a step": {"gradient_accumulation_steps": 1},
}
RARE = ("qlora", "lora, one row a sequence", "lora, rank 64", "lora, 8-bit states")


class TestTheFormula:
    @pytest.mark.parametrize(
        "keys",
        [
            pytest.param(keys, id=name, marks=pytest.mark.slow if name in RARE else ())
            for name, keys in METHODS.items()
        ],
    )
    def test_measured_peak_is_near(self, wide: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
        config = settings(wide, **PACKED | {"micro_batch_size": 2} | keys)
        fitted = measure(tmp_path / "run", config)[-1]["fitted"]
        formula = estimate(config, Place(read_architecture(wide), cpu()))
        steps = max(formula.moments[name] for name in ("backward pass", "loss", "optimizer step"))
        assert fitted["measurement"]["formula_bytes"] == steps
        assert fitted["measurement"]["peak_allocated_bytes"] == pytest.approx(steps, rel=0.1)
        # Random weights of unit scale guess: some half a nat beyond an even guess.
        assert all(0 < loss - math.log(4096) < 1.5 for loss in fitted["losses"])
        assert fitted["whole"]

    @pytest.mark.parametrize("keys", [{}, CHECKPOINTED], ids=["", "checkpointed"])
    def test_packed_rows_take_the_counted_masks(self, tmp_path: Path, keys: dict[str, Any]) -> None:
        folder = describe(tmp_path / "model", MINISTRAL3)  # narrow: the masks are the most of it
        measured, planned = [], []
        for packed in (True, False):
            own = LORA | keys | {"sequence_len": 2048, "sample_packing": packed}
            fitted = measure(tmp_path / str(packed), settings(folder, **own), steps=1)[-1]["fitted"]
            measured.append(fitted["measurement"]["peak_allocated_bytes"])
            planned.append(fitted["measurement"]["formula_bytes"])
        assert measured[0] - measured[1] == pytest.approx(planned[0] - planned[1], rel=0.1)

    def test_image_larger_than_a_towers_group(self, tmp_path: Path) -> None:
        sides = 80  # 6,400 patches: in float32 their mask takes 156 MiB, that of 4,096 ones 64
        content = seeing(WIDE, image_size=14 * sides)
        folder = describe(tmp_path / "tower", content)
        config = settings(
            folder,
            processor_type="AutoProcessor",
            sequence_len=sides // 2 * (sides // 2 + 1) + 1,
            **LORA | CHECKPOINTED,
        )
        fitted = measure(tmp_path / "run", config)[-1]["fitted"]["measurement"]
        formula = estimate(config, Place(read_architecture(folder), cpu())).moments
        assert fitted["peak_allocated_bytes"] == pytest.approx(fitted["formula_bytes"], rel=0.1)
        assert formula["backward pass"] == fitted["formula_bytes"]

    @pytest.mark.slow
    def test_what_many_layers_keep_is_not_there_while_the_tower_works(self, tmp_path: Path) -> None:
        sides, layers = 66, 36  # just more than go together
        narrow = WIDE | {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
        content = seeing(narrow | {"num_hidden_layers": layers}, image_size=14 * sides)
        folder = describe(tmp_path / "tower", content)
        tokens = sides // 2 * (sides // 2 + 1) + 1
        keys = LORA | CHECKPOINTED | {"gradient_accumulation_steps": 2}
        config = settings(folder, processor_type="AutoProcessor", sequence_len=tokens, **keys)
        fitted = measure(tmp_path / "run", config)[-1]["fitted"]["measurement"]
        kept = layers * tokens * 256 * 4
        assert kept > 0.15 * fitted["formula_bytes"]  # it would be seen
        assert fitted["peak_allocated_bytes"] == pytest.approx(fitted["formula_bytes"], rel=0.1)

    @pytest.mark.parametrize("vocabulary", [4096, 32768], ids=["many small", "one large"])
    def test_bfloat16_weights_updated_in_float32(self, tmp_path: Path, vocabulary: int) -> None:
        content = WIDE | {"vocab_size": vocabulary, "tie_word_embeddings": True}
        folder = describe(tmp_path / "model", content)
        config = settings(folder, bf16=True, sequence_len=64)
        fitted = measure(tmp_path / "run", config)[-1]["fitted"]
        formula = estimate(config, Place(read_architecture(folder), cpu()))
        assert formula.moments["optimizer step"] == fitted["measurement"]["formula_bytes"]
        measured = fitted["measurement"]["peak_allocated_bytes"]
        # A bound: the largest weight may come when no other is widened yet.
        assert 0.99 * measured <= formula.moments["optimizer step"] <= 1.08 * measured

    @pytest.mark.parametrize("keys", [{}, {"train_on_thinking": False}], ids=["", "answers"])
    def test_few_learned_tokens_take_few_logits(self, tmp_path: Path, keys: dict[str, Any]) -> None:
        sample = [{"path": "sample:harbour-pilot"}]
        config = settings("demo-tiny", datasets=sample, **LORA, sequence_len=256, **keys)
        fitted = measure(tmp_path / "run", config, steps=1)[-1]["fitted"]["measurement"]
        assert fitted["peak_allocated_bytes"] == pytest.approx(fitted["formula_bytes"], rel=0.1)

    def test_loading_holds_one_tensor_beside_the_model(self, wide: Path, tmp_path: Path) -> None:
        fitted = measure(tmp_path / "run", settings(wide, **LORA), steps=1)[-1]["fitted"]
        numbers = [p.count for p in read_architecture(wide).table.parameters]
        most = 4 * (sum(numbers) + max(numbers))
        assert fitted["measurement"]["load_peak_bytes"] <= most + 2 * MIB  # and the adapter

    def test_all_steps_are_emitted_as_a_run_emits_them(self, wide: Path, tmp_path: Path) -> None:
        lines = measure(tmp_path / "run", settings(wide, **LORA), steps=3)
        steps = [line for line in lines if line.get("type") == "step"]
        assert [step["step"] for step in steps] == [1, 2, 3]
        assert [line["seq"] for line in lines[:-1]] == list(range(len(lines) - 1))
        peak = lines[-1]["fitted"]["measurement"]["peak_allocated_bytes"]
        assert peak == max(step["peak_memory_bytes"] for step in steps)


Sizes = st.lists(st.tuples(st.integers(1, 2**20), st.booleans()), min_size=1, max_size=12)


class TestPeakMemory:
    @pytest.mark.slow
    @given(first=Sizes, second=Sizes)
    @hypothesis_settings(max_examples=20, deadline=None)
    def test_it_counts_every_block_over_several_pieces_of_work(
        self, first: list[tuple[int, bool]], second: list[tuple[int, bool]]
    ) -> None:
        memory, held = CpuPeakMemory(), list[torch.Tensor]()
        live = 0
        for name, blocks in (("first", first), ("second", second)):
            peak = live
            with memory.measure(name):
                for size, drops in blocks:
                    held.append(torch.empty(size, dtype=torch.uint8))
                    live += size
                    peak = max(peak, live)
                    if drops:
                        live -= held.pop(0).nbytes
            assert memory.peaks[name].allocated_bytes == pytest.approx(peak, abs=64 * len(blocks))

    def test_it_sees_what_a_kernel_takes_and_gives_back(self) -> None:
        logits = torch.randn(64, 4096)
        memory, seen = CpuPeakMemory(), LiveBytes()
        with memory.measure("kernel"), seen:
            torch.logsumexp(logits, -1)
        assert memory.peaks["kernel"].allocated_bytes >= logits.nbytes
        assert seen.peak < logits.nbytes / 10  # a counter of tensors does not

    def test_garbage_of_an_earlier_measurement_is_not_taken_off(self) -> None:
        with CpuPeakMemory().measure("earlier"):  # torch knows the size of what it saw taken
            circle: list[object] = [torch.empty(MIB, dtype=torch.uint8)]
            circle.append(circle)
            del circle
        memory = CpuPeakMemory()
        with memory.measure("work"):
            gc.collect()
            torch.empty(MIB, dtype=torch.uint8)
        assert memory.peaks["work"].allocated_bytes == MIB

    def test_the_peak_of_what_fails_is_kept(self) -> None:
        memory = CpuPeakMemory()
        with pytest.raises(RuntimeError), memory.measure("failed"):
            torch.empty(MIB, dtype=torch.uint8).view(3)
        assert memory.peaks["failed"].allocated_bytes == MIB

    def test_a_card_is_asked_what_the_process_takes_and_else_what_it_lost(self) -> None:
        card = replace(assume("RTX 4090").gpus[0], uuid="GPU-aaaa-1")
        idle = replace(assume("RTX 4090"), gpus=(replace(card, memory_used_bytes=3 * MIB),))

        def now(*processes: GpuProcess) -> Machine:
            taken = replace(card, memory_used_bytes=10 * MIB, processes=processes)
            return replace(idle, gpus=(taken,))

        named = now(GpuProcess(7, 5 * MIB, None, None), GpuProcess(8, 6 * MIB, None, None))
        assert used_by_process(idle, named, "aaaa-1", 8) == 6 * MIB
        silent = now(GpuProcess(8, None, None, None))
        assert used_by_process(idle, silent, "aaaa-1", 8) == 7 * MIB
        assert used_by_process(idle, named, "bbbb-2", 8) is None

    def test_the_process_has_taken_more_than_its_tensors(self) -> None:
        taken = CpuPeakMemory().device_bytes()
        assert taken is not None
        assert taken > 100 * MIB  # torch alone


class TestWeights:
    def test_a_drawn_model_is_held_as_a_loaded_one(self, any_model: Path) -> None:
        experts = {"quantize_moe_experts": True, "lora_target_modules": ["o_proj"]}
        config = settings(any_model, **QLORA, **experts)
        drawn = draw_weights(read_architecture(any_model), torch.float32, torch.device("cpu"), 0)
        made = load_base(any_model, config, tensors=drawn).report
        read = load_base(any_model, config).report
        assert (made.weights, made.held_bytes) == (read.weights, read.held_bytes)

    def test_numbers_repeat_and_differ_by_name_expert_and_seed(self) -> None:
        def draw(name: str = "w", seed: int = 0, index: int | None = 0) -> torch.Tensor:
            make = DrawnTensor(
                Path("none"), name, (2, 64, 64), "F32", torch.float32, torch.device("cpu"), seed
            )
            return make.read(index)

        assert draw().equal(draw())
        for other in (draw(name="v"), draw(seed=1), draw(index=1)):
            assert not draw().equal(other)
        assert float(draw().std()) == pytest.approx(1 / 8, rel=0.05)


class TestBatches:
    def test_packed_sequences_are_filled_up(self, uneven: Rows) -> None:
        config = settings(sample_packing=True, sequence_len=64, gradient_accumulation_steps=8)
        step = heaviest_step(uneven, config)
        assert [micro.tensors["input_ids"].shape for micro in step.micros] == [(1, 64), (1, 64)]
        tensors = step.micros[0].tensors
        assert not (tensors["input_ids"] == PAD).any()
        starts = tensors["position_ids"] == 0
        assert int(starts.sum()) > 1
        assert (tensors["labels"][starts] == IGNORED_LABEL).all()

    def test_unpacked_the_longest_rows_are_taken(self, uneven: Rows) -> None:
        step = heaviest_step(uneven, settings(micro_batch_size=2))
        (micro,) = step.micros
        assert sorted(uneven.lengths[list(micro.rows)]) == sorted(uneven.lengths)[-2:]

    def test_what_is_measured_is_what_the_plan_counts(self, uneven: Rows) -> None:
        architecture = read_architecture("demo-tiny")
        for keys in ({}, {"sample_packing": True, "sequence_len": 64}, {"micro_batch_size": 3}):
            config = settings("demo-tiny", adapter="lora", **keys)
            step = heaviest_step(uneven, config)
            place = Place(architecture, cpu(), count_rows(uneven, config))
            planned = estimate(config, place).tokens_at_once
            assert step.micros[0].tensors["input_ids"].numel() == planned

    def test_rows_with_images_weigh_their_tower_too(self, tmp_path: Path) -> None:
        rows = write_pictured(tmp_path / "rows", MIXED)
        (micro,) = heaviest_step(rows, settings(sequence_len=400)).micros
        most = max(range(len(rows)), key=lambda row: len(rows.images(row)) and rows.lengths[row])
        assert micro.rows == (most,)
        filled = heaviest_step(rows, settings(sequence_len=50, sample_packing=True)).micros[0]
        assert filled.tensors["input_ids"].shape == (1, 50)

    def test_random_rows_are_full_and_all_learned(self) -> None:
        config = settings(sample_packing=True, sequence_len=128, micro_batch_size=2)
        (micro,) = synthetic_step(read_architecture("demo-tiny"), config).micros
        assert micro.tensors["input_ids"].shape == (2, 128)
        assert int((micro.tensors["position_ids"] == 0).sum()) == 8
        assert micro.learned_tokens == 2 * 128 - 8

    def test_random_images_fill_their_sequence(self, tmp_path: Path) -> None:
        folder = describe(tmp_path / "tower", seeing(MINISTRAL3))
        config = settings(folder, processor_type="AutoProcessor", sequence_len=64)
        (micro,) = synthetic_step(read_architecture(folder), config).micros
        ids, sizes = micro.tensors["input_ids"], micro.tensors["image_sizes"]
        tokens = (sizes // 28).prod(dim=1)
        assert int((ids == IMAGE_TOKEN).sum()) == int(tokens.sum())
        assert int(tokens.sum()) > 40
        assert (micro.tensors["labels"][ids == IMAGE_TOKEN] == IGNORED_LABEL).all()


class TestReduced:
    @pytest.mark.parametrize("name", [card.name for card in list_models()])
    @pytest.mark.parametrize("factor", [1, 8, 32])
    def test_every_model_gets_smaller_and_stays_of_its_make(self, name: str, factor: int) -> None:
        architecture = read_architecture(name)
        content = shrink(architecture.config, 2, factor)
        table = module_table(content)
        assert table.class_name == architecture.class_name
        assert table.total_parameters <= architecture.table.total_parameters
        assert sum("input_layernorm" in p.name for p in table.parameters) == 2
        matrices = [p for p in table.parameters if p.quantizable]
        assert not any(math.prod(p.shape) % 64 for p in matrices)
        groups = {p.group for p in table.parameters}
        assert groups == {p.group for p in architecture.table.parameters}

    @pytest.mark.parametrize(
        "name", ["mistral-small-4", "mistral-medium-3.5", "magistral-small-2506"]
    )
    def test_transformers_builds_it(self, name: str, tmp_path: Path) -> None:
        folder = describe(tmp_path / "small", shrink(read_architecture(name).config, 2, 16))
        architecture = read_architecture(folder)
        model = build_empty(architecture, folder, torch.float32, "sdpa")
        built = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
        planned = {p.name: p.shape for p in architecture.table.parameters}
        assert {n: built[n] for n in planned} == planned

    @pytest.mark.parametrize("gibibytes", [64, 4, 2])
    def test_it_fits_this_computer_and_says_what_was_left_out(self, gibibytes: float) -> None:
        config = settings("ministral-3-3b", **LORA, sequence_len=128)
        architecture = read_architecture("ministral-3-3b")
        built = reduce_for_cpu(architecture, config, cpu(gibibytes), None)
        needs = estimate(config, Place(built.architecture, cpu(gibibytes)))
        assert needs.verdict != "does not fit"
        assert (built.layers, built.of_layers, built.whole) == (2, 26, False)
        assert "2 of 26 layers" in built.sentence()
        assert ("divided" in built.sentence()) == (built.factor > 1)
        assert "checks the formula" in built.sentence()

    def test_a_small_model_is_built_as_it_is(self) -> None:
        config = settings("demo-tiny", **LORA)
        architecture = read_architecture("demo-tiny")
        assert reduce_for_cpu(architecture, config, cpu(), None) == as_it_is(architecture)

    def test_a_reduced_model_with_a_tower_is_measured_and_named(self, tmp_path: Path) -> None:
        deep = with_vision(WIDE | {"num_hidden_layers": 600})
        folder = describe(tmp_path / "deep", deep)
        lines = measure(tmp_path / "run", settings(folder, **LORA, sequence_len=64), steps=1)
        fitted = lines[-1]["fitted"]
        assert (fitted["layers"], fitted["of_layers"], fitted["whole"]) == (2, 600, False)
        assert fitted["run_seconds"] is None
        assert any("2 of 600 layers" in line.get("text", "") for line in lines)


class TestOutOfMemory:
    @pytest.mark.parametrize(
        ("vocabulary", "keys", "part"),
        [
            (131072, {}, "loading the model"),
            (4096, {"sequence_len": 4096, "micro_batch_size": 2}, "step 1"),
        ],
    )
    def test_it_says_in_which_part_and_how_much_was_held(
        self, tmp_path: Path, vocabulary: int, keys: dict[str, Any], part: str
    ) -> None:
        folder = describe(tmp_path / "model", WIDE | {"vocab_size": vocabulary})
        config = settings(folder, **LORA, **keys)
        with memory_at_most(200 * MIB), pytest.raises(UserError) as caught:
            measure(tmp_path / "run", config)
        assert caught.value.exit_status == 3
        assert caught.value.what == f"It does not fit: memory ran out in {part}."
        assert "iB were allocated at the most" in caught.value.why
        assert "micro_batch_size" in caught.value.fix

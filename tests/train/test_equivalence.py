"""One optimizer step is the same step however it is cut: packed or not, in few passes or many.

The yardstick is transformers itself, one row at a time, weighted by hand.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from engine.chat.render import Kind, LabelRule
from engine.config import RunConfig
from engine.events import Step
from engine.train.batches import Order, Rows, StepBatch, collate
from engine.train.checkpoint import export_trained, save_trained, trained_parameters
from engine.train.evaluate import learned_tokens, score
from engine.train.forward import Model, hidden_states, unwrapped
from engine.train.loop import Training
from engine.train.model import load_base
from engine.train.offload import decoder_layers
from tests.support import stock
from tests.support.fp8_checkpoints import write_fp8
from tests.support.methods import METHODS, NF4, ON_EXPERTS, Method
from tests.support.offloading import BASES, DEEP_MODELS, OFFLOADS, BeginDeep
from tests.support.stock import norm_of, stock_model, stock_step
from tests.support.tiny import (
    ARCHITECTURES,
    MakeRows,
    Models,
    assert_same,
    everything,
    gradients,
    row,
    settings,
    steps,
    training,
    wake_adapter,
)
from tests.support.written_runs import read_steps

ALL_IN_ONE_STEP = {"gradient_accumulation_steps": 64}
LAYOUTS = {
    "packed, one sequence": {"sample_packing": True, "sequence_len": 256},
    "packed, several at once": {"sample_packing": True, "sequence_len": 64, "micro_batch_size": 3},
    "one row at a time": {"micro_batch_size": 1},
    "padded together": {"micro_batch_size": 8},
}


def first_step(config: RunConfig, rows: Rows) -> StepBatch:
    return Order(rows, config).step(1)


class TestAgainstTransformers:
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_a_full_fine_tune_takes_the_step_of_single_samples(
        self, any_model: Path, uneven: Rows, tmp_path: Path, layout: dict[str, Any]
    ) -> None:
        config = settings(any_model, max_grad_norm=1e9, **ALL_IN_ONE_STEP, **layout)
        ours = training(tmp_path, config, uneven)
        loss, norm = ours.gradients(first_step(config, uneven))
        theirs, expected = stock_step(stock_model(any_model), uneven)
        assert loss == pytest.approx(theirs, rel=1e-5)
        assert norm == pytest.approx(norm_of(expected), rel=1e-5)
        assert_same(gradients(ours.model), expected)

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_an_adapter_takes_the_step_of_peft_on_single_samples(
        self, any_model: Path, uneven: Rows, tmp_path: Path, layout: dict[str, Any]
    ) -> None:
        config = settings(any_model, adapter="lora", max_grad_norm=1e9, **ALL_IN_ONE_STEP, **layout)
        ours = training(tmp_path / "run", config, uneven)
        wake_adapter(ours.model)
        (tmp_path / "adapter").mkdir()
        save_trained(ours.model, tmp_path / "adapter", config)
        stock = peft.PeftModel.from_pretrained(
            stock_model(any_model), str(tmp_path / "adapter"), is_trainable=True
        )
        loss, norm = ours.gradients(first_step(config, uneven))
        theirs, expected = stock_step(stock, uneven)
        assert loss == pytest.approx(theirs, rel=1e-5)
        assert norm == pytest.approx(norm_of(expected), rel=1e-5)
        assert_same(gradients(ours.model), expected)


class TestEvaluation:
    def test_packing_does_not_change_the_score(self, any_model: Path, uneven: Rows) -> None:
        separate = settings(any_model)
        base = load_base(any_model, separate)
        packed = settings(any_model, sample_packing=True, sequence_len=64, micro_batch_size=2)
        ours, theirs = (score(base.model, base, uneven, c) for c in (packed, separate))
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert (ours.tokens_by_kind, ours.rows) == (theirs.tokens_by_kind, theirs.rows)
        assert learned_tokens(ours) == 93 + 8


class TestWhatKeepsPackedRowsApart:
    """transformers looks at `position_ids` only when there is neither a mask nor a cache."""

    @pytest.fixture
    def packed(self, any_model: Path, uneven: Rows) -> tuple[Model, dict[str, torch.Tensor]]:
        model = load_base(any_model, settings(any_model)).model
        return model, collate(uneven, [range(len(uneven))], LabelRule()).tensors

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_the_path_of_the_trainer_sees_every_row_alone(
        self, packed: tuple[Model, dict[str, torch.Tensor]], uneven: Rows, mode: str
    ) -> None:
        model, tensors = packed
        getattr(model, mode)()
        with torch.no_grad():
            together = hidden_states(model, tensors)[0]
            rows = [collate(uneven, [[k]], LabelRule()).tensors for k in range(len(uneven))]
            alone = torch.cat([hidden_states(model, tensors)[0] for tensors in rows])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize("addition", ["attention_mask", "cache"])
    def test_a_mask_or_a_cache_would_mix_them(
        self, packed: tuple[Model, dict[str, torch.Tensor]], addition: str, mode: str
    ) -> None:
        model, tensors = packed
        getattr(model, mode)()
        extra: dict[str, Any] = {"use_cache": True}
        if addition == "attention_mask":
            extra = {"use_cache": False, "attention_mask": torch.ones_like(tensors["input_ids"])}
        inputs = {k: tensors[k] for k in ("input_ids", "position_ids")}
        with torch.no_grad():
            mixed = unwrapped(model).model(**inputs, **extra).last_hidden_state
            assert (mixed - hidden_states(model, tensors)).abs().max() > 0.1


class TestAccumulation:
    def take_step(self, folder: Path, config: RunConfig, rows: Rows) -> Training:
        run = training(folder, config, rows)
        if config.adapter:
            wake_adapter(run.model)
        run.step(1, first_step(config, rows))
        return run

    @pytest.mark.parametrize("adapter", [None, "lora"])
    @pytest.mark.parametrize("packs", [False, True])
    def test_eight_passes_of_one_are_one_pass_of_eight(
        self, ministral: Path, uneven: Rows, tmp_path: Path, adapter: str | None, packs: bool
    ) -> None:
        # The epsilon keeps AdamW's first step, g / (|g| + eps), from being a sign alone.
        keys: dict[str, Any] = {"adapter": adapter, "sample_packing": packs, "sequence_len": 41}
        keys |= {"adam_epsilon": 1e-4, "learning_rate": 1e-2, "max_grad_norm": 0.1}
        few, many = (
            self.take_step(
                tmp_path / f"{size}",
                settings(
                    ministral, micro_batch_size=size, gradient_accumulation_steps=8 // size, **keys
                ),
                uneven,
            )
            for size in (8, 1)
        )
        (one,), (other,) = (
            [(s.loss, s.grad_norm, s.learned_tokens) for s in steps_of(run)] for run in (few, many)
        )
        assert one == pytest.approx(other, rel=1e-5)
        for left, right in zip(few.parameters, many.parameters, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)

    def test_tokens_weigh_alike(self, ministral: Path, make_rows: MakeRows, tmp_path: Path) -> None:
        short, long = row(3, 1, seed=1), row(3, 40, seed=2)
        alone: list[float] = []
        for rows in ([short], [long]):
            prepared = make_rows(rows)
            run = training(tmp_path / str(len(alone)), settings(ministral), prepared)
            alone.append(run.gradients(first_step(run.config, prepared))[0])
        both = make_rows([short, long])
        config = settings(ministral, gradient_accumulation_steps=2)
        loss, _ = training(tmp_path / "both", config, both).gradients(first_step(config, both))
        assert loss == pytest.approx((2 * alone[0] + 41 * alone[1]) / 43, rel=1e-6)
        assert abs(loss - sum(alone) / 2) > 0.01


def steps_of(run: Training) -> list[Step]:
    return read_steps(run.session.run)


class TestMaskedTokens:
    @pytest.mark.parametrize("packs", [False, True])
    def test_a_token_that_is_only_a_masked_label_changes_no_gradient(
        self, ministral: Path, make_rows: MakeRows, tmp_path: Path, packs: bool
    ) -> None:
        # The last token of a row is nobody's input; its only place is in the labels.
        config = settings(ministral, sample_packing=packs, micro_batch_size=2)
        found = []
        for number, (last, kind) in enumerate(
            [(30, Kind.USER), (31, Kind.USER), (30, Kind.TEXT), (31, Kind.TEXT)]
        ):
            rows = make_rows([[*row(4, 5, seed=1), (last, kind)], row(3, 6, seed=2)])
            run = training(tmp_path / str(number), config, rows)
            found.append((run.gradients(first_step(config, rows)), gradients(run.model)))
        masked, other_id, learned, other_answer = found
        assert masked[0] == other_id[0]
        assert all(torch.equal(masked[1][n], other_id[1][n]) for n in masked[1])
        assert learned[0] != masked[0]
        assert learned[0] != other_answer[0]

    def test_rows_do_not_leak(self, ministral: Path, make_rows: MakeRows, tmp_path: Path) -> None:
        config = settings(ministral, train_on_inputs=True, sample_packing=True)
        headless = [row(4, 5, seed=n)[1:] for n in range(3)]
        rows = make_rows(headless)
        run = training(tmp_path, config, rows)
        batch = first_step(config, rows)
        assert batch.learned_tokens == sum(len(r) - 1 for r in headless)
        packed, _ = run.gradients(batch)
        alone = [make_rows([r]) for r in headless]
        assert packed == pytest.approx(
            np.mean([run.gradients(first_step(config, r))[0] for r in alone]), rel=1e-5
        )


def test_gradients_are_clipped_to_the_norm(ministral: Path, uneven: Rows, tmp_path: Path) -> None:
    config = settings(ministral, max_grad_norm=0.01, **ALL_IN_ONE_STEP)
    run = training(tmp_path, config, uneven)
    _, norm = run.gradients(first_step(config, uneven))
    assert norm > 0.1
    assert norm_of(gradients(run.model)) == pytest.approx(0.01, rel=1e-3)


IN_ONE_STEP = {"gradient_accumulation_steps": 64, "max_grad_norm": 1e9}
STEP_LAYOUTS: dict[str, dict[str, Any]] = {
    "packed, recomputed": {
        "sample_packing": True,
        "sequence_len": 64,
        "micro_batch_size": 3,
        "gradient_checkpointing": True,
    },
    "one row at a time": {"micro_batch_size": 1},
}


TOWER_TOO = {"full with the tower": Method({"unfrozen_parameters": [".*"]}, 1e-5, stock.FLOAT32)}
STARTS = ("text", "images", "FP8")
FAST = {
    ("text", "mistral3 over ministral3", "full"),
    ("text", "mistral3 over ministral3", "LoRA bfloat16"),
    ("text", "mistral3 over ministral3", "NF4 LoRA"),
    ("text", "mistral3 over mistral4", "int8 LoRA"),
    ("images", "mistral3 over mistral4", "LoRA"),
    ("images", "mistral3 over ministral3", "NF4 LoRA"),
    ("FP8", "mistral3 over mistral4", "NF4 LoRA on NF4 experts"),
}
"""Between them they have every kind of layer; the others run with the slow tests."""


def cases() -> list[Any]:
    """Start, architecture and method of every test."""
    found = []
    for start in STARTS:
        for architecture in ARCHITECTURES:
            for name in METHODS | (TOWER_TOO if start == "images" else {}):
                if "experts" in name and "mistral4" not in architecture:
                    continue
                if start == "images" and "over" not in architecture:
                    continue
                case = (start, architecture, name)
                slow = () if case in FAST else pytest.mark.slow
                found.append(pytest.param(*case, id=", ".join(case), marks=slow))
    return found


@pytest.fixture(scope="module")
def bases(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Models, seeing_model: Models
) -> Callable[[str, str], tuple[Path, Path]]:
    """The folder that a run starts from, and the one of the same numbers for stock tools."""
    home = tmp_path_factory.mktemp("bases")

    def find(start: str, architecture: str) -> tuple[Path, Path]:
        if start == "text":
            return (model_folder(architecture),) * 2
        if start == "images":
            return (seeing_model(architecture.removeprefix("mistral3 over ")),) * 2
        folder = home / f"{start} {architecture}"
        plain = folder.with_name(f"{folder.name} in float32")
        if not folder.exists():
            write_fp8(Path(shutil.copytree(model_folder(architecture), folder)))
            stock.write_dequantized(folder, plain)
        return folder, plain

    return find


def stock_trainee(base: Path, run: Training, home: Path, method: Method) -> Any:
    """What stock tools train from the same start: the exported adapter, or the same parameters."""
    model = stock.open_model(base, method.stock)
    if run.config.adapter:
        stock.take_nf4_experts(model, run.model)
        return stock.open_adapter(model, export_trained(run.model, home, base, run.config))
    for name, parameter in model.named_parameters():
        vision = "vision" in name or "multi_modal" in name
        parameter.requires_grad_(not vision or bool(run.config.unfrozen_parameters))
    return model


@pytest.mark.parametrize(("start", "architecture", "name"), cases())
def test_the_first_step_is_that_of_stock_tools(
    bases: Callable[[str, str], tuple[Path, Path]],
    uneven: Rows,
    mixed: Rows,
    tmp_path: Path,
    start: str,
    architecture: str,
    name: str,
) -> None:
    rows, method = (mixed if start == "images" else uneven), (METHODS | TOWER_TOO)[name]
    base, plain = bases(start, architecture)
    runs = []
    for number, layout in enumerate(STEP_LAYOUTS.values()):
        config = settings(base, **(IN_ONE_STEP | layout | method.keys))
        run = training(tmp_path / str(number), config, rows)
        if config.adapter:
            wake_adapter(run.model)
        runs.append(run)
    trainee = stock_trainee(plain, runs[0], tmp_path, method).train()
    loss, gradients = stock.take_step(trainee, rows)
    for run in runs:
        ours = run.gradients(run.order.step(1))
        assert ours == pytest.approx((loss, norm_of(gradients)), rel=method.tolerance)
        trained = [p for p in run.model.parameters() if p.requires_grad]
        assert len([p for p in trained if p.grad is not None]) == len(gradients) == len(trained)
    row = stock.row_of(rows, 2)
    found, expected = stock.logits_of_ours(runs[0].model, row), stock.logits(trainee, row)
    assert stock.distance(found, expected) < (1e-5 if method.tolerance < 0.01 else method.logits)
    if run.config.adapter:
        with trainee.disable_adapter():
            assert stock.distance(stock.logits(trainee, row), expected) > 0.3


NARROW = {"peft_autocast_adapter_dtype": False}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("ministral3", {"adapter": "lora"}),
    "bfloat16": ("ministral3", {"adapter": "lora", "bf16": True}),
    "int8": ("ministral3", {"adapter": "lora", "bf16": True, "load_in_8bit": True}),
    "NF4": ("ministral3", NF4),
    "NF4, float32": ("ministral3", NF4 | {"bf16": False}),
    "DoRA": ("ministral3", {"adapter": "lora", "peft_use_dora": True}),
    "DoRA on NF4": ("ministral3", NF4 | {"peft_use_dora": True}),
    "dropout": ("ministral3", {"adapter": "lora", "lora_dropout": 0.2}),
    "experts": ("mistral4", {"adapter": "lora"} | ON_EXPERTS),
    "NF4 experts": ("mistral4", METHODS["NF4 LoRA on NF4 experts"].keys),
    "beside a tower": ("mistral3 over ministral3", {"adapter": "lora", "bf16": True}),
}


@pytest.mark.parametrize(("architecture", "keys"), ADAPTERS.values(), ids=ADAPTERS)
def test_gradients_are_near_those_of_float32(
    model_folder: Models, uneven: Rows, tmp_path: Path, architecture: str, keys: dict[str, Any]
) -> None:
    found = []
    for number, narrow in enumerate(({}, NARROW)):
        config = settings(model_folder(architecture), max_grad_norm=1e9, **keys, **narrow)
        run = training(tmp_path / str(number), config, uneven)
        wake_adapter(run.model)
        torch.manual_seed(0)  # the same inputs are dropped
        loss, _ = run.gradients(run.order.step(1))
        found.append((loss, gradients(run.model)))
    named = dict(trained_parameters(run.model))
    kinds = {("magnitude" in n, p.dtype, p.grad.dtype) for n, p in named.items()}
    expected = {(False, torch.bfloat16, torch.bfloat16)}
    if "peft_use_dora" in keys:
        expected.add((True, torch.float32, torch.float32))
    assert kinds == expected
    (loss, exact), (ours, rounded) = found
    assert ours == pytest.approx(loss, rel=0.02)
    assert exact.keys() == rounded.keys()
    far = torch.cat([(exact[n] - rounded[n]).flatten() for n in exact]).norm()
    # An NF4 expert's router sends a token at its edge elsewhere.
    limit = 0.3 if "quantize_moe_experts" in keys else 0.05
    assert far < limit * torch.cat([exact[n].flatten() for n in exact]).norm()


@pytest.mark.parametrize("name", ["float32", "NF4", "DoRA", "experts"])
def test_loads_in_stock_peft(model_folder: Models, uneven: Rows, tmp_path: Path, name: str) -> None:
    architecture, keys = ADAPTERS[name]
    folder = model_folder(architecture)
    config = settings(folder, learning_rate=0.01, num_epochs=2, **keys, **NARROW)
    run = training(tmp_path / "run", config, uneven)
    wake_adapter(run.model)
    steps(run, 4)
    home = export_trained(run.model, tmp_path, folder, config)
    saved = load_file(home / "adapter_model.safetensors")
    kinds = {tensor.dtype for key, tensor in saved.items() if "magnitude" not in key}
    assert kinds == {torch.bfloat16}
    form = stock.NF4 if name == "NF4" else stock.FLOAT32
    theirs = stock.open_adapter(stock.open_model(folder, form), home)
    row = stock.row_of(uneven, 2)
    # PEFT widens the matrices, so that only the products differ, and where a router sends a token.
    ours = stock.logits_of_ours(run.model, row)
    assert stock.distance(ours, stock.logits(theirs, row)) < (0.1 if name == "experts" else 0.02)


def test_random_rounding_learns(model_folder: Models, uneven: Rows, tmp_path: Path) -> None:
    found = []
    for number, narrow in enumerate(({}, NARROW)):
        keys = {"lr_scheduler": "constant", "warmup_steps": 0, "num_epochs": 5}
        folder = model_folder("ministral3")
        config = settings(folder, adapter="lora", learning_rate=1e-4, **keys, **narrow)
        run = training(tmp_path / str(number), config, uneven)
        wake_adapter(run.model)
        losses = [loss for loss, _ in steps(run, 40)]
        found.append(sum(losses[:8]) - sum(losses[-8:]))
    exact, ours = found
    assert exact > 0
    assert ours == pytest.approx(exact, rel=0.1)


def test_continues_a_float32_adapter(model_folder: Models, uneven: Rows, tmp_path: Path) -> None:
    keys = {"adapter": "lora", "learning_rate": 0.01, "num_epochs": 2}
    wide, ours = (
        training(tmp_path, settings(model_folder("ministral3"), **keys, **narrow), uneven)
        for narrow in ({}, NARROW)
    )
    steps(wide, 3)
    wide.save()
    ours.restore(None)
    before, after = everything(wide), everything(ours)
    assert before.keys() == after.keys()
    moments = [key for key in before if key.endswith(("exp_avg", "exp_avg_sq"))]
    assert moments
    assert all(before[key] == after[key] for key in moments)
    assert len(steps(ours, 2)) == 2


ALL: dict[str, Any] = {}
NONE: dict[str, Any] = {"gradient_checkpointing": False}
TWO: dict[str, Any] = {"checkpointed_layers": 2}
BASE_KEYS = {
    "float32": BASES["float32"],
    "full": {"adapter": None},
    "DoRA": BASES["float32"] | {"peft_use_dora": True},
    "NF4": BASES["NF4"],
    "NF4 experts": BASES["NF4 experts"],
}


def learned(run: Training) -> tuple[Any, ...]:
    """Loss, norm and every gradient of a step of packed rows."""
    found = run.gradients(run.order.step(1))
    return found, gradients(run.model)


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *((name, "float32") for name in DEEP_MODELS),
        *((name, "full") for name in ("mistral", "ministral3", "mistral4")),
        ("ministral3", "DoRA"),
        ("ministral3", "NF4"),
        ("mistral4", "NF4 experts"),
    ],
)
def test_same_gradients(begin_deep: BeginDeep, architecture: str, method: str) -> None:
    adapted, dora = method != "full", method == "DoRA"
    others = [NONE, {"checkpointed_layers": 1}, TWO, TWO | OFFLOADS["checkpoints"]]
    others += [TWO | OFFLOADS["layers"]] if adapted and not dora else []
    loss, every = None, None
    for number, keys in enumerate((ALL, *others)):
        given = BASE_KEYS[method] | keys
        run = begin_deep(architecture, str(number), **given)
        found, each = learned(run)
        loss, every = loss or found, every or each
        assert found == loss, keys
        assert each.keys() == every.keys()
        assert all(torch.equal(each[name], every[name]) for name in every), keys
    assert every
    assert all(float(gradient.norm()) > 0 for gradient in every.values())


@pytest.mark.parametrize(
    ("keys", "times"),
    [(ALL, [2, 2, 2, 2]), (NONE, [1, 1, 1, 1]), (TWO, [2, 2, 1, 1])],
    ids=["all", "none", "two"],
)
@pytest.mark.parametrize("offloads", [False, True])
def test_layers_computed_again(
    begin_deep: BeginDeep, keys: dict[str, Any], times: list[int], offloads: bool
) -> None:
    more = OFFLOADS["checkpoints"] if offloads and keys != NONE else {}
    run = begin_deep("ministral3", **BASES["float32"], **keys, **more)
    seen: Counter[int] = Counter()
    for number, layer in enumerate(decoder_layers(unwrapped(run.model))):
        norm: Any = layer.input_layernorm
        norm.register_forward_hook(lambda *_, number=number: seen.update([number]))
    step = run.order.step(1)
    run.gradients(step)
    assert [seen[number] // len(step.micros) for number in range(4)] == times

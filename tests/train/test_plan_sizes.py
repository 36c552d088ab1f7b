"""The plan's figures against what the trainer takes: what it holds, saves, updates and computes."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Params4bit
from ruamel.yaml import YAML
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from engine.catalog import ModuleTable, read_architecture
from engine.chat.render import LabelRule
from engine.config import RunConfig
from engine.hardware import assume
from engine.plan import WEIGHTS, Estimate, Place, cpu_device, estimate, trainer
from engine.plan.duration import tower_operations
from engine.plan.layers import image_share
from engine.plan.memory import CPU_BYTES, FOREACH_BYTES, moment_parts, update_bytes
from engine.plan.step import make_step
from engine.plan.targets import (
    adapter_parameters,
    choose_targets,
    count_targets,
    largest_trainable,
    trainable_parameters,
)
from engine.train import weight_files
from engine.train.batches import Order, Rows, collate
from engine.train.checkpoint import export_trained
from engine.train.fitcheck import CpuPeakMemory
from engine.train.forward import hidden_states
from engine.train.loop import Training
from engine.train.lora import attach_lora, choose_trained
from engine.train.model import load_base
from engine.train.optim import build_optimizer, take_step
from engine.train.stand_in import count_rows
from tests.fakes.processes import ROOT
from tests.research import oracle
from tests.research.layer_memory import PACKAGES, PAGE, REGIMES, layer_against_plan
from tests.support import tiny
from tests.support.machines import at, card, config, cpu
from tests.support.pictured_rows import Pictured, picture, seeing, write_pictured
from tests.support.tiny import (
    MINISTRAL3,
    MISTRAL4,
    describe,
    settings,
    training,
    with_vision,
    write_model,
)

CPU = cpu_device(assume("24 GB"))
# Every matrix holds whole blocks of 64 x 256 weights, and more than the 4,096 numbers below which
# bitsandbytes keeps an optimizer's state in float32.
WIDE = MINISTRAL3 | {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
QLORA = {"adapter": "qlora", "load_in_4bit": True}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four million weights with a vision tower."""
    return write_model(tmp_path_factory.mktemp("wide") / "wide", with_vision(WIDE))


def planned(folder: Path, config: RunConfig) -> Estimate:
    return estimate(config, Place(read_architecture(folder), CPU))


def moving(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in an optimizer's or a quantized weight's state."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif hasattr(value, "absmax"):
        yield from tensors(vars(value))


def held_bytes(*found: torch.Tensor) -> int:
    """Bytes of the storages behind the tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())


class TestCounts:
    @pytest.mark.parametrize(
        "wish", [None, ["o_proj"], ["layers.1.self_attn.o_proj", "up_proj"], r".*\.o_proj"], ids=str
    )
    @pytest.mark.parametrize("rank", [1, 8])
    def test_adapter_has_the_planned_modules(self, any_model: Path, wish: Any, rank: int) -> None:
        config = settings(any_model, adapter="lora", lora_r=rank, lora_target_modules=wish)
        architecture = read_architecture(any_model)
        model = attach_lora(load_base(any_model, config).model, architecture, config)
        assert moving(model) == adapter_parameters(architecture.table, config)
        assert moving(model) == planned(any_model, config).trainable_parameters
        modules = set(model.targeted_module_names)
        if not isinstance(wish, list):
            assert len(modules) == sum(count_targets(architecture.table, config).values())
        for entry in wish if isinstance(wish, list) else ():
            found = [name for name in modules if name.endswith(entry)]
            assert count_targets(architecture.table, config)[entry] == len(found)

    @pytest.mark.parametrize("wish", [None, [r"model\..*layers\.1\."], [r".*norm", "lm_head"]])
    def test_a_full_fine_tune_trains_the_planned_numbers(self, any_model: Path, wish: Any) -> None:
        config = settings(any_model, unfrozen_parameters=wish)
        architecture = read_architecture(any_model)
        model = choose_trained(load_base(any_model, config).model, architecture, config)
        assert moving(model) == trainable_parameters(architecture.table, config) > 0


class TestWeights:
    @pytest.mark.parametrize("bf16", [True, False])
    def test_unquantized_weights_take_the_planned_bytes(self, any_model: Path, bf16: bool) -> None:
        config = settings(any_model, adapter="lora", bf16=bf16)
        parts = planned(any_model, config).parts
        held = held_bytes(*load_base(any_model, config).model.parameters())
        assert sum(parts.get(name, 0) for name in WEIGHTS) == held

    def test_4_bit_weights_take_the_planned_bytes_and_the_rest_its_own(self, wide: Path) -> None:
        config = settings(wide, **QLORA)
        parts = planned(wide, config).parts
        model = load_base(wide, config).model
        packed = [p for p in model.parameters() if isinstance(p, Params4bit)]
        states = [t for p in packed for t in tensors(p.quant_state)]
        norms = [p for n, p in model.named_parameters() if "norm" in n and "vision" not in n]
        held = held_bytes(*(p.data for p in packed), *states, *norms)
        assert parts["linear"] + parts["norms"] == pytest.approx(held, rel=0.01)
        seen = [p for n, p in model.named_parameters() if "vision" in n or "multi_modal" in n]
        assert {p.dtype for p in seen} == {torch.float32}
        assert parts["vision"] + parts["projector"] == held_bytes(*seen)


class TestTrainable:
    @pytest.mark.parametrize(
        ("keys", "tolerance"),
        [
            ({"adapter": "lora"}, 0),
            ({"adapter": "lora", "bf16": True}, 0),
            ({"adapter": "lora", "optimizer": "adamw_bnb_8bit"}, 0.01),
            ({"optimizer": "adamw_torch_fused"}, 0),
            ({"optimizer": "adamw_torch_fused", "bf16": True}, 0),
        ],
        ids=str,
    )
    def test_gradients_and_optimizer_state_after_a_step(
        self, wide: Path, uneven: Rows, tmp_path: Path, keys: dict[str, Any], tolerance: float
    ) -> None:
        config = settings(wide, max_steps=1, lora_r=64, **keys)
        run = training(tmp_path, config, uneven)
        parts = moment_parts(config, Place(read_architecture(wide), CPU), "optimizer step")
        run.gradients(Order(uneven, config).step(1))
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        assert parts["gradients"] == held_bytes(*grads)
        if config.adapter:
            adapter = [p for p in run.model.parameters() if p.requires_grad]
            assert parts["adapter"] == held_bytes(*adapter)
        run.optimizer.step()
        state = [
            t for s in run.optimizer.state.values() for t in tensors(s) if t.numel() not in (1, 256)
        ]
        assert parts["optimizer"] == pytest.approx(held_bytes(*state), rel=tolerance or 1e-9)


@pytest.mark.parametrize("name", ["bf16 lora", "bf16 lora, 4-bit base", "fp32 full"])
def test_a_layer_of_the_step_takes_the_planned_bytes(name: str) -> None:
    (regime,) = (each for each in REGIMES if each.name == name)
    planned, measured = layer_against_plan(regime)
    assert planned == pytest.approx(measured, rel=0.05)


def test_the_coefficients_are_those_of_the_pinned_versions() -> None:
    """`python -m tests.research.layer_memory` makes them anew."""
    stored = YAML(typ="safe", pure=True).load(PAGE.read_text("utf-8"))["origin"]["versions"]
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {name: str(found).split("+")[0] for name, found in stored.items()} == {
        name: pinned[name] for name in PACKAGES
    }


SAVED = MINISTRAL3 | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096}
WHOLE_PIECE_BYTES, PIECE_BYTES = trainer.PIECE_BYTES, 2**18
GENERATOR_BYTES = 8192
"""The state of torch's random generator, beside which nothing else is there."""
LORA = {"adapter": "lora", "lora_r": 64, "lora_target_linear": True, "lora_dropout": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "full, fused": {"bf16": True, "optimizer": "adamw_torch_fused"},
    "full, plain": {"bf16": True, "optimizer": "adamw_torch"},
    "full, 8 bits": {"bf16": True, "optimizer": "adamw_bnb_8bit"},
    "full, paged": {"bf16": True, "optimizer": "paged_adamw_8bit"},
    "lora": LORA | {"optimizer": "adamw_torch_fused"},
    "qlora": LORA | {"adapter": "qlora", "load_in_4bit": True},
    "lora with whole tables": LORA | {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "dora": LORA | {"optimizer": "adamw_torch_fused", "peft_use_dora": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("saved_model") / "model", SAVED)


class Run:
    """A run after its first step, and what the process holds for it."""

    def __init__(self, folder: Path, base: Path, rows: Rows, keys: dict[str, Any]) -> None:
        self.memory = CpuPeakMemory()
        self.base = base
        with self.memory.measure("making it"):
            self.run: Training = training(folder, settings(base, **keys), rows)
            self.run.step(1, self.run.order.step(1))

    def grows(self, work: Callable[[], object]) -> int:
        """Bytes that `work` takes at most beyond what is there before it."""
        peaks = self.memory.peaks
        with self.memory.measure("before"):
            pass
        with self.memory.measure("work"):
            work()
        return peaks["work"].allocated_bytes - peaks["before"].allocated_bytes

    def state_bytes(self) -> int:
        parts = (part.values() for part in self.run.optimizer.state.values())
        return sum(t.nbytes for part in parts for t in part if isinstance(t, Tensor))


@pytest.fixture(params=RUNS.values(), ids=list(RUNS))
def made(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    saved_model: Path,
    uneven: Rows,
) -> Run:
    """On a CPU a tensor is in RAM already. Here what comes to it is copied, as from a card: so both
    the card's memory and RAM are counted, and their sum may not grow by more than one piece."""
    monkeypatch.setattr(weight_files, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: tensor.clone())
    return Run(tmp_path, saved_model, uneven, request.param)


def test_a_save_a_resume_and_what_is_left_take_one_piece_as_planned(
    made: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = made.run, made.state_bytes()
    assert made.grows(run.save) <= PIECE_BYTES + GENERATOR_BYTES
    assert state > 4 * PIECE_BYTES  # it would be seen
    with made.memory.measure("dropping the state"):
        run.optimizer.state.clear()
    grown = made.grows(lambda: run.restore(None))
    assert made.state_bytes() == state
    assert state < grown <= state + PIECE_BYTES + GENERATOR_BYTES
    asked = (run.model, run.session.run.path, made.base, run.config)
    assert made.grows(lambda: export_trained(*asked)) <= PIECE_BYTES
    # The plan counts whole pieces, or the largest tensor where that is less: a state's numbers
    # take up to four bytes.
    with made.memory.measure("another step"):
        run.step(2, run.order.step(2))
    monkeypatch.setattr(weight_files, "PIECE_BYTES", WHOLE_PIECE_BYTES)
    parts = moment_parts(run.config, Place(read_architecture(made.base), cpu()), "save")
    grown = made.grows(run.save)
    assert parts["piece"] / 4 <= grown <= parts["piece"] + GENERATOR_BYTES
    assert grown >= parts["piece"] or "8bit" in run.config.optimizer


@pytest.mark.parametrize("keys", [{}, {"adapter": None, "bf16": True}], ids=["lora", "full"])
def test_on_a_card_a_save_takes_nothing_and_in_ram_a_piece(keys: dict[str, Any]) -> None:
    asked, h100 = config(**keys), card("H100 80GB")
    parts = moment_parts(asked, at("ministral-3-8b", h100), "save")
    resting = moment_parts(asked, at("ministral-3-8b", h100), "optimizer step")
    assert parts == {k: v for k, v in resting.items() if k not in ("gradients", "update")}
    narrow, wide = (
        estimate(asked.model_copy(update={"optimizer": name}), at("ministral-3-8b", h100))
        for name in ("adamw_bnb_8bit", "adamw_torch_fused")
    )
    assert narrow.host_bytes == wide.host_bytes


NOT_AGAIN = {"gradient_checkpointing": False}


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("three_layers") / "three_layers", oracle.WIDE)


@pytest.mark.parametrize("again", [NOT_AGAIN, {"checkpointed_layers": 1}, {}], ids=str)
@pytest.mark.parametrize("method", ["lora", None])
def test_masked_rows_take_the_plan(
    three_layers: Path, again: dict[str, Any], method: str | None
) -> None:
    """On a CPU, whose attention turns the mask into numbers for every layer that keeps it."""
    tokens = 1024
    keys = {"adapter": method, "sample_packing": True, "sequence_len": tokens, "bf16": False}
    keys |= {"gradient_checkpointing": True, "gradient_accumulation_steps": 2} | again
    _, peak = oracle.really_run(three_layers, keys, tokens, 1, rows=2)
    architecture = read_architecture(three_layers)
    place = Place(architecture, cpu(64))
    planned = moment_parts(settings(three_layers, **keys), place, "backward pass")
    more = sum(planned.get(part, 0) for part in ("activations", "layer", "mask"))
    assert more == pytest.approx(peak, rel=0.1)


# Wide enough that the products are most of its work.
TOWER = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 3,
}


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointed"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_tower_takes_what_is_planned(tmp_path: Path, keys: dict[str, Any], trained: bool) -> None:
    base = write_model(tmp_path / "model", seeing(MINISTRAL3, **TOWER))
    rows = write_pictured(tmp_path / "rows", [Pictured((picture(112, 112),) * 2)] * 2)
    free = [r"model\."] if trained else None
    config = settings(base, attn_implementation="sdpa", unfrozen_parameters=free, **keys)
    model = training(base, config, rows).model.train()
    batch = collate(rows, [[0], [1]], LabelRule()).tensors
    # The other kernels of a CPU are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden_states(model, batch).square().sum().backward()
    text = {key: batch[key] for key in ("input_ids", "position_ids")}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as without:
        hidden_states(model, text).square().sum().backward()
    statistics = count_rows(rows, config)
    assert 0 < image_share(config, statistics) < 1
    counted = tower_operations(config, at(base, cpu(), statistics), statistics.total_tokens)
    taken = counter.get_total_flops() - without.get_total_flops()
    assert counted == pytest.approx(taken, rel=0.1)


OPTIMIZERS = sorted(set(CPU_BYTES) - {"adamw_torch_8bit", "adamw_8bit"})  # torchao's; another name
LOOSE = {
    ("adamw_torch", None): 0.34,  # the quotient of the tensor before is smaller than the largest
    ("adamw_torch_fused", "lora"): 0.11,  # all factors are widened, none yet rounded
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full in bfloat16": {"bf16": True},
    "adapter": {"adapter": "lora", "lora_r": 64, "lora_target_linear": True},
    "bfloat16 adapter": {
        "adapter": "lora",
        "lora_r": 64,
        "lora_target_linear": True,
        "peft_autocast_adapter_dtype": False,
        "bf16": True,
    },
}


def parameters(table: ModuleTable, config: RunConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, made of zeros."""
    kind = torch.bfloat16 if config.bf16 else torch.float32
    if not config.adapter:
        for row in table.parameters:
            if not row.tied:
                yield row.name, nn.Parameter(torch.zeros(row.shape, dtype=kind))
        return
    targets = choose_targets(table, config)
    for row in table.parameters:
        if row.module in targets:
            outputs, inputs = row.shape
            for name, shape in (("A", (config.lora_r, inputs)), ("B", (outputs, config.lora_r))):
                yield f"{row.module}.lora_{name}.w", nn.Parameter(torch.zeros(shape, dtype=kind))


def taken_bytes(
    named: Iterable[tuple[str, nn.Parameter]],
    build: Callable[[list[tuple[str, nn.Parameter]]], Optimizer],
) -> int:
    """By the third step beyond what was there before it."""
    memory = CpuPeakMemory()
    with memory.measure("before"):
        trainable = list(named)
        optimizer = build(trainable)
        for number in range(3):
            for _, parameter in trainable:
                parameter.grad = torch.ones_like(parameter)
            if number < 2:
                take_step(optimizer)
    with memory.measure("at rest"):
        pass
    with memory.measure("step"):
        take_step(optimizer)
    return memory.peaks["step"].allocated_bytes - memory.peaks["at rest"].allocated_bytes


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_takes_the_planned_memory(tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    architecture = read_architecture(describe(tmp_path / "model", tiny.WIDE))
    config = settings(tmp_path / "model", optimizer=name, **keys)
    step = make_step(config, Place(architecture, cpu()))
    if config.adapter:
        made = sum(p.numel() for _, p in parameters(architecture.table, config))
        assert made == adapter_parameters(architecture.table, config)
    given = parameters(architecture.table, config)
    taken = taken_bytes(given, lambda named: build_optimizer(named, config))
    counted = update_bytes(step)
    assert taken == pytest.approx(counted, rel=LOOSE.get((name, config.adapter), 0.001), abs=2**10)
    assert taken <= 1.001 * counted + 2**10


def test_on_a_gpu_the_plain_one_takes_the_roots_of_all_second_moments(tmp_path: Path) -> None:
    """Which it does wherever it moves many tensors in one call, as it does on every GPU."""
    architecture = read_architecture(describe(tmp_path / "model", tiny.WIDE))
    named = list(parameters(architecture.table, settings(tmp_path)))
    taken = taken_bytes(named, lambda named: torch.optim.AdamW([p for _, p in named], foreach=True))
    numbers = sum(parameter.numel() for _, parameter in named)
    assert taken == pytest.approx(FOREACH_BYTES * numbers, rel=0.02)


def test_on_a_gpu_only_that_and_what_is_widened_count(tmp_path: Path) -> None:
    architecture = read_architecture(describe(tmp_path / "model", tiny.WIDE))

    def counted(name: str, **keys: Any) -> tuple[float, int, int]:
        config = settings(tmp_path / "model", optimizer=name, **keys)
        step = make_step(config, Place(architecture, card("H100 80GB")))
        return update_bytes(step), step.trainable, largest_trainable(step.table, config)

    for keys in KINDS.values():
        plain, numbers, largest = counted("adamw_torch", **keys)
        for name in set(CPU_BYTES) - {"adamw_torch"}:
            kernel, _, _ = counted(name, **keys)
            widened = {"full in bfloat16": 2, "bfloat16 adapter": 4}
            more = next((size for kind, size in widened.items() if KINDS[kind] is keys), 0)
            cut = {0: 0, 2: 4, 4: 12}[more] * largest
            assert kernel == more * numbers + cut
            assert plain == more * numbers + max(cut, 4 * numbers)


@pytest.mark.parametrize(
    "keys",
    [
        {"adapter": "lora", "lora_r": 8, "lora_target_linear": True},
        {
            "adapter": "lora",
            "lora_r": 8,
            "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "lora_dropout": 0.0,
        },
        {"adapter": "lora", "lora_r": 8, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
        {},
    ],
    ids=["linears", "experts", "saved", "full"],
)
def test_largest_trainable_tensor(tmp_path: Path, uneven: Rows, keys: dict[str, Any]) -> None:
    base = write_model(tmp_path / "model", MISTRAL4)
    config = settings(base, **keys)
    model = training(base, config, uneven).model
    made = max(p.numel() for p in model.parameters() if p.requires_grad)
    assert largest_trainable(read_architecture(base).table, config) == made

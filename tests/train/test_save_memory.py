"""What a save, a resume and an export take beside the run itself, by what torch's allocator gives.

On a CPU a tensor is in RAM already. Here what comes to it is copied, as from a card: so both the
card's memory and RAM are counted, and their sum may not grow by more than one piece.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from engine.catalog import read_architecture
from engine.plan import estimate, trainer
from engine.plan.memory import moment_parts
from engine.train import weight_files
from engine.train.batches import Rows
from engine.train.checkpoint import export_trained
from engine.train.fitcheck import CpuPeakMemory
from engine.train.loop import Training
from tests.support.machines import card, config, cpu, model
from tests.support.tiny import MINISTRAL3, settings, training, write_model

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


@pytest.fixture(autouse=True)
def from_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: tensor.clone())


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
def made(request: pytest.FixtureRequest, tmp_path: Path, saved_model: Path, uneven: Rows) -> Run:
    return Run(tmp_path, saved_model, uneven, request.param)


def test_a_save_takes_one_piece(made: Run) -> None:
    assert made.grows(made.run.save) <= PIECE_BYTES + GENERATOR_BYTES
    assert made.state_bytes() > 4 * PIECE_BYTES  # it would be seen


def test_a_resume_takes_the_state_and_one_piece(made: Run) -> None:
    made.run.save()
    state = made.state_bytes()
    with made.memory.measure("dropping the state"):
        made.run.optimizer.state.clear()
    grown = made.grows(lambda: made.run.restore(None))
    assert made.state_bytes() == state
    assert state < grown <= state + PIECE_BYTES + GENERATOR_BYTES


def test_what_a_run_leaves_takes_one_piece(made: Run) -> None:
    run = made.run
    left = made.grows(
        lambda: export_trained(run.model, run.session.run.path, made.base, run.config)
    )
    assert left <= PIECE_BYTES


def test_the_formula_counts_that_piece(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the largest tensor, where that is less: a state's numbers take up to four bytes."""
    monkeypatch.setattr(weight_files, "PIECE_BYTES", WHOLE_PIECE_BYTES)
    run = made.run
    parts = moment_parts(run.config, read_architecture(made.base), cpu(), "save")
    grown = made.grows(run.save)
    assert parts["piece"] / 4 <= grown <= parts["piece"] + GENERATOR_BYTES
    assert grown >= parts["piece"] or "8bit" in run.config.optimizer


@pytest.mark.parametrize("keys", [{}, {"adapter": None, "bf16": True}], ids=["lora", "full"])
def test_on_a_card_a_save_takes_nothing_and_in_ram_a_piece(keys: dict[str, Any]) -> None:
    asked, h100 = config(**keys), card("H100 80GB")
    parts = moment_parts(asked, model("ministral-3-8b"), h100, "save")
    resting = moment_parts(asked, model("ministral-3-8b"), h100, "optimizer step")
    assert parts == {k: v for k, v in resting.items() if k not in ("gradients", "update")}
    narrow, wide = (
        estimate(asked.model_copy(update={"optimizer": name}), model("ministral-3-8b"), h100)
        for name in ("adamw_bnb_8bit", "adamw_torch_fused")
    )
    assert narrow.host_bytes == wide.host_bytes

"""A run goes on exactly where it was, and no moment is a bad one to be killed or out of room."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.catalog import find_model
from engine.chat.tokenizer import write_tekken
from engine.config import RunConfig
from engine.errors import UserError, WorkError
from engine.plan.trainer import CHUNK_BYTES, SMALLEST_CHUNK_BYTES
from engine.runs import RunFolder
from engine.train.batches import Rows
from engine.train.checkpoint import (
    RANDOM,
    Checkpoints,
    export_trained,
    load_trained,
    save_trained,
    trained_tensors,
)
from engine.train.loss import Loss
from engine.train.model import Base, load_base
from engine.train.moments import OPTIMIZER
from engine.train.seal import STATE, Damaged, Position, _with_digest, read_checkpoint
from tests.support.stock import stock_model
from tests.support.tiny import (
    MINISTRAL3,
    Begin,
    Models,
    adapted,
    assemble,
    everything,
    files_at_most,
    flip,
    logits,
    settings,
    steps,
    training,
    wake_adapter,
    write_model,
)

FULL = {"learning_rate": 0.01, "num_epochs": 4}
LORA = FULL | {"adapter": "lora", "lora_dropout": 0.1}
# One matrix and one vector of the model: saves are small, so that a test can make many.
SMALL: dict[str, Any] = {
    "unfrozen_parameters": [r"model\.norm", r"model\.layers\.0\.self_attn\.k_proj"]
}


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("optimizer", "keys"),
        [
            ("adamw_torch", FULL),
            ("adamw_torch", LORA),
            ("adamw_torch_fused", LORA),
            ("adamw_bnb_8bit", FULL),
            ("adamw_bnb_8bit", LORA | {"lora_r": 64}),
            ("paged_adamw_8bit", FULL),
            ("paged_adamw_32bit", LORA),
            ("adamw_bnb_8bit", LORA | {"adapter": "qlora", "load_in_4bit": True, "lora_r": 64}),
            ("adamw_torch_fused", LORA | {"peft_autocast_adapter_dtype": False}),
            ("adamw_bnb_8bit", LORA | {"peft_autocast_adapter_dtype": False, "lora_r": 64}),
        ],
        ids=lambda value: value if isinstance(value, str) else value.get("adapter", "full"),
    )
    @pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
    def test_it_goes_on_as_if_it_had_never_stopped(
        self, ministral: Path, uneven: Rows, tmp_path: Path, optimizer: str, keys: dict[str, Any]
    ) -> None:
        config = settings(ministral, optimizer=optimizer, micro_batch_size=2, **keys)
        first = training(tmp_path / "run", config, uneven)
        steps(first, 3)
        first.save()
        saved = everything(first)
        expected = steps(first, 3)
        if "8bit" in optimizer:
            assert any(bits[0] == torch.uint8 for bits in saved.values() if isinstance(bits, tuple))

        second = training(tmp_path / "run", config, uneven)
        torch.manual_seed(999)
        second.restore(None)
        assert everything(second) == saved
        assert second.position == Position(
            3,
            second.position.tokens,
            fingerprint=second.order.fingerprint(),
            loss_chunk_bytes=SMALLEST_CHUNK_BYTES,
        )
        assert steps(second, 3) == expected
        assert everything(second) == everything(first)

    @pytest.mark.parametrize(("saved", "planned"), [(3, 0), (0, 3), (2, 2)])
    def test_resume_keeps_the_smaller_chunks(self, begin: Begin, saved: int, planned: int) -> None:
        first, second = (begin("run", **LORA) for _ in range(2))
        first.position.loss_chunk_bytes = CHUNK_BYTES[saved]
        first.save()
        second.loss = Loss(CHUNK_BYTES[planned])
        second.restore(None)
        smaller = min(CHUNK_BYTES[saved], CHUNK_BYTES[planned])
        assert second.loss.chunk_bytes == second.position.loss_chunk_bytes == smaller

    @pytest.mark.parametrize("before", [True, False])
    @pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
    def test_a_state_of_8_bits_goes_on_paged_and_back(self, begin: Begin, before: bool) -> None:
        names = ["adamw_bnb_8bit", "paged_adamw_8bit"]
        first, second = (
            begin("run", optimizer=name, micro_batch_size=2, **LORA, lora_r=64)
            for name in (names if before else reversed(names))
        )
        steps(first, 3)
        first.save()
        expected = steps(first, 2)
        second.restore(None)
        assert steps(second, 2) == expected
        assert everything(second) == everything(first)

    def test_a_run_goes_on_with_a_smaller_micro_batch(self, begin: Begin) -> None:
        large, small = (
            begin(
                "run",
                adapter="lora",
                num_epochs=4,
                micro_batch_size=size,
                gradient_accumulation_steps=4 // size,
            )
            for size in (4, 1)
        )
        steps(large, 2)
        large.save()
        expected = [loss for loss, _ in steps(large, 3)]
        small.restore(None)
        assert [loss for loss, _ in steps(small, 3)] == pytest.approx(expected, rel=1e-4)

    def test_the_position_comes_back_whole(self, begin: Begin) -> None:
        run = begin(**SMALL)
        position = Position(7, 1234, 0.1 + 0.2, 5, "abc")
        run.checkpoints.save(run.model, run.optimizer, position)
        found = run.checkpoints.find("step-7")
        assert found is not None
        assert run.checkpoints.load(found, run.model, run.optimizer) == position

    def test_a_resume_where_nothing_was_saved_starts_at_the_beginning(self, begin: Begin) -> None:
        run = begin(**SMALL)
        run.restore(None)
        assert run.position.step == 0

    def test_nothing_in_it_is_pickled(self, begin: Begin) -> None:
        run = begin(**LORA)
        steps(run, 1)
        run.save()
        latest = run.checkpoints.find()
        assert latest is not None
        assert {path.suffix for path in latest.folder.iterdir()} == {".json", ".safetensors"}


@pytest.fixture(scope="module")
def base(model_folder: Models) -> Base:
    folder = model_folder("ministral3")
    return load_base(folder, settings(folder))


class Run:
    """Checkpoints of a small model whose every step leaves other weights behind."""

    def __init__(self, root: Path, base: Base, rows: Rows, limit: int) -> None:
        config = settings(**SMALL, save_total_limit=limit)
        for name, parameter in base.model.named_parameters():
            parameter.requires_grad_("model.norm" in name)
        self.training = assemble(root, base, base.model, config, rows)
        self.folder = RunFolder(root)
        self.root = self.folder.checkpoints
        self.config: RunConfig = config
        self.said: list[str] = []
        """What the newest look passed over."""

    def save(self, step: int, *, mark: float | None = None, best: int | None = None) -> Path:
        with torch.no_grad():
            self.training.parameters[0].fill_(float(step) if mark is None else mark)
        order = self.training.order.fingerprint()
        position = Position(step=step, best_step=best, fingerprint=order)
        training = self.training
        return self.checkpoints().save(training.model, training.optimizer, position)

    def checkpoints(self) -> Checkpoints:
        """As a new process finds them."""
        self.said.clear()
        return Checkpoints(self.folder, self.config, self.said.append)

    def latest(self) -> tuple[int, float]:
        """Step and weight of the newest checkpoint."""
        checkpoints = self.checkpoints()
        found = checkpoints.find()
        assert found is not None
        position = checkpoints.load(found, self.training.model, self.training.optimizer)
        assert found.folder.name == f"step-{position.step}"
        return position.step, float(self.training.parameters[0].detach()[0])

    def names(self) -> set[str]:
        return {path.name for path in self.root.iterdir()}


@pytest.fixture
def run(tmp_path: Path, base: Base, uneven: Rows) -> Run:
    return Run(tmp_path, base, uneven, limit=2)


def test_its_state_is_text_that_a_person_can_read(run: Run) -> None:
    state = json.loads((run.save(4) / STATE).read_text())
    assert (state["step"], state["optimizer_class"]) == (4, "AdamW")


class TestWhichAreKept:
    def test_the_newest_and_the_best_are_marked(self, run: Run) -> None:
        run.save(1, best=1)
        run.save(2, best=1)
        assert run.latest() == (2, 2.0)
        assert run.checkpoints().best() == run.root / "step-1"

    def test_older_ones_go_and_the_best_never_does(self, run: Run) -> None:
        for step in (1, 2, 10, 11, 12):
            run.save(step, best=2 if step >= 2 else None)
        assert run.names() == {"step-2", "step-11", "step-12", "LATEST", "BEST"}

    def test_the_newest_stays_when_the_run_went_back(self, run: Run) -> None:
        for step in (10, 11, 12):
            run.save(step)
        run.save(3)
        assert run.latest() == (3, 3.0)
        assert run.names() == {"step-3", "step-11", "step-12", "LATEST"}

    def test_a_step_that_is_saved_again_replaces_the_first(self, run: Run) -> None:
        run.save(5, mark=1.0)
        run.save(5, mark=2.0)
        assert run.latest() == (5, 2.0)
        assert run.names() == {"step-5", "LATEST"}


class TestGoingBack:
    def test_the_checkpoint_gone_back_to_is_the_newest_from_then_on(self, run: Run) -> None:
        for step in (3, 4):
            run.save(step)
        run.training.restore("step-3")
        assert run.latest() == (3, 3.0)

    def test_best_is_the_best_it_knows(self, tmp_path: Path, base: Base, uneven: Rows) -> None:
        run = Run(tmp_path, base, uneven, limit=9)
        for step, best in ((1, 1), (2, 1), (3, 3)):
            run.save(step, best=best)
        run.training.restore("step-2")
        assert run.checkpoints().best() == run.root / "step-1"

    def test_a_best_that_is_gone_is_none(self, run: Run) -> None:
        run.save(1)
        run.save(2, best=2)
        run.training.restore("step-1")
        assert run.checkpoints().best() is None


class Killed(BaseException):
    """The process is gone; nothing that follows runs."""


@pytest.mark.parametrize("again", [False, True], ids=["another step", "the same step again"])
class TestKilledInsideASave:
    def test_at_every_moment(self, run: Run, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
        before = (4, 4.0)
        after = (4, 9.0) if again else (5, 9.0)
        for moment in itertools.count():
            run.save(4)
            if not self.killed_at(moment, run, after, monkeypatch):
                break
            assert run.latest() in (before, after)
            assert not {name for name in run.names() if "." in name}
            shutil.rmtree(run.root / "step-5", ignore_errors=True)
        assert run.latest() == after
        assert moment >= 9  # six syncs, two or three renames, at least

    def killed_at(
        self, moment: int, run: Run, after: tuple[int, float], monkeypatch: pytest.MonkeyPatch
    ) -> bool:
        """Save, but end before the disk operation number `moment`; False when none was left."""
        left = moment

        def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
            def act(*arguments: Any, **keys: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return operation(*arguments, **keys)

            return act

        with monkeypatch.context() as patched:
            for name in ("fsync", "rename", "replace"):
                patched.setattr(os, name, counted(getattr(os, name)))
            patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
            try:
                run.save(after[0], mark=after[1])
            except Killed:
                return True
        return False


class TestWhatAKillLeaves:
    def test_a_half_written_folder_is_thrown_away(self, run: Run) -> None:
        run.save(4)
        shutil.copytree(run.root / "step-4", run.root / "step-5.partial")
        assert (run.latest(), run.names()) == ((4, 4.0), {"step-4", "LATEST"})

    def test_between_the_two_renames_the_older_one_counts(self, run: Run) -> None:
        folder = run.save(4)
        folder.rename(run.root / "step-4.old")
        (run.root / "step-4.partial").mkdir()
        assert (run.latest(), run.names()) == ((4, 4.0), {"step-4", "LATEST"})

    def test_a_half_written_mark_is_thrown_away(self, run: Run) -> None:
        run.save(4)
        (run.root / ".LATEST.4711").write_text("step")
        assert (run.latest(), run.names()) == ((4, 4.0), {"step-4", "LATEST"})

    def test_after_both_renames_the_newer_one_counts(self, run: Run) -> None:
        run.save(4, mark=1.0)
        shutil.copytree(run.root / "step-4", run.root / "step-4.old")
        run.save(4, mark=2.0)
        assert (run.latest(), run.names()) == ((4, 2.0), {"step-4", "LATEST"})

    def test_only_checkpoint_counts_without_a_mark(self, run: Run) -> None:
        run.save(4)
        (run.root / "LATEST").unlink()
        assert run.latest() == (4, 4.0)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def edit(**changes: object) -> Callable[[Path], object]:
    """state.json with other values; what is None is removed."""

    def change(path: Path) -> None:
        state = json.loads(path.read_text("utf-8")) | changes
        path.write_text(json.dumps({k: v for k, v in state.items() if v is not None}), "utf-8")

    return change


def write(text: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text)


STATES = [
    *(write(text) for text in (b"{}", b"[]", b'"20"', b"{", b"\xff\xfe", b"[" * 10**5, b"null")),
    *(edit(step=3), edit(step="4"), edit(tokens=None), edit(nonsense=1), edit(digest="0" * 64)),
    *(edit(files={}), edit(optimizer_class=None), edit(digest=None)),
    lambda path: path.write_text(json.dumps(json.loads(path.read_text()), indent=1)),
]
MARKS = [b"step-99", b"", b"\xff", b"../other/step-5", b"step-4/../step-3", b"."]


class TestDamage:
    @pytest.mark.parametrize("damage", [Path.unlink, cut_short, write(b""), flip])
    @pytest.mark.parametrize("name", [OPTIMIZER, RANDOM, STATE, "trained.safetensors"])
    def test_damage_is_skipped(self, run: Run, name: str, damage: Callable[[Path], None]) -> None:
        run.save(3)
        damage(run.save(4) / name)
        assert run.latest() == (3, 3.0)
        assert [text.startswith("step-4 is damaged and passed over: ") for text in run.said] == [1]
        assert name in run.said[0]
        with pytest.raises(WorkError, match="step-4 cannot be read") as caught:
            run.training.restore("step-4")
        assert name in caught.value.why
        assert run.latest() == (3, 3.0)

    @pytest.mark.parametrize("damage", STATES)
    def test_an_odd_state_is_damage(self, run: Run, damage: Callable[[Path], object]) -> None:
        run.save(3)
        damage(run.save(4) / STATE)
        assert run.latest() == (3, 3.0)
        assert "state.json" in run.said[0]

    def test_a_state_that_was_sealed_anew_is_read_with_the_same_care(self, run: Run) -> None:
        run.save(3)
        folder = run.save(4)
        state = json.loads((folder / STATE).read_text("utf-8"))
        for changes in ({"step": 3}, {"nonsense": 1}, {"files": ["LATEST"]}, {"files": {"x": "0"}}):
            content = {k: v for k, v in (state | changes).items() if k != "digest"}
            (folder / STATE).write_bytes(_with_digest(content))
            with pytest.raises(Damaged):
                read_checkpoint(folder)

    @pytest.mark.parametrize("mark", [*MARKS, None])
    def test_a_mark_that_names_none_of_its_own_is_said(self, run: Run, mark: bytes | None) -> None:
        other = run.root.parent / "other"
        run.save(3)
        run.save(4)
        shutil.copytree(run.root, other)
        (other / "step-4").rename(other / "step-5")
        (run.root / "LATEST").unlink()
        if mark is not None:
            (run.root / "LATEST").write_bytes(mark)
        assert run.latest() == (4, 4.0)
        assert run.said == ["LATEST names no checkpoint of this run: the newest whole one counts"]

    def test_what_came_after_the_one_gone_back_to_is_never_taken(self, run: Run) -> None:
        run.save(3)
        run.save(4)
        run.training.restore("step-3")
        flip(run.root / "step-3" / STATE)
        with pytest.raises(WorkError, match=r"up to step-3 is whole") as caught:
            run.training.restore(None)
        assert "--from step-4` tries a later one" in caught.value.fix

    def test_where_none_is_whole_the_advice_works(self, run: Run) -> None:
        for step in (3, 4):
            flip(run.save(step) / OPTIMIZER)
        with pytest.raises(WorkError, match="No checkpoint of this run") as caught:
            run.training.restore(None)
        assert "Undo" not in caught.value.fix
        assert f"remove {run.root} and resume: the run then begins at step 1" in caught.value.fix
        shutil.rmtree(run.root)
        run.training.restore(None)
        assert run.training.position.step == 0

    def test_a_damaged_best_is_said_and_not_gone_back_to(self, run: Run) -> None:
        run.save(3)
        flip(run.save(4, best=4) / "trained.safetensors")
        assert run.checkpoints().best() is None
        assert run.said[0].startswith("step-4, the best one, is damaged")

    def test_other_things_in_the_folder_are_left_alone(self, run: Run) -> None:
        for name in ("notes.txt", "step-by-step", "step-1.zip"):
            (run.root / name).mkdir()
        for step in (1, 2, 3):
            run.save(step)
        assert run.latest() == (3, 3.0)
        assert {"notes.txt", "step-by-step", "step-1.zip"} < run.names()


class TestNoRoom:
    @pytest.mark.parametrize("room_bytes", [0, 100, 1000, 3000])
    def test_full_disk_costs_no_earlier_checkpoint(self, run: Run, room_bytes: int) -> None:
        run.save(3)
        for step in (3, 4):
            with (
                files_at_most(room_bytes),
                pytest.raises(WorkError, match=f"step {step} could not be written") as caught,
            ):
                run.save(step, mark=9.0)
            assert "File too large" in caught.value.why
            assert "Free disk space" in caught.value.fix
            assert run.names() == {"step-3", "LATEST"}  # what was begun is no longer in the way
            assert run.latest() == (3, 3.0)

    def test_with_room_again_the_same_process_saves(self, run: Run) -> None:
        with files_at_most(100), pytest.raises(WorkError):
            run.save(3)
        run.save(3)
        assert run.latest() == (3, 3.0)


class TestAnotherRun:
    @pytest.mark.parametrize(
        ("keys", "match"),
        [
            ({"seed": 6}, "cannot go on from step-2"),
            ({"micro_batch_size": 2}, "cannot go on from step-2"),
            ({"sample_packing": True}, "cannot go on from step-2"),
            ({"lora_r": 8}, "belong to another model"),
            ({"lora_target_modules": ["q_proj"]}, "belong to another model"),
            ({"adapter": None}, "belong to another model"),
            ({"optimizer": "adamw_bnb_8bit"}, "The optimizer of step-2 is AdamW, not AdamW8bit"),
        ],
        ids=str,
    )
    def test_other_config_is_refused(self, begin: Begin, keys: dict[str, Any], match: str) -> None:
        first = begin(**LORA)
        steps(first, 2)
        first.save()
        other = begin(**LORA | keys)
        with pytest.raises(UserError, match=match) as caught:
            other.restore(None)
        assert "output_dir" in caught.value.fix

    @pytest.mark.parametrize("keys", [{"learning_rate": 0.1}, {"num_epochs": 9}], ids=str)
    def test_one_that_fits_goes_on(self, begin: Begin, keys: dict[str, Any]) -> None:
        first = begin(**LORA)
        wake_adapter(first.model)
        steps(first, 2)
        first.save()
        other = begin(**LORA | keys)
        other.restore("step-2")
        assert everything(other) == everything(first)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for the last bits, which depend on how a file's weights lie in memory."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class TestAdapter:
    def test_stock_peft_answers_alike(self, any_model: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(any_model, tmp_path, uneven)
        folder = export_trained(run.model, tmp_path, any_model, run.config)
        assert folder == tmp_path / "adapter"
        stock = peft.PeftModel.from_pretrained(stock_model(any_model), str(folder))
        assert_same(logits(stock), logits(run.model))
        plain = logits(stock_model(any_model))
        assert (plain - logits(run.model)).abs().max() > 0.1

    @pytest.mark.parametrize("catalog", [False, True])
    def test_config_names_the_base(self, begin: Begin, tmp_path: Path, catalog: bool) -> None:
        run = begin(adapter="lora", lora_r=4, lora_alpha=8)
        base = named = run.config.base_model
        config = run.config
        if catalog:
            config = config.model_copy(update={"base_model": "ministral-3-3b"})
            named = "mistralai/Ministral-3-3B-Instruct-2512-BF16"
        folder = export_trained(run.model, tmp_path, Path(base), config)
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == named
        assert written["inference_mode"] is True
        assert (written["r"], written["lora_alpha"], written["bias"]) == (4, 8, "none")

    def test_tokenizer_and_licence_lie_beside_it(self, uneven: Rows, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3)
        (base / "tekken.json").write_text("the vocabulary")
        (base / "LICENSE").write_text("free")
        run = adapted(base, tmp_path, uneven)
        folder = export_trained(run.model, tmp_path, base, run.config)
        assert (folder / "tekken.json").read_text() == "the vocabulary"
        assert (folder / "LICENSE").read_text() == "free"

    @pytest.mark.parametrize("as_file", [True, False])
    def test_tokenizer_of_the_run(self, uneven: Rows, tmp_path: Path, as_file: bool) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3)
        for name in ("tekken.json", "tokenizer_config.json"):
            (base / name).write_text("the base's own")
        other = tmp_path / "other" / "tekken.json"
        other.parent.mkdir()
        write_tekken(find_model("demo-tiny").tokenizer, other)
        used = str(other) if as_file else "demo-tiny"
        run = adapted(base, tmp_path, uneven, tokenizer_config=used)
        folder = export_trained(run.model, tmp_path, base, run.config)
        assert (folder / "tekken.json").read_bytes() == other.read_bytes()
        assert not (folder / "tokenizer_config.json").exists()

    def test_holds_the_adapter_alone(self, any_model: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(any_model, tmp_path, uneven)
        save_trained(run.model, tmp_path, run.config)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert all(".lora_A." in name or ".lora_B." in name for name in saved)
        assert len(saved) == len(run.parameters)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}

    def test_it_comes_back_bit_for_bit(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        first = adapted(ministral, tmp_path / "one", uneven, seed=1)
        second = adapted(ministral, tmp_path / "two", uneven, seed=2)
        save_trained(first.model, tmp_path, first.config)
        load_trained(second.model, tmp_path)
        ours, theirs = trained_tensors(first.model), trained_tensors(second.model)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert torch.equal(logits(first.model), logits(second.model))

    @pytest.mark.parametrize("keys", [{"lora_r": 4}, {"lora_target_modules": ["q_proj"]}], ids=str)
    def test_another_shape_of_adapter_is_refused_and_nothing_is_changed(
        self, ministral: Path, uneven: Rows, tmp_path: Path, keys: dict[str, Any]
    ) -> None:
        saved = adapted(ministral, tmp_path / "saved", uneven)
        save_trained(saved.model, tmp_path, saved.config)
        other = adapted(ministral, tmp_path / "other", uneven, seed=2, **keys)
        before = {k: v.clone() for k, v in trained_tensors(other.model).items()}
        with pytest.raises(WorkError, match="belong to another model"):
            load_trained(other.model, tmp_path)
        after = trained_tensors(other.model)
        assert all(torch.equal(after[name], before[name]) for name in before)


class TestFullModel:
    def test_transformers_opens_it(self, any_model: Path, uneven: Rows, tmp_path: Path) -> None:
        run = training(tmp_path, settings(any_model, learning_rate=0.01), uneven)
        run.step(1, run.order.step(1))
        folder = export_trained(run.model, tmp_path, any_model, run.config)
        assert folder == tmp_path / "model"
        assert_same(logits(stock_model(folder)), logits(run.model))
        assert not torch.equal(logits(stock_model(folder)), logits(stock_model(any_model)))
        again = load_base(folder, settings(folder)).model
        assert torch.equal(logits(again), logits(run.model))

    def test_a_tied_head_stays_tied(self, uneven: Rows, tmp_path: Path) -> None:
        base = write_model(tmp_path / "tied", MINISTRAL3 | {"tie_word_embeddings": True})
        run = training(tmp_path / "run", settings(base, learning_rate=0.01), uneven)
        run.step(1, run.order.step(1))
        folder = export_trained(run.model, tmp_path, base, run.config)
        assert_same(logits(stock_model(folder)), logits(run.model))
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")

    def test_all_that_a_stock_load_reads_lies_beside_it(self, uneven: Rows, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3)
        kept = ["LICENSE", "SYSTEM_PROMPT.txt", "preprocessor_config.json", "tokenizer.json"]
        kept.append("tekken.json")
        for name in kept:
            (base / name).write_text(name)
        (base / "generation_config.json").write_text('{"temperature": 0.15, "do_sample": true}')
        for name in ("consolidated.safetensors", "params.json"):
            (base / name).write_text("the same weights once more")
        run = training(tmp_path / "run", settings(base), uneven)
        folder = export_trained(run.model, tmp_path, base, run.config)
        assert all((folder / name).read_text() == name for name in kept)
        assert not (folder / "params.json").exists()
        assert stock_model(folder).generation_config.temperature == 0.15

    def test_trained_tensors_come_back(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        config = settings(ministral, unfrozen_parameters=[r"model\.norm"], learning_rate=0.1)
        run = training(tmp_path / "one", config, uneven)
        run.step(1, run.order.step(1))
        save_trained(run.model, tmp_path, config)
        assert list(load_file(tmp_path / "trained.safetensors")) == ["model.norm.weight"]
        other = training(tmp_path / "two", config, uneven)
        load_trained(other.model, tmp_path)
        assert torch.equal(logits(other.model), logits(run.model))

    @pytest.mark.parametrize(
        "keys", [{"adapter": "lora"}, {"unfrozen_parameters": [r"model\.layers"]}], ids=str
    )
    def test_weights_of_another_training_are_refused(
        self, begin: Begin, ministral: Path, uneven: Rows, tmp_path: Path, keys: dict[str, Any]
    ) -> None:
        config = settings(ministral, unfrozen_parameters=[r"model\.norm"])
        save_trained(training(tmp_path / "one", config, uneven).model, tmp_path, config)
        other = begin("two", **keys)
        with pytest.raises(WorkError, match="belong to another model"):
            load_trained(other.model, tmp_path)

    def test_a_row_is_not_stretched_over_a_matrix(self, begin: Begin, tmp_path: Path) -> None:
        # Copying alone would spread one row of numbers over all of them.
        save_file({"lm_head.weight": torch.ones(1, 64)}, tmp_path / "trained.safetensors")
        with pytest.raises(WorkError, match=r"lm_head\.weight has no counterpart"):
            load_trained(begin("run", unfrozen_parameters=["lm_head"]).model, tmp_path)


@pytest.mark.parametrize("adapter", [None, "lora"])
class TestExport:
    def test_it_replaces_an_earlier_one_whole(
        self, begin: Begin, ministral: Path, tmp_path: Path, adapter: str | None
    ) -> None:
        run = begin(adapter=adapter)
        folder = export_trained(run.model, tmp_path, ministral, run.config)
        first = sorted(path.name for path in folder.iterdir())
        (folder / "stray").write_text("old")
        folder.with_name(f"{folder.name}.partial").mkdir()
        export_trained(run.model, tmp_path, ministral, run.config)
        assert sorted(path.name for path in folder.iterdir()) == first
        assert not list(tmp_path.glob("*.partial"))

    def test_a_link_in_its_place_goes_and_what_it_names_stays(
        self, begin: Begin, ministral: Path, tmp_path: Path, adapter: str | None
    ) -> None:
        run = begin(adapter=adapter)
        folder = export_trained(run.model, tmp_path, ministral, run.config)
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
        export_trained(run.model, tmp_path, ministral, run.config)
        assert not folder.is_symlink()
        ours, theirs = (
            {path.name: path.read_bytes() for path in each.iterdir()}
            for each in (folder, tmp_path / "elsewhere")
        )
        assert ours == theirs

    def test_a_file_in_its_place_is_named_and_stays(
        self, begin: Begin, ministral: Path, tmp_path: Path, adapter: str | None
    ) -> None:
        run = begin(adapter=adapter)
        taken = tmp_path / ("adapter" if adapter else "model")
        taken.write_text("kept")
        with pytest.raises(WorkError, match=r"Not a directory: .*Move away what stands there"):
            export_trained(run.model, tmp_path, ministral, run.config)
        assert taken.read_text() == "kept"

    def test_a_full_disk_is_a_sentence_and_leaves_the_earlier_one(
        self, begin: Begin, ministral: Path, tmp_path: Path, adapter: str | None
    ) -> None:
        run = begin(adapter=adapter)
        folder = export_trained(run.model, tmp_path, ministral, run.config)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with files_at_most(4096), pytest.raises(WorkError, match="could not be written"):
            export_trained(run.model, tmp_path, ministral, run.config)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

"""Memory that runs out: what is said, what makes room, and that a run goes on as if it had not."""

import functools
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.cli import main
from engine.config import RunConfig
from engine.events import Note, Saved, Shortage
from engine.plan import SAME_RESULT, estimate, next_rung
from engine.runs import RunFolder
from engine.train.out_of_memory import (
    LOADING,
    asked_bytes,
    is_out_of_memory,
    message_of,
    with_next_rung,
)
from tests.support.machines import at
from tests.support.trainers import (
    LORA,
    Workshop,
    events_of,
    figures,
    finish,
    hold_at_most,
    last_end,
)
from tests.support.written_runs import read_steps

KEYS = LORA | {
    "lora_dropout": 0.0,
    "max_steps": 4,
    "save_steps": 1,
    "sample_packing": False,
    "micro_batch_size": 32,
    "gradient_accumulation_steps": 1,
}


def small_card(tokens: int = 1000, from_step: int = 1) -> Callable[[], None]:
    return functools.partial(hold_at_most, tokens, from_step=from_step)


def small_card_with_pages(freed: Path) -> None:
    """A small card; bitsandbytes has a page in its list, of a state that nobody holds."""
    import bitsandbytes.functional as bnb

    from engine.train import optim

    class Runtime:
        def cudaFree(self, _: object) -> None:
            with freed.open("a") as file:
                file.write(f"{size}\n")

    manager, size = bnb.GlobalPageManager.get_instance(), 4096
    manager.paged_tensors = [torch.empty(size, dtype=torch.uint8)]
    setattr(optim, "cuda_runtime", Runtime)  # noqa: B010
    setattr(torch.cuda, "synchronize", lambda: None)  # noqa: B010
    hold_at_most(1000, from_step=3)


def out_of_memory(run: RunFolder) -> list[Shortage]:
    return [event for event in events_of(run) if isinstance(event, Shortage)]


class TestWithoutAutoFit:
    def test_ends_with_what_was_held_and_the_next_rung(self, workshop: Workshop) -> None:
        run = workshop.new()
        planned = {"peak_allocated_bytes": 10**6, "parts": {"linear": 900_000, "layer": 100_000}}
        run.plan.write_text(json.dumps({"estimate": planned}), "utf-8")
        assert finish(run, before=small_card()) == 1
        (facts,) = out_of_memory(run)
        assert facts.predicted_bytes == 10**6
        assert facts.predicted_parts == {"weights": 900_000, "activations": 100_000}
        assert facts.step == 1
        assert facts.asked_bytes
        assert sum(facts.parts.values()) >= facts.held_bytes
        assert facts.parts["weights"] > 0 < facts.parts["adapter"]
        assert re.fullmatch(r"rows\.jsonl line \d+, \d+ tokens", facts.longest)
        assert facts.changes == {"micro_batch_size": "16", "gradient_accumulation_steps": "2"}
        assert facts.saves_bytes > 0
        assert not facts.taken
        end = last_end(run)
        assert end.what.startswith("Memory ran out in step 1: ")
        assert "more were asked for" in end.what
        assert "1.0 MiB were predicted for its fullest moment." in end.why
        assert f"above that are the {facts.grew}, by " in end.why
        assert facts.longest in end.why
        assert f"`windtunnel resume {run.path} micro_batch_size=16 " in end.fix

    def test_command_resumes(
        self,
        workshop: Workshop,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """The one run here that starts the way a person's runs do, with nothing imported before:
        in a folder whose modules have the names of ours, which are not run."""
        for name in ("engine", "torch", "tests"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
        run = workshop.new()
        assert finish(run, before=small_card(from_step=3)) == 1
        assert [step.step for step in read_steps(run)] == [1, 2]
        (command,) = re.findall(r"`windtunnel (.*)`", last_end(run).fix)
        monkeypatch.chdir(tmp_path)
        assert main(shlex.split(command)) == 0
        capfd.readouterr()
        monkeypatch.undo()
        assert last_end(run).outcome == "finished"
        assert "not this one" not in run.log.read_text()
        assert run.adapter.is_dir()
        kept = sorted(path.name for path in run.path.glob("config*.yml"))
        assert kept == ["config-1.yml", "config.yml"]
        whole = workshop.finished()
        assert [f[0] for f in figures(run)] == [f[0] for f in figures(whole)]
        for after, before in zip(figures(run), figures(whole), strict=True):
            assert after == pytest.approx(before, rel=1e-4)

    def test_other_run_refused(self, workshop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
        run = workshop.new()
        assert finish(run, before=small_card(from_step=2)) == 1
        assert main(["resume", str(run.path), "lora_r=2"]) == 2
        assert "lora_r cannot change while a run goes on." in capfd.readouterr().err


class TestWithAutoFit:
    @pytest.mark.parametrize(
        "keys", [{}, pytest.param({"layer_offloading": True}, marks=pytest.mark.slow)], ids=str
    )
    def test_takes_the_rungs_itself(self, workshop: Workshop, keys: dict[str, bool]) -> None:
        run = workshop.new(auto_fit=True, **keys)
        assert finish(run, before=small_card(from_step=3)) == 0
        facts = out_of_memory(run)
        assert [each.changes["micro_batch_size"] for each in facts] == ["16", "8"]
        assert all(each.taken for each in facts)
        assert facts[0].step == 3
        assert last_end(run).outcome == "finished"
        notes = [e.text for e in events_of(run) if isinstance(e, Note)]
        assert any("goes on with micro_batch_size=16" in text for text in notes)
        assert not any("micro_batch_size was" in text for text in notes), "said twice"
        config = run.config.read_text("utf-8")
        assert '"micro_batch_size": 32' not in config
        assert '"auto_fit": true' in config
        saved = [e.step for e in events_of(run) if isinstance(e, Saved)]
        assert saved == [1, 2, 3, 4, 4], "no step is made twice"
        whole = workshop.finished()
        for after, before in zip(figures(run), figures(whole), strict=True):
            assert after == pytest.approx(before, rel=1e-4)

    def test_unified_memory_of_the_failed_attempt_is_given_back(self, workshop: Workshop) -> None:
        run = workshop.new(auto_fit=True)
        freed = run.path / "freed"
        assert finish(run, before=functools.partial(small_card_with_pages, freed)) == 0
        assert freed.read_text("utf-8") == "4096\n"

    def test_without_another_rung_it_ends_all_the_same(self, workshop: Workshop) -> None:
        keys = {"micro_batch_size": 1, "sequence_len": 1024, "gradient_checkpointing": True}
        run = workshop.new(auto_fit=True, **keys)
        assert finish(run, before=small_card(0)) == 1
        assert out_of_memory(run)
        assert not out_of_memory(run)[-1].taken
        assert last_end(run).outcome == "failed"


def no_room_for_the_model() -> None:
    """Loading asks torch's allocator for more than there is."""
    from engine.train import run

    def load_divided(*_: object, **__: object) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    pytest.MonkeyPatch().setattr(run, "load_divided", load_divided)  # this process is its own


def test_where_the_model_itself_has_no_room_no_batch_is_blamed(workshop: Workshop) -> None:
    run = workshop.new(auto_fit=True)
    assert finish(run, before=no_room_for_the_model) == 1
    (facts,) = out_of_memory(run)
    assert (facts.where, facts.changes) == (LOADING, {})
    assert "does not fit in this memory" in last_end(run).fix


def test_what_saves_too_little_is_joined_by_the_next() -> None:
    keys = {"adapter": "lora", "micro_batch_size": 2, "sequence_len": 16}
    config = RunConfig.model_validate({"base_model": "ministral-3-8b"} | keys)
    place = at("ministral-3-8b", "RTX 4090")
    peak = estimate(config, place).peak_allocated_bytes
    first = next_rung(config, place, only=SAME_RESULT)
    assert first is not None
    assert first.saves_bytes < peak / 50
    found = with_next_rung(Shortage(1, "step 1", peak), config, place.architecture, place.device)
    assert found.saves_bytes >= peak / 50
    assert set(first.changes) < set(found.changes)


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.6 GiB"
            " of which 1.12 GiB is free.",
            int(2.5 * 2**30),
        ),
        (
            "[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 16384000 bytes. Error code 12 (Cannot allocate memory)",
            16_384_000,
        ),
        ("out of memory", None),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", None),
        ("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY", None),
        ("cudaErrorMemoryAllocation", None),
        ("unable to mmap 68 bytes from file <m.safetensors>: Cannot allocate memory (12)", None),
    ],
)
def test_what_the_system_says(words: str, asked: int | None) -> None:
    error = RuntimeError(words)
    assert is_out_of_memory(error)
    assert asked_bytes(error) == asked
    assert "enforce" not in message_of(error)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    # Of a kernel that does not suit the card: less memory for the run would not help.
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory, Required: 98304"))

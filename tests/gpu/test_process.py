"""A whole run in a process of its own: it trains on the card, stops, goes on, and makes room.

On a card each trainer is a fresh process; in CI it is forked and enters the stand-in first. Only
`test_the_commands` starts `windtunnel` itself, which knows no stand-in: in CI it trains on the CPU.
"""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from engine.events import Shortage, Started, Step
from engine.runs import RunFolder
from tests.fakes import card as fake
from tests.fakes.processes import ROOT
from tests.support import trainers
from tests.support.card import Card
from tests.support.trainers import (
    LORA,
    QLORA,
    Workshop,
    events_of,
    figures,
    finish,
    hold_at_most,
    last_end,
    training,
    wait,
)

Hook = Callable[[], object]
KEYS = LORA | {"bf16": "auto", "max_steps": 6, "save_steps": 2}
SLOWEST_SECONDS = 120


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("card"), KEYS)


def begin(real: bool, then: Hook | None = None) -> None:
    """What a trainer of these tests does first."""
    if not real:
        fake.enter()
    if then:
        then()


@pytest.fixture
def trainer(card: Card, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hook]:
    """Makes the hook of a trainer on the card, with one more where it is given."""
    if card.real:  # a fork of a process that has looked at CUDA cannot use it
        monkeypatch.setattr(trainers, "_forks", lambda: multiprocessing.get_context("spawn"))
    return lambda then=None: functools.partial(begin, card.real, then)


def device(run: RunFolder) -> str:
    (started,) = {e.devices for e in events_of(run) if isinstance(e, Started)}
    (name,) = started
    return name


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, id="lora", marks=pytest.mark.slow),
        pytest.param(QLORA, id="qlora", marks=pytest.mark.slow),
        pytest.param({"optimizer": "paged_adamw_8bit"}, id="paged", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_equal_losses(
    card: Card, workshop: Workshop, trainer: Callable[..., Hook], keys: dict[str, Any]
) -> None:
    whole = workshop.new(**keys)
    assert finish(whole, before=trainer()) == 0, whole.log.read_text("utf-8")
    assert device(whole) == f"GPU-{card.uuid}"
    run = workshop.new(**keys)
    with training(run, steps=2, before=trainer()) as process:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        assert wait(process) == 0, run.log.read_text("utf-8")
    assert last_end(run).outcome in ("stopped", "finished")
    assert finish(run, "--resume", before=trainer()) == 0, run.log.read_text("utf-8")
    assert device(run) == f"GPU-{card.uuid}"
    for ours, theirs in zip(figures(run), figures(whole), strict=True):
        # Kernels of attention add up gradients in no fixed order on a card.
        assert ours == pytest.approx(theirs, rel=2e-3) if card.real else ours == theirs


def test_memory_that_runs_out_is_made_and_the_run_goes_on(
    card: Card, workshop: Workshop, trainer: Callable[..., Hook]
) -> None:
    keys = {
        "auto_fit": True,
        "lora_dropout": 0.0,
        "save_steps": 1,
        "max_steps": 4,
        "sample_packing": False,
        "micro_batch_size": 32,
        "gradient_accumulation_steps": 1,
    }
    run = workshop.new(**keys)
    small = functools.partial(hold_at_most, 2000, from_step=3)
    assert finish(run, before=trainer(small)) == 0, run.log.read_text("utf-8")
    told = [event for event in events_of(run) if isinstance(event, Shortage)]
    assert [each.step for each in told][:1] == [3]
    assert all(each.taken for each in told)
    assert told[0].changes["micro_batch_size"] == "16"
    assert told[0].held_bytes > 0
    assert last_end(run).outcome == "finished"


@pytest.mark.slow
def test_the_commands(
    card: Card, workshop: Workshop, record_property: Callable[[str, object], None]
) -> None:
    """train, generate and merge as a person types them; a row that is left out is named."""
    run = workshop.new(output_dir="out", excess_length_strategy="drop")
    home = run.path
    long = {"role": "user", "content": "so " * 4000}, {"role": "assistant", "content": "yes"}
    with (home / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": long}) + "\n")

    def windtunnel(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tui", *words],
            cwd=home,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=SLOWEST_SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "rows.jsonl line 41" in windtunnel("train", "config.yml")
    out = RunFolder(home / "out")
    assert device(out) == (f"GPU-{card.uuid}" if card.real else "cpu")
    speeds = [e.tokens_per_second for e in events_of(out) if isinstance(e, Step)]
    record_property("tokens/s of a tiny model", f"{speeds[-1]:.0f}")
    assert windtunnel("generate", "out", "--prompt", "Hello").strip()
    windtunnel("merge", "out", "--out", "merged")
    assert (home / "merged" / "config.json").is_file()

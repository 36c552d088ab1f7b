"""A run of several processes, real ones that nap: one lock, one end, and nobody left behind."""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.cli import main
from engine.events import Ended, Note, Saved, Shortage, Started
from engine.launch import Nodes, launch, resume_run
from engine.runs import Follower, RunFolder, ask, is_locked, status, summarize
from engine.runs.folder import list_checkpoints
from tests.fakes.processes import fake_environment, processes_of, wait_until
from tests.support.trainers import LORA, Workshop, figures
from tests.support.written_runs import read_steps

pytestmark = pytest.mark.usefixtures("home")

FAKE = "tests.fakes.engine"
KEYS = LORA | {"dp_shard_size": 2}


def start(
    run: RunFolder, *, max_restarts: int = 0, nodes: Nodes | None = None, **fake: object
) -> "subprocess.Popen[bytes]":
    return launch(
        run,
        detach=True,
        config=f"base_model: x\ndp_shard_size: 2\nmax_restarts: {max_restarts}\n",
        nodes=nodes or Nodes(),
        module=FAKE,
        environment=fake_environment(**fake),
    )


def start_steps(run: RunFolder, **given: Any) -> "subprocess.Popen[bytes]":
    """Its supervisor, once steps are done."""
    process = start(run, **given)
    wait_for_both(run)
    return process


def wait_for_both(run: RunFolder) -> None:
    wait_until(lambda: summarize(run).step > 2)
    wait_until(lambda: run.rank_log(1).is_file() and "is here" in run.rank_log(1).read_text())


def wait_for_steps(run: RunFolder) -> None:
    before = summarize(run).step
    wait_until(lambda: summarize(run).step > before, 120)


def rank_process(run: RunFolder, rank: int) -> int:
    for process in processes_of(run.path):
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        if b"RANK=%d" % rank in environment:
            return process
    raise AssertionError(f"rank {rank} does not live")


def events_of(run: RunFolder, kind: type[Any]) -> list[Any]:
    return [each.event for each in Follower(run.events).read() if isinstance(each.event, kind)]


def test_two_ranks_are_one_run(run: RunFolder) -> None:
    supervisor = start_steps(run)
    (started,) = events_of(run, Started)
    assert started.world_size == 2
    assert is_locked(run)
    assert "rank 1 of 2 is here" in run.rank_log(1).read_text()
    assert "rank 1" not in run.log.read_text()
    ranks = {rank_process(run, rank) for rank in range(2)}
    assert ranks | {supervisor.pid} == set(processes_of(run.path))
    for each in ranks:
        environment = Path(f"/proc/{each}/environ").read_bytes().split(b"\0")
        assert b"PYTHONSAFEPATH=1" in environment
    assert ask(run, "pause", timeout_seconds=60).outcome == "done"
    assert status(run) == "paused"
    ask(run, "resume", timeout_seconds=60)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(60) == 0
    assert status(run) == "stopped"
    assert [end.outcome for end in events_of(run, Ended)] == ["stopped"]
    assert not processes_of(run.path)


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, "It printed nothing."),
        (1, "Its last words: rank 1 of 2 is here."),
        pytest.param(1, "It printed nothing.", id="killed before its log is there"),
    ],
)
def test_a_killed_rank_ends_the_run_with_a_sentence(run: RunFolder, rank: int, words: str) -> None:
    supervisor = start_steps(run)
    ask(run, "save", timeout_seconds=60)
    if rank and "words" not in words:
        run.rank_log(rank).unlink()
    os.kill(rank_process(run, rank), signal.SIGKILL)
    assert supervisor.wait(60) == 1
    assert not processes_of(run.path)
    assert status(run) == "failed"
    (ended,) = events_of(run, Ended)
    assert ended.what.startswith(f"Rank {rank} of 2 was ended by SIGKILL")
    assert ended.why == words
    assert str(run.rank_log(rank)) in ended.fix


def test_no_rank_outlives_its_supervisor_and_the_run_goes_on(run: RunFolder) -> None:
    supervisor = start_steps(run)
    ask(run, "save", timeout_seconds=60)
    supervisor.kill()
    supervisor.wait()
    wait_until(lambda: not processes_of(run.path), 5)
    assert status(run) == "lost"
    saved = int((run.checkpoints / "LATEST").read_text().removeprefix("step-"))
    steps = fake_environment(steps=saved + 2)
    resumed = resume_run(run, module=FAKE, environment=steps)
    assert resumed.process is not None
    assert resumed.process.wait(60) == 0
    assert status(run) == "finished"
    assert [each.world_size for each in events_of(run, Started)] == [2, 2]


def test_a_rank_that_fails_ends_the_run_with_its_own_sentences(run: RunFolder) -> None:
    assert start(run, rank_fails=1).wait(60) == 1
    (ended,) = events_of(run, Ended)
    assert (ended.what, ended.why, ended.fix) == ("The row is bad.", "It has no end.", "Mend it.")
    assert not processes_of(run.path)


@pytest.mark.slow
def test_a_run_goes_on_by_itself_as_often_as_it_may(run: RunFolder) -> None:
    supervisor = start_steps(run, max_restarts=1, rank_fails=1)
    wait_until(lambda: len(events_of(run, Started)) == 2)
    (note,) = events_of(run, Note)
    assert note.text.startswith("The row is bad. It has no end.")
    assert "restart 1 of 1" in note.text
    os.kill(rank_process(run, 1), signal.SIGKILL)
    assert supervisor.wait(60) == 1
    assert status(run) == "failed"


@pytest.mark.slow
def test_two_computers_are_one_run(run: RunFolder) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        nodes = Nodes(2, f"localhost:{free.getsockname()[1]}")
    with ThreadPoolExecutor() as pool:
        begun = [pool.submit(start, run, nodes=nodes) for _ in range(2)]
        computers = [each.result() for each in begun]
    wait_for_both(run)
    assert [each.world_size for each in events_of(run, Started)] == [2]
    os.kill(rank_process(run, 1), signal.SIGKILL)
    assert [each.wait(60) for each in computers] == [1, 1]
    (ended,) = events_of(run, Ended)
    assert ended.what.startswith("Rank 1 of 2 was ended by SIGKILL"), "told by the other computer"
    assert not processes_of(run.path)


class TestRealRanks:
    """The same with the trainer itself, on a tiny model."""

    @pytest.mark.slow
    def test_a_signal_saves_at_one_step_and_the_run_goes_on(self, workshop: Workshop) -> None:
        run = workshop.new()
        supervisor = launch(run, detach=True)
        wait_until(lambda: summarize(run).step >= 4)
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(60) == 0
        assert status(run) == "stopped"
        assert (run.checkpoints / "LATEST").read_text() == f"step-{summarize(run).step}"
        assert not processes_of(run.path)
        resumed = resume_run(run)
        assert resumed.process is not None
        assert resumed.process.wait(120) == 0
        whole = workshop.new()
        assert launch(whole, detach=True).wait(120) == 0
        assert figures(run) == figures(whole)

    @pytest.mark.slow
    def test_a_run_of_two_ranks_goes_on_with_one(
        self, workshop: Workshop, capfd: pytest.CaptureFixture[str]
    ) -> None:
        keys = {"lora_dropout": 0.0, "max_steps": 8, "save_steps": 4, "learning_rate": 1e-3}
        run = workshop.new(**keys)
        assert launch(run, detach=True).wait(240) == 0
        two = figures(run)
        shutil.rmtree(run.checkpoints / "step-8")
        given = ["resume", str(run.path), "--from", "step-4"]
        assert main([*given, "dp_shard_size=3"]) == 2
        assert "3 ranks cannot share the 4 micro-batches" in capfd.readouterr().err
        assert main([*given, "dp_shard_size=1"]) == 0
        assert [each.world_size for each in events_of(run, Started)] == [2, 1]
        notes = [each.text for each in events_of(run, Note)]
        for said in ("dp_shard_size was 2", "gradient_accumulation_steps was 2"):
            assert sum(text.startswith(f"{said} until step-4") for text in notes) == 1
        for ours, theirs in zip(figures(run), two, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        shared = [step.rank_peak_bytes is not None for step in read_steps(run)]
        assert shared == [True] * 4 + [False] * 4

    @pytest.mark.slow  # minutes: twenty launches of two ranks
    def test_twenty_kills_lose_nothing_that_was_saved(self, workshop: Workshop) -> None:
        keys = {"max_steps": 400, "save_steps": 4}
        run, chance = workshop.new(**keys), random.Random(7)
        supervisor, saved = launch(run, detach=True), 0
        victims = [None, 0, 1, chance.randrange(2)] * 5  # None is the launcher
        chance.shuffle(victims)
        for victim in victims:
            wait_for_steps(run)
            time.sleep(chance.random() / 2)
            os.kill(supervisor.pid if victim is None else rank_process(run, victim), signal.SIGKILL)
            supervisor.wait(60)
            wait_until(lambda: not processes_of(run.path), 10)
            assert status(run) == ("lost" if victim is None else "failed")
            latest = max([0, *(each.step for each in events_of(run, Saved))])
            assert latest >= saved, "what was acknowledged is there"
            assert not latest or f"step-{latest}" in list_checkpoints(run.checkpoints)
            saved = latest
            resumed = resume_run(run)
            assert resumed.process is not None
            supervisor = resumed.process
        assert supervisor.wait(300) == 0
        assert not processes_of(run.path)
        whole = workshop.new(**keys)
        assert launch(whole, detach=True).wait(300) == 0
        assert figures(run) == figures(whole)

    @pytest.mark.slow
    def test_ranks_that_are_started_again_find_each_other(self, workshop: Workshop) -> None:
        keys = {"max_steps": 24, "save_steps": 2, "max_restarts": 1}
        run = workshop.new(**keys)
        supervisor = launch(run, detach=True)
        wait_until(lambda: summarize(run).step > 4)
        os.kill(rank_process(run, 1), signal.SIGKILL)
        assert supervisor.wait(120) == 0
        (note,) = (each.text for each in events_of(run, Note) if "restart" in each.text)
        assert "Rank 1 of 2 was ended by SIGKILL" in note
        whole = workshop.new(**keys)
        assert launch(whole, detach=True).wait(120) == 0
        assert figures(run) == figures(whole)

    @pytest.mark.slow
    def test_all_ranks_take_the_rung_that_makes_room_on_one(self, workshop: Workshop) -> None:
        batch = {"micro_batch_size": 16, "gradient_accumulation_steps": 1, "sample_packing": False}
        keys = batch | {"max_steps": 4, "save_steps": 1, "lora_dropout": 0.0}
        run = workshop.new(auto_fit=True, **keys)
        assert launch(run, detach=True, module="tests.support.short_rank").wait(240) == 0
        told = events_of(run, Shortage)
        assert [(each.step, each.changes["micro_batch_size"]) for each in told] == [(3, "8")]
        assert told[0].taken
        notes = [each.text for each in events_of(run, Note)]
        assert sum("goes on with micro_batch_size=8" in text for text in notes) == 1
        assert not any("restart" in text for text in notes)
        assert len(events_of(run, Ended)) == 1
        assert not processes_of(run.path)
        whole = workshop.new(**keys)
        assert launch(whole, detach=True).wait(120) == 0
        for after, before in zip(figures(run), figures(whole), strict=True):
            assert after == pytest.approx(before, rel=1e-4)

    @pytest.mark.slow
    def test_a_rank_without_room_ends_the_run_with_what_would_make_some(
        self, workshop: Workshop
    ) -> None:
        batch = {"micro_batch_size": 16, "gradient_accumulation_steps": 1, "sample_packing": False}
        run = workshop.new(**batch, max_steps=4)
        assert launch(run, detach=True, module="tests.support.short_rank").wait(240) == 1
        (told,) = events_of(run, Shortage)
        assert not told.taken
        (ended,) = events_of(run, Ended)
        assert ended.what.startswith("Memory ran out in step 3: ")
        assert f"`windtunnel resume {run.path} micro_batch_size=8 " in ended.fix
        assert not processes_of(run.path)

"""Commands to a live run: each is answered, and does what its word says."""

import json
import time
from collections.abc import Iterator

import pytest

from engine.events import Ack, Sample, Saved
from engine.runs import Request, RunFolder, ask, send, status
from tests.fakes.processes import wait_until
from tests.support.run_folders import read_steps
from tests.support.trainers import LORA, Workshop, events_of, last_end, start, training, wait

KEYS = LORA | {"max_steps": 5_000, "save_steps": 5_000, "lr_scheduler": "constant"}
QUESTION = "How many knots is force 3?"


@pytest.fixture(scope="module")
def long_run(workshop: Workshop) -> Iterator[RunFolder]:
    run = workshop.new()
    with training(run, steps=2):
        assert outcome(run, "pause") == "done"
        yield run


@pytest.fixture
def live(long_run: RunFolder) -> Iterator[RunFolder]:
    """A run that trains; one for many tests, paused between them."""
    assert outcome(long_run, "resume") == "done"
    yield long_run
    assert outcome(long_run, "pause") == "done"


def outcome(run: RunFolder, word: Request) -> str:
    return ask(run, word, timeout_seconds=60).outcome


def test_a_paused_run_makes_no_step_until_it_is_resumed(live: RunFolder) -> None:
    assert outcome(live, "pause") == "done"
    before = len(read_steps(live))
    assert status(live) == "paused"
    time.sleep(0.5)
    assert len(read_steps(live)) == before
    assert outcome(live, "resume") == "done"
    wait_until(lambda: len(read_steps(live)) > before + 1, 60)
    assert status(live) == "running"


def test_a_paused_run_saves_and_stays_paused(live: RunFolder) -> None:
    outcome(live, "pause")
    done = len(read_steps(live))
    assert outcome(live, "save") == "done"
    assert Saved(done, f"checkpoints/step-{done}") in events_of(live)
    assert (live.checkpoints / "LATEST").read_text() == f"step-{done}"
    assert status(live) == "paused"
    assert len(read_steps(live)) == done


def test_a_paused_run_can_be_stopped(workshop: Workshop) -> None:
    run = workshop.new()
    with training(run, steps=2) as process:
        outcome(run, "pause")
        done = len(read_steps(run))
        assert outcome(run, "stop") == "done"
        assert wait(process) == 0
    assert (last_end(run).outcome, last_end(run).step) == ("stopped", done)
    assert (run.checkpoints / "LATEST").read_text() == f"step-{done}"
    assert status(run) == "stopped"


def test_a_save_is_answered_when_it_is_on_the_disk(live: RunFolder) -> None:
    answer = ask(live, "save", timeout_seconds=60)
    events = events_of(live)
    saved = events[events.index(answer) - 1]
    assert isinstance(saved, Saved)
    assert (live.path / saved.path / "state.json").is_file()


def test_a_sample_is_answered_with_what_the_model_says_now(workshop: Workshop) -> None:
    run = workshop.new(sample_prompts=[QUESTION])
    with training(run, steps=1):
        outcome(run, "pause")
        assert outcome(run, "sample") == "done"
        samples = [event for event in events_of(run) if isinstance(event, Sample)]
        assert [(s.prompt, s.when) for s in samples] == [(QUESTION, "before"), (QUESTION, "during")]
        assert samples[1].step == len(read_steps(run))
        assert samples[0].text


def test_commands_of_before_the_start_mean_nothing(workshop: Workshop) -> None:
    run = workshop.new(max_steps=2)
    old = [
        {"id": f"old-{word}", "command": word, "time": time.time() - 5}
        for word in ("stop", "pause", "save", "sample")
    ]
    run.control.write_text("".join(json.dumps(each) + "\n" for each in old))
    assert wait(start(run)) == 0
    assert last_end(run).outcome == "finished"
    assert not [event for event in events_of(run) if isinstance(event, Ack)]


def test_lines_that_are_no_commands_do_no_harm(live: RunFolder) -> None:
    with live.control.open("ab") as file:
        file.write(b'\xff\x00 no json\n{"id": "x", "command": "explode", "time": 9e9}\n[]\n')
    assert outcome(live, "save") == "done"


def test_each_of_many_commands_at_once_is_answered(live: RunFolder) -> None:
    words: list[Request] = ["save", "pause", "save", "resume"]
    identities = [send(live, word) for word in words]

    def answered() -> list[str]:
        return [event.id for event in events_of(live) if isinstance(event, Ack)]

    wait_until(lambda: set(identities) <= set(answered()), 60)
    assert sorted(answered()) == sorted(set(answered()))

"""Whether a stopped run goes on to the same losses, asked of three trainers."""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from engine.errors import UserError, WorkError
from engine.events import Eval, Recorded, Step
from engine.wizard.verify import SAVED, STEPS, Proof, verify_resume
from tests.fakes.engine import step_event
from tests.fakes.processes import processes_of, wait_until

MADE = tuple(step_event(step) for step in range(1, STEPS + 1))


def moved(steps: tuple[Step, ...], by: float) -> tuple[Step, ...]:
    return tuple(replace(step, grad_norm=step.grad_norm * (1 + by)) for step in steps)


@pytest.mark.parametrize(
    ("again", "resumed", "holds", "said"),
    [
        (0.0, 0.0, True, "are equal, bit for bit"),
        (1e-3, 0.0, True, "are equal, bit for bit"),
        (1e-3, 1.5e-3, True, "differ by 1.5e-03 from an unbroken run's, and two that nobody"),
        (1e-3, 1e-2, False, "while two that nobody stopped differ by 1.0e-03 here"),
        (0.0, 1e-9, False, "while two that nobody stopped are equal here"),
    ],
)
def test_the_verdict(again: float, resumed: float, holds: bool, said: str) -> None:
    proof = Proof(MADE, moved(MADE, again), moved(MADE[SAVED:], resumed))
    assert proof.holds == holds
    assert said in proof.verdict()
    assert proof.document()["same"] == holds


@pytest.mark.parametrize("place", [0, 1])
def test_a_number_that_is_none_equals_only_another_one(place: int) -> None:
    lost = tuple(
        replace(step, grad_norm=math.nan) if at == place else step
        for at, step in enumerate(MADE[SAVED:])
    )
    assert not Proof(MADE, MADE, lost).holds
    unmeasured = tuple(replace(step, grad_norm=math.nan) for step in MADE)
    assert Proof(unmeasured, unmeasured, unmeasured[SAVED:]).difference == 0


@pytest.mark.parametrize(("loss", "holds"), [(1.5, True), (1.5000001, False)])
def test_an_evaluation_after_the_resume_counts(loss: float, holds: bool) -> None:
    again: list[Step | Eval] = [Eval(0, 3.0), *MADE[:2], Eval(2, 2.0)]
    again += [*MADE[2:4], Eval(4, 1.5), *MADE[4:]]
    resumed: list[Step | Eval] = [*MADE[2:4], Eval(4, loss), *MADE[4:]]
    proof = Proof(MADE, again, resumed)
    assert proof.holds == holds
    assert "steps 3 to 5, an evaluation between them, after a kill" in proof.verdict()
    assert proof.document()["evaluations"] == [[1.5], [loss]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yml"
    path.write_text(
        "base_model: demo-tiny\ndatasets: [{path: rows.jsonl, type: chat_template}]\n"
        "learning_rate: 1e-4\noutput_dir: here/out\nwarmup_ratio: 0.1\nevals_per_epoch: 2\n"
        "val_set_size: 0.1\nload_best_model_at_end: true\nsave_strategy: epoch\n"
    )
    return path


Verify = Callable[[], Proof]


@pytest.fixture
def seen() -> list[Recorded]:
    """What was shown."""
    return []


@pytest.fixture
def verify(config: Path, seen: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> Iterator[Verify]:
    """The proof with fake trainers, whose folder has to be gone after it."""
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.01")
    said: list[str] = []

    def prove() -> Proof:
        return verify_resume(
            config,
            (),
            None,
            home=None,
            module="tests.fakes.engine",
            say=said.append,
            show=seen.append,
        )

    yield prove
    assert said
    assert os.listdir(config.parent / "here") == []


@pytest.mark.parametrize("forgets", ["0", "1e-12"])
def test_three_are_compared(verify: Verify, monkeypatch: pytest.MonkeyPatch, forgets: str) -> None:
    monkeypatch.setenv("FAKE_FORGETS", forgets)
    proof = verify()
    assert proof.unbroken == proof.again == MADE
    assert [step.step for step in proof.resumed] == [3, 4, 5]
    assert proof.holds == (forgets == "0")


def test_a_trainer_that_fails_says_why(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAILS_AT", "2")
    with pytest.raises(UserError, match="It diverged"):
        verify()


def test_one_that_dies_is_quoted(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LAST_WORDS", "no such card")
    with pytest.raises(WorkError, match="no such card"):
        verify()


def test_an_interrupt_leaves_neither_folder_nor_trainer(
    verify: Verify, config: Path, seen: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP_SECONDS", "60")

    def interrupt() -> None:
        wait_until(lambda: bool(seen))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        verify()
    assert not processes_of(config.parent / "here")

"""The events of a run add up to the same history, read at once or bit by bit."""

import dataclasses
import math
from pathlib import Path

from engine.events import (
    Ack,
    Answers,
    Drift,
    Ended,
    Eval,
    Event,
    Note,
    Phase,
    Recorded,
    Saved,
    Score,
    Started,
)
from engine.runs import Follower
from engine.runs.history import Answer, History
from tests.support.written_runs import AFTER, BEFORE, PROMPT, step_event, written_run


def history_of(*events: Event) -> History:
    history = History()
    history.add(Recorded(seq, 100.0 + seq, event) for seq, event in enumerate(events))
    return history


def test_a_written_run_gives_curves_answers_and_a_log(tmp_path: Path) -> None:
    history = History()
    history.add(Follower(written_run(tmp_path / "run").events).read())
    assert (history.steps_done, history.total_steps) == (61, 99)
    assert history.best == (60, 0.731)
    assert math.isclose(history.seconds_left, 38 * 8.9)
    assert history.answers[PROMPT][0] == Answer("before", BEFORE)
    assert history.answers[PROMPT][-1] == Answer("step 60", AFTER)
    assert history.log[-1].event == Saved(60, "checkpoints/step-60")
    assert (history.log[-2].event, history.log[-2].best) == (Eval(60, 0.731), 0.768)


def test_a_step_that_is_repeated_supersedes_what_followed_it() -> None:
    steps = [step_event(step) for step in range(1, 11)]
    again = [step_event(step, loss=9.0) for step in range(6, 8)]
    history = history_of(*steps, Eval(10, 0.5), Eval(4, 0.7), *again)
    assert history.steps_done == 7
    assert [x for x, _ in history.loss.raw.points()] == [1, 2, 3, 4, 5, 6, 7]
    assert history.loss.last == 9.0
    assert history.held_out == [(4, 0.7)]


def timed(*events: tuple[float, Event]) -> History:
    history = History()
    history.add(Recorded(seq, time, event) for seq, (time, event) in enumerate(events))
    return history


STARTED = Started("run", "model", "lora", ("cpu",), 0, 6, 100)
STEPS = [dataclasses.replace(step_event(n, 6), seconds=2.0) for n in range(1, 7)]


def test_what_is_done_after_the_last_step_is_part_of_the_time_that_is_left() -> None:
    """Four steps of 2 s, and a last evaluation as long as the first one, 30 s."""
    history = timed((0, STARTED), (30, Eval(0, 1.0)), (32, STEPS[0]), (34, STEPS[1]))
    assert history.seconds_left == 4 * 2.0 + 30


def test_evaluations_in_between_come_again_and_a_pause_does_not() -> None:
    begun: list[tuple[float, Event]] = [
        (0.0, STARTED),
        (2.0, STEPS[0]),
        (4.0, STEPS[1]),
        (14.0, Eval(2, 1.0)),
    ]
    history = timed(*begun, (16.0, STEPS[2]))
    assert history.seconds_left == 3 * (2.0 + 10 / 2) + 10
    paused = timed(*begun, (16.0, STEPS[2]), (900.0, Ack("1", "resume", "done")), (902.0, STEPS[3]))
    assert paused.seconds_left == 2 * (2.0 + 10 / 3) + 10


def test_losses_that_are_no_number_are_remembered_by_their_first_step() -> None:
    steps = [step_event(step, loss=math.nan if step >= 4 else 1.0) for step in range(1, 7)]
    assert history_of(*steps).nan_since == 4
    assert history_of(*steps, step_event(7)).nan_since is None


def test_rises_of_the_held_out_loss_are_counted_in_a_row() -> None:
    evals = [Eval(step, loss) for step, loss in enumerate((1.0, 0.8, 0.9, 0.85, 0.86, 0.87))]
    assert history_of(*evals).rises == 2


def test_a_new_launch_is_not_over_because_the_last_one_was() -> None:
    ended = Ended("failed", 3, "It broke.", "Why.", "Fix.")
    assert history_of(step_event(3), ended).ended == ended
    assert history_of(step_event(3), ended, Phase("import")).ended is None


def test_acks_are_found_by_the_id_of_their_command() -> None:
    ack = Ack("abc", "pause", "done")
    assert history_of(ack).acks == {"abc": ack}


def test_notes_keep_their_level_and_saves_their_path() -> None:
    history = history_of(Note("warning", "careful"), Saved(3, "adapter"))
    assert [logged.event for logged in history.log] == [
        Note("warning", "careful"),
        Saved(3, "adapter"),
    ]


def test_a_run_without_a_total_has_no_time_left() -> None:
    assert math.isnan(History().seconds_left)
    started = Started("r", "m", "lora", ("cpu",), 1, 10, 5)
    assert math.isnan(history_of(started).seconds_left)


def test_the_figures_are_those_of_the_last_evaluation_of_held_out_rows() -> None:
    score = Score(10, "held out", 0.9, 0.2, 8, {"think": 1.25, "text": 0.5})
    written, drift = Answers(10, "held out", 8, 0.875, 1.1, 0.2), Drift(10, 0.123, 900)
    train = Score(10, "train", 0.1, 1.0, 8, {"think": 0.1, "text": 0.1})
    history = history_of(score, train, written, drift)
    assert history.figures == (score, written, drift)
    assert [logged.event for logged in history.log] == [score, written, drift]

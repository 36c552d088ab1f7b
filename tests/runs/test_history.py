"""The events of a run added up, to curves of bounded length."""

import math
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

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
from engine.runs.history import CAPACITY, Answer, History, Series, Smoothed, Stream, finite
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
STEPS = [structs.replace(step_event(n, 6), seconds=2.0) for n in range(1, 7)]


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
    assert [each.event for each in history.log] == [Note("warning", "careful"), Saved(3, "adapter")]


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


VALUES = st.lists(
    st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=300
)


def stream_of(values: list[float], repeat: int = 1) -> Stream:
    stream = Stream()
    for x, y in enumerate(values * repeat):
        stream.add(x, y)
    return stream


@settings(max_examples=30, deadline=None)
@given(VALUES, st.integers(1, 30))
def test_the_highest_and_the_lowest_value_are_always_drawn(values: list[float], times: int) -> None:
    real = [y for y in values if math.isfinite(y)]
    drawn = finite(stream_of(values, times).points())
    assert bool(real) == bool(drawn)
    if real:
        assert (min(drawn), max(drawn)) == (min(real), max(real))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.data())
def test_a_single_spike_is_drawn_where_it_was(length: int, data: st.DataObject) -> None:
    places = st.integers(0, length - 1)
    up, down = data.draw(places), data.draw(places)
    values = [0.0] * length
    values[up] += 9.0
    values[down] -= 5.0
    points = stream_of(values).points()
    assert (float(up), values[up]) in points
    assert (float(down), values[down]) in points


@settings(max_examples=30, deadline=None)
@given(VALUES, st.integers(1, 30))
def test_points_are_given_values_from_left_to_right(values: list[float], times: int) -> None:
    given_values = values * times
    points = stream_of(values, times).points()
    steps = [x for x, _ in points]
    assert steps == sorted(steps)
    for x, y in points:
        was = given_values[int(x)]
        assert y == was or (math.isnan(y) and not math.isfinite(was))


def test_a_long_run_takes_no_more_memory_than_a_short_one() -> None:
    stream = Stream()
    for x in range(100_000):
        stream.add(x, 1000.0 if x == 77_777 else math.sin(x))
        assert len(stream) <= CAPACITY
    assert (77_777, 1000.0) in stream.points()


def test_a_stretch_without_a_number_is_a_gap() -> None:
    points = stream_of([1.0, math.nan, math.inf, 2.0]).points()
    assert [math.isnan(y) for _, y in points] == [False, True, True, False]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=200), st.data())
def test_what_a_resume_repeats_replaces_it(values: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(values) - 1))
    stream = stream_of(values)
    stream.rewind(cut)
    for x in range(cut, len(values)):
        stream.add(x, 7.0)
    assert stream.points() == stream_of([*values[:cut], *[7.0] * (len(values) - cut)]).points()


def test_a_rewind_into_a_merged_stretch_leaves_no_point_right_of_it() -> None:
    stream = stream_of([float(x % 10) for x in range(5000)])
    stream.rewind(3001)
    assert stream.points()[-1][0] <= 3000


def test_the_average_of_equal_values_is_that_value_from_the_first_on() -> None:
    average = Smoothed(50)
    assert [round(average.add(3.0), 9) for _ in range(5)] == [3.0] * 5


def test_the_average_leaves_out_what_is_no_number() -> None:
    average = Smoothed(3)
    assert math.isnan(average.add(math.nan))
    assert average.add(2.0) == 2.0
    assert average.add(math.inf) == 2.0


def test_a_rewound_average_goes_on_from_where_it_was() -> None:
    series, straight = Series(Smoothed(5)), Series(Smoothed(5))
    for x in range(40):
        series.add(x, float(x))
    series.rewind(20)
    for x in range(20):
        straight.add(x, float(x))
    assert series.smooth.last == straight.smooth.last
    assert series.last == 19.0

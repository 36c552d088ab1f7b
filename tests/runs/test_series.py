"""Curves keep every spike, in bounded memory, whatever the run does."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.runs.history import CAPACITY, Series, Smoothed, Stream, finite

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
def test_what_a_resume_repeats_replaces_what_was_there(
    values: list[float], data: st.DataObject
) -> None:
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
    series, straight = Series(span=5), Series(span=5)
    for x in range(40):
        series.add(x, float(x))
    series.rewind(20)
    for x in range(20):
        straight.add(x, float(x))
    assert series.smooth.last == straight.smooth.last
    assert series.last == 19.0

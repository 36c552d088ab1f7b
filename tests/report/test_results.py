"""The table at the end of a run holds what its events say, and nothing that they do not."""

import pytest

from engine.events import Answers, Drift, Event, Score
from engine.report.run import describe_results
from engine.units import counted, nats, spoken

BY_KIND = {"think": 2.0, "text": 1.0, "call": 0.5, "eos": 0.1}
AFTER = {"think": 1.5, "text": 0.75, "call": 0.25, "eos": 0.0}
COUNTS = dict.fromkeys(BY_KIND, 10)
BEFORE: list[Event] = [
    Score(0, "held", 1.6, 0.0, 50, BY_KIND, COUNTS),
    Answers(0, "held", 8, 0.5, 2.0, 0.0, 4, 0.25),
    Drift(0, 0.0, 500),
]
INSIDE: list[Event] = [Score(10, "held", 1.2, 0.0, 50, BY_KIND, COUNTS), Drift(10, 0.5, 500)]
LAST: list[Event] = [
    Score(20, "held", 0.9, 0.25, 50, AFTER, COUNTS),
    Answers(20, "held", 8, 1.0, 1.0, 0.125, 4, 0.75),
    Drift(20, 0.125, 500),
]


def test_the_first_evaluation_stands_beside_the_last() -> None:
    assert describe_results([*BEFORE, *INSIDE, *LAST]) == [
        "                                         before    after",
        "held: loss                                1.600    0.900",
        "  loss of thinking                        2.000    1.500",
        "  loss of answers                         1.000    0.750",
        "  loss of tool calls                      0.500    0.250",
        "  answers word for word                      0%      25%",
        "  stop by themselves                        50%     100%",
        "  length against the reference             2.00     1.00",
        "  right calls, valid arguments              25%      75%",
        "drift on general questions (nats)          0.00     0.12",
    ]


def test_one_kind_alone_is_not_told_twice() -> None:
    told = [Score(step, "held", 1.0, 0.0, 9, {"text": 1.0}, {"text": 9}) for step in (0, 5)]
    assert [line.split("  ")[0] for line in describe_results(told)[1:]] == ["held: loss", ""]
    assert not any("loss of" in line for line in describe_results(told))


def test_a_run_without_two_evaluations_has_no_table() -> None:
    assert describe_results([]) == []
    assert describe_results(BEFORE) == []


def test_a_name_cannot_reach_the_terminal() -> None:
    told = [Score(step, "a\x1b]52;c;x\x07", 1.0, 0.0, 9) for step in (0, 5)]
    assert not any("\x1b" in line or "\x07" in line for line in describe_results(told))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (1.4, "1 second"),
        (40, "40 seconds"),
        (720, "12 minutes"),
        (12_600, "3.5 hours"),
        (172_800, "2.0 days"),
    ],
)
def test_a_length_of_time_has_the_noun_that_its_number_asks_for(seconds: float, words: str) -> None:
    assert spoken(seconds) == words


def test_one_of_a_thing_has_no_s_and_thousands_have_a_comma() -> None:
    assert (counted(0, "row"), counted(1, "row")) == ("0 rows", "1 row")
    assert counted(1_200, "row") == "1,200 rows"


def test_a_loss_has_three_decimals() -> None:
    assert nats(0.41249) == "0.412"

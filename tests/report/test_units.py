"""Counts, times and losses are spelled in one way, and one of a thing is one."""

import pytest

from engine.units import counted, nats, spoken


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

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "␛[2J"),
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("\x9b31m", "⟨U+009B⟩31m"),
        ("a\rb\x00\x7f", "a␍b␀␡"),
        ("\u202egpj.exe", "⟨U+202E⟩gpj.exe"),
        ("\udcff", "⟨U+DCFF⟩"),
        ("\ufeffzero\u200bwidth", "⟨U+FEFF⟩zero⟨U+200B⟩width"),
        ("tag\U000e0041", "tag⟨U+E0041⟩"),
        ("[bold] naïve 👩‍👩‍👧 می‌خواهم", "[bold] naïve 👩‍👩‍👧 می‌خواهم"),
    ],
)
def test_what_a_terminal_acts_on_becomes_a_mark(text, shown):
    assert visible(text) == shown


def test_line_feeds_and_tabs_stay_unless_one_line_is_asked_for():
    assert visible("a\n\tb") == "a\n\tb"
    assert visible("a\n\tb", one_line=True) == "a␊␉b"


@given(st.text(st.characters(exclude_categories=())))
def test_no_control_character_is_left_and_the_rest_can_be_printed(text):
    shown = visible(text, one_line=True)
    assert not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in shown)
    shown.encode("utf-8")  # raises for a lone surrogate

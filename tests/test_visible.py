import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.visible import fold, visible


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


def test_a_long_line_is_folded_after_words_and_else_anywhere():
    assert fold("the quick brown fox", 10) == ["the quick ", "brown fox"]
    assert fold("abcdefgh", 3) == ["abc", "def", "gh"]
    assert fold("", 3) == [""]
    assert fold("abcdefgh", None) == ["abcdefgh"]


def test_a_wide_letter_takes_two_cells_and_an_accent_or_our_own_escape_none():
    assert fold("東京の天気", 4) == ["東京", "の天", "気"]
    assert fold("e\u0301e\u0301e\u0301", 2) == ["e\u0301e\u0301", "e\u0301"]
    assert fold("\x1b[4mab\x1b[24m", 2) == ["\x1b[4mab\x1b[24m"]


def test_a_space_that_would_start_a_line_of_its_own_is_left_out():
    assert fold("abc def", 3) == ["abc", "def"]


@given(st.text("ab 東\u0301", max_size=60), st.integers(2, 12))
def test_folding_loses_no_letter(text, columns):
    assert "".join(fold(text, columns)).replace(" ", "") == text.replace(" ", "")

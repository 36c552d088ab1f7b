"""The help pages: each fits a terminal, and what it tells to type is understood."""

import re
import shlex
from pathlib import Path

import pytest

from tests.support.commands import Call

PAGES = sorted((Path(__file__).parents[2] / "engine" / "help").glob("*.md"))


def test_the_pages_are_listed_with_their_titles(call: Call) -> None:
    topics = call.document("help")["topics"]
    assert topics.keys() == {page.stem for page in PAGES}
    assert all(f"{name} " in call("help")[1] and title for name, title in topics.items())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_tells_to_type_is_understood(page: Path, call: Call) -> None:
    code, text, _ = call("help", page.stem)
    assert (code, text) == (0, page.read_text("utf-8"))
    assert all(len(line) <= 80 or line.startswith("    ") for line in text.splitlines())
    commands = re.findall(r"^    windtunnel (.*)$", text, re.MULTILINE)
    assert commands
    for words in map(shlex.split, commands):
        explained = call(words[0], "--help")[1]
        options = {word for word in words if word.startswith("-")}
        assert all(option in explained for option in options), words

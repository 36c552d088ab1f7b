"""Conversations written by hand, rendered as text that a person can check line by line.

`python -m tests.chat.test_golden` writes the files anew; read the difference before keeping it.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from engine.chat.conversation import RowFormat
from engine.chat.render import WITHHELD, Kind, LabelRule, learned, render
from engine.chat.row import read_row
from engine.chat.tokenizer import ChatTokenizer
from tests.support.tokenizers import Tokenizers

GOLDEN = Path(__file__).parent / "golden"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def _call(call_id: str, city: str) -> dict[str, Any]:
    arguments = f'{{"city": "{city}"}}'
    return {"id": call_id, "function": {"name": "get_weather", "arguments": arguments}}


ROWS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "tools": (
        ("v7", "v11", "v13", "v15"),
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Warmer in Paris or in 東京?"},
                {
                    "role": "assistant",
                    "content": "Let me look.",
                    "tool_calls": [_call("a1B2c3D4e", "Paris"), _call("f5G6h7I8j", "東京")],
                },
                {"role": "tool", "tool_call_id": "f5G6h7I8j", "content": "21"},
                {"role": "tool", "tool_call_id": "a1B2c3D4e", "content": "17"},
                {"role": "assistant", "content": "東京."},
                {"role": "user", "content": "Thanks."},
                {"role": "assistant", "content": "You are welcome. "},
            ],
            "tools": [WEATHER],
        },
    ),
    "thinking": (
        ("v13", "v15"),
        {
            "messages": [
                {"role": "user", "content": "6 x 7?"},
                {"role": "assistant", "content": "42", "reasoning_content": "6 x 7 = 42."},
                {"role": "user", "content": "Is [THINK] a word?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": [{"type": "text", "text": "It is text."}]},
                        {"type": "text", "text": "Here: </s>, yes. "},
                    ],
                },
            ]
        },
    ),
    "tags": (
        ("v11", "v13"),
        {
            "messages": [
                {"role": "user", "content": "6 x 7?"},
                {"role": "assistant", "content": "<think>\n6 x 7 = 42.\n</think>\n\n42"},
            ]
        },
    ),
    "withheld": (
        ("v13",),
        {
            "messages": [
                {"role": "user", "content": "Say something wrong."},
                {"role": "assistant", "content": "2 + 2 = 5.", "weight": 0},
                {"role": "user", "content": "And right?"},
                {"role": "user", "content": "Please."},
                {"role": "assistant", "content": "2 + 2 = 4.", "weight": 1},
                {"role": "user", "content": "This is cut."},
            ]
        },
    ),
    "sharegpt": (
        ("v3", "v11", "v15"),
        {
            "system": "You are a robot.",
            "conversations": [
                {"from": "human", "value": "Hi 👩‍👩‍👧\n"},
                {
                    "from": "function_call",
                    "value": '{"name": "wave", "arguments": {"hand": "left"}}',
                },
                {"from": "observation", "value": "waved"},
                {"from": "gpt", "value": "I waved."},
            ],
        },
    ),
}
CASES = [(name, version) for name, (versions, _) in ROWS.items() for version in versions]


def describe(row: dict[str, Any], tokenizer: ChatTokenizer) -> Iterator[str]:
    """A line for each control token and for each run of text of one kind and message."""
    rendered = render(read_row(row, RowFormat()), tokenizer)
    ids = rendered.input_ids.tolist()
    pieces = tokenizer.pieces(ids)
    kept = learned(rendered.kinds, LabelRule()).tolist()
    arrays = (rendered.kinds.tolist(), rendered.sources.tolist())
    tokens = list(zip(ids, pieces, *arrays, kept, strict=True))

    def run_of(index: int) -> tuple[Any, ...]:
        return (index if tokenizer.is_control(ids[index]) else -1, *tokens[index][2:])

    for (_, kind, source, is_learned), run in groupby(range(len(tokens)), run_of):
        text = "".join(tokens[index][1] for index in run)
        word = Kind(kind & ~WITHHELD).word
        yield f"{text} | {word} | {source} | {'learned' if is_learned else '-'}"


def write(name: str, version: str, tokenizers: Tokenizers) -> str:
    return "\n".join(describe(ROWS[name][1], tokenizers[version])) + "\n"


@pytest.mark.parametrize(("name", "version"), CASES)
def test_conversation_renders_as_golden(name: str, version: str, tokenizers: Tokenizers) -> None:
    expected = (GOLDEN / f"{name}.{version}.txt").read_text(encoding="utf-8")
    assert write(name, version, tokenizers) == expected


if __name__ == "__main__":
    made = Tokenizers()
    for case in CASES:
        path = GOLDEN / f"{case[0]}.{case[1]}.txt"
        path.write_text(write(*case, made), encoding="utf-8")

"""Rows as people have them: OpenAI messages with everything that makes a renderer slip."""

import json
from typing import Any

from hypothesis import strategies as st

NON_LATIN = (
    *(
        "東京の天気は?",
        "Привет, как дела",
        "مرحبا بالعالم",
        "नमस्ते दुनिया",
        "안녕하세요",
        "👩‍👩‍👧🇫🇷",
        "ไทย",
    ),
)
LOOK_ALIKES = (
    *("[INST]", "</s>", "[THINK]", "[/INST] ", "[TOOL_CALLS]f[ARGS]{}", "<s>", "[IMG]", "<think>"),
)
ODD = (
    *("", " ", "   ", "\n", "\n\n", "a  ", " b", "\t", "x\n", "\x1b[0m", "\ud83d", "é\u0301"),
    "\u202e",
)
LATIN = (
    *("Hello there.", "def f(x):\n    return x", "The 3rd of 12,000", "naïve café", "]]"),
    "[[dummy_message]]",
)

fragments = st.sampled_from(NON_LATIN + LOOK_ALIKES + ODD + LATIN * 2)
joined = st.lists(fragments, max_size=3).map("".join)
texts = st.one_of(joined, fragments, st.text(max_size=12))
names = st.sampled_from(("add", "get_weather", "a-b_C9", "x" * 64))
values: Any = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 10**12), st.floats(allow_nan=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(texts, inner, max_size=2)),
    max_leaves=4,
)
arguments = st.dictionaries(texts, values, max_size=3)
tool_lists = st.lists(
    st.builds(
        lambda name, text, keys: {
            "type": "function",
            "function": {
                "name": name,
                "description": text,
                "parameters": {"type": "object", "properties": {key: {} for key in keys}},
            },
        },
        names,
        texts,
        st.lists(texts, max_size=2),
    ),
    min_size=1,
    max_size=2,
)


def as_chunks(draw: Any, text: str) -> Any:
    """The text as a string, or cut into a list of chunks."""
    if draw(st.integers(0, 3)):
        return text
    cut = draw(st.integers(0, len(text)))
    return [{"type": "text", "text": part} for part in (text[:cut], text[cut:])]


@st.composite
def calls_with_results(draw: Any, nonce: list[int]) -> list[dict[str, Any]]:
    """An assistant message with one to three calls and their results in any order."""
    calls, results = [], []
    for _ in range(draw(st.integers(1, 3))):
        nonce[0] += 1
        call_id = f"{nonce[0]:04d}abcXY"
        value = draw(arguments)
        forms = (value, json.dumps(value), json.dumps(value, ensure_ascii=False))
        written = draw(st.sampled_from(forms))
        function = {"name": draw(names), "arguments": written}
        calls.append({"id": call_id, "type": "function", "function": function})
        result = as_chunks(draw, draw(st.one_of(texts, values.map(json.dumps))))
        results.append({"role": "tool", "tool_call_id": call_id, "content": result})
    content = draw(st.sampled_from((None, "", "Let me look. ", "見る")))
    calling: dict[str, Any] = {"role": "assistant", "content": content, "tool_calls": calls}
    return [calling, *draw(st.permutations(results))]


def answer(draw: Any, thinking: bool) -> dict[str, Any]:
    text = draw(texts)
    if not thinking or not draw(st.booleans()):
        return {"role": "assistant", "content": as_chunks(draw, text or "ok")}
    thought = draw(texts)
    if draw(st.booleans()):
        key = draw(st.sampled_from(("reasoning_content", "reasoning")))
        return {"role": "assistant", "content": draw(st.sampled_from((text, None))), key: thought}
    chunk = {"type": "thinking", "thinking": thought, "closed": True}
    return {"role": "assistant", "content": [chunk, {"type": "text", "text": text}]}


@st.composite
def rows(draw: Any) -> dict[str, Any]:
    """A row that keeps to the order of roles; a version may still refuse what is in it."""
    systems = draw(st.sampled_from((0, 0, 1, 1, 2, 3)))
    thinking, tools = draw(st.booleans()), draw(st.booleans())
    nonce = [0]
    system = draw(st.sampled_from(("system", "developer")))
    first = range(min(systems, 2))
    messages = [{"role": system, "content": as_chunks(draw, draw(texts))} for _ in first]
    for turn in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
            messages.append({"role": "user", "content": as_chunks(draw, draw(texts))})
        if systems == 3 and not turn:
            messages.append({"role": "system", "content": draw(texts)})
        if tools and draw(st.booleans()):
            messages += draw(calls_with_results(nonce))
        for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
            messages.append(answer(draw, thinking))
    row: dict[str, Any] = {"messages": messages}
    if tools:
        row["tools"] = draw(tool_lists)
    return row


efforts = st.sampled_from((None, None, "none", "high"))

_ids = st.sampled_from(("abcdefghi", "123456789", "call_12345", "", "null", None))
# A null id is read as none: tables hold null where JSON would leave the key out.
_call_ids = _ids.map(lambda call_id: {} if call_id is None else {"id": call_id})
_contents = st.sampled_from(
    (
        "text",
        "",
        "   ",
        None,
        [],
        [{"type": "text", "text": "a"}],
        [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}],
        [{"type": "thinking", "thinking": "t", "closed": False}],
        [{"type": "text"}],
        5,
    )
)


@st.composite
def _message(draw: Any, roles: tuple[str, ...]) -> dict[str, Any]:
    role = draw(st.sampled_from(roles))
    message: dict[str, Any] = {"role": role, "content": draw(_contents)}
    if role == "tool":
        message["tool_call_id"] = draw(_ids)
        message["content"] = draw(st.sampled_from(("result", "", None)))
    if role == "assistant":
        calls = [
            draw(_call_ids)
            | {
                "function": {
                    "name": draw(st.sampled_from(("f", "f", "f", "no name"))),
                    "arguments": draw(st.sampled_from(({}, "", None, "[1]", [1], '{"a"', '"b"'))),
                }
            }
            for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2))))
        ]
        if calls or draw(st.booleans()):
            message["tool_calls"] = calls
    return message


tangled_rows = st.builds(
    lambda messages, last, tools, effort: {
        "messages": [*messages, last],
        "tools": tools,
        "reasoning_effort": effort,
    },
    st.lists(_message(("system", "user", "assistant", "assistant", "tool")), max_size=5),
    _message(("assistant",)),
    st.sampled_from(
        (
            None,
            [],
            [{"type": "function", "function": {"name": "f", "parameters": None}}],
            [{"function": {"name": "f", "parameters": {"type": "nonsense"}}}],
            [{"type": "function", "function": {"name": "no name", "parameters": {}}}],
        )
    ),
    st.sampled_from((None, None, None, "none", "high", "low", "turbo")),
)

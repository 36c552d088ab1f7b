"""What rows write as text is read as the structured row that it stands for, or told."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.chat.conversation import RowFormat, RowProblem, Text, Think
from engine.chat.markers import ANSWERS, CALLS, ENDS, RESULTS, THINKING, TOOLS
from engine.chat.render import render
from engine.chat.row import read_row
from engine.chat.rules import settle
from engine.config import DatasetConfig
from tests.support import oracle
from tests.support.tokenizers import USER, Tokenizers

Row = dict[str, Any]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_w",
        "description": "w",
        "parameters": {"type": "object", "properties": {"c": {"type": "string"}}},
    },
}
TOOLS_TEXT = json.dumps([WEATHER])
OSLO = {"name": "get_w", "arguments": {"c": "Oslo"}}
CALL = json.dumps(OSLO)
HERMES = (
    "You are a function calling AI model. You are provided with function signatures within "
    "<tools> </tools> XML tags. You may call one or more functions to assist with the user query."
    " After calling & executing the functions, you will be provided with function results within"
    " <tool_response> </tool_response> XML tags. Here are the available tools:\n<tools>\n"
    f"{TOOLS_TEXT}\n</tools>\nFor each function call return a JSON object, with the following"
    " pydantic model json schema:\n{'title': 'FunctionCall'}\nEach function call should be enclosed"
    " within <tool_call> </tool_call> XML tags.\nExample:\n<tool_call>\n{'name': <function-name>}\n"
    "</tool_call>"
)
HERMES_LEFT = (
    "You are a function calling AI model. You may call one or more functions to assist with the"
    " user query."
)


def says(*contents: object, role: str = "assistant") -> dict[str, Any]:
    """A message of texts, and of thinking as {"thinking": ...}."""
    chunks = [
        {"type": "text", "text": each} if isinstance(each, str) else {"type": "thinking", **each}
        for each in contents
        if isinstance(each, str | dict)
    ]
    return {"role": role, "content": chunks}


def thinks(thinking: str, answer: str = "4") -> Row:
    return {"messages": [USER, says({"thinking": thinking}, answer)]}


def plain(answer: str) -> Row:
    return {"messages": [USER, {"role": "assistant", "content": answer}]}


def calls(*given: Row, before: object = "", tools: bool = False, **columns: Row) -> Row:
    """A row that ends in calls; ids do not become tokens from v13 on."""
    listed = [
        {"id": f"text{number:05d}", "type": "function", "function": call}
        for number, call in enumerate(given, 1)
    ]
    said = says(before) if before else {"role": "assistant", "content": ""}
    row: Row = {"messages": [USER, said | {"tool_calls": listed}], **columns}
    return row | ({"tools": [WEATHER]} if tools else {})


def after_system(text: str, row: Row) -> Row:
    return row | {"messages": [{"role": "system", "content": text}, *row["messages"]]}


@pytest.mark.parametrize(
    ("marked", "structured"),
    [
        *((plain(f"{a}Add.{b}4"), thinks("Add.")) for a, b in THINKING),
        *(
            (plain(f" {a.upper()}\n Add.\n\nSo.\n{b}\n\n4 "), thinks("Add.\n\nSo."))
            for a, b in THINKING
        ),
        *((plain(f"<think>Add.</think>\n{a}\n4\n{b}"), thinks("Add.")) for a, b in ANSWERS),
        (plain("Add.\n</think>\n\n4"), thinks("Add.")),
        (plain("</think>\n\n4"), plain("4")),
        (plain("<think>\n\n</think>\n\n4"), plain("4")),
        (plain("4</s>"), plain("4")),
        (plain("<|im_start|>assistant\n4<|im_end|>"), plain("4")),
        (
            {"messages": [USER, says("4") | {"reasoning": "<think>\nAdd.\n</think>"}]},
            thinks("Add."),
        ),
        (
            plain('<|python_tag|>{"name": "get_w", "parameters": {"c": "Oslo"}}<|eom_id|>'),
            calls(OSLO),
        ),
        (plain('<function=get_w>{"c": "Oslo"}</function>'), calls(OSLO)),
        (plain("<think>Add.</think>4<|im_end|>\n"), thinks("Add.")),
        *((plain(f"{a}\n{CALL}\n{b}"), calls(OSLO)) for a, b in CALLS if a != "<function="),
        (plain(f"<tool_call>{OSLO}</tool_call>"), calls(OSLO)),
        (plain(f"[TOOL_CALLS] [{CALL}]</s>"), calls(OSLO)),
        (plain('[TOOL_CALLS]get_w[ARGS]{"c": "Oslo"}'), calls(OSLO)),
        (plain(f"<tool_call>{CALL}</tool_call>\n" * 2), calls(OSLO, OSLO)),
        (plain(f"Look.\n<tool_call>{CALL}</tool_call>"), calls(OSLO, before="Look.")),
        (
            plain(f"<think>Add <tool_call>.</think>\n<tool_call>{CALL}</tool_call>"),
            calls(OSLO, before={"thinking": "Add <tool_call>."}),
        ),
        (
            after_system(HERMES, plain("4")),
            after_system(HERMES_LEFT, plain("4")) | {"tools": [WEATHER]},
        ),
        (
            after_system(f"<tools>{json.dumps(WEATHER)}</tools>", plain("4")),
            plain("4") | {"tools": [WEATHER]},
        ),
        (
            after_system(f"Be brief. <tools>{TOOLS_TEXT}</tools>", plain("4"))
            | {"tools": TOOLS_TEXT},
            after_system("Be brief.", plain("4")) | {"tools": [WEATHER]},
        ),
    ],
)
def test_a_marked_row_encodes_as_the_structured_one_does_in_mistral_common(
    marked: Row, structured: Row, tokenizers: Tokenizers
) -> None:
    read = read_row(marked, RowFormat())
    assert {note.id for note in read.notes} <= {"thinking_read", "markers_read", "call_ids_made"}
    assert read.notes
    for version in ("v13", "v15"):
        tokenizer = tokenizers[version]
        high = version == "v15" and "'thinking'" in str(structured)
        effort = {"reasoning_effort": "high"} if high else {}
        expected = oracle.encode(structured | effort, tokenizer)
        assert expected is not None
        assert render(read, tokenizer).input_ids.tolist() == expected


WRITTEN = (
    "<think>Add.</think>4",
    "\n<reasoning>\nAdd.\n</reasoning>\n\n<answer>4</answer> ",
    "Add.\n</think>\n4",
)


@pytest.mark.parametrize("text", WRITTEN)
def test_thinking_stays_text_where_there_is_no_token(text: str, tokenizers: Tokenizers) -> None:
    read = settle(read_row(plain(text), RowFormat()), tokenizers["v11"], "keep")
    assert [note.id for note in read.notes] == ["thinking_kept"]
    assert "no [THINK]" in read.notes[0].text
    expected = oracle.encode(plain(text), tokenizers["v11"])
    assert render(read, tokenizers["v11"]).input_ids.tolist() == expected


@pytest.mark.parametrize(
    ("text", "doubt"),
    [
        ("Sure. <think>Add.</think>4", "</think>"),
        ("Close it with </think>.", "</think>"),
        ("<think>Add.</think>4</think>5", "</think>"),
        ("<think>Add <think>1</think></think>4", "</think>"),
        (f"Write <tool_call>{CALL}</tool_call> to call.", "<tool_call>"),
        ("<tool_call>get_w(Oslo)</tool_call>", "<tool_call>"),
        ("[INST] is a token.", "[INST]"),
        ("An answer ends with </s>, always.", "</s>"),
    ],
)
def test_what_can_mean_two_things_stays_text_and_is_told(text: str, doubt: str) -> None:
    read = read_row(plain(text), RowFormat())
    told = [note for note in read.notes if note.id in ("thinking_unsure", "markers_left")]
    assert [note.about for note in told] == [doubt]
    assert doubt in str(read.messages[-1].content)
    assert f"{doubt}{text.rpartition(doubt)[2][:3]}" in told[0].text
    assert "split_thinking: true" in told[0].text or "read_markers: false" in told[0].text


@pytest.mark.parametrize(
    "text", ["a < b", "<s>old</s>", "`<thinkers>`", "[1] <tool>", "<answer>4</answer>"]
)
def test_other_texts_are_not_touched(text: str) -> None:
    read = read_row(plain(text), RowFormat())
    assert (read.messages[-1].content, read.notes) == (text, ())


@pytest.mark.parametrize(
    ("keys", "text", "parts"),
    [
        ({"split_thinking": True}, "Sure. <think>a</think> b <think>c</think>d", "Sure.|a|b|c|d"),
        ({"split_thinking": True}, "Add.</think>4", "Add.|4"),
        ({"split_thinking": False}, WRITTEN[0], WRITTEN[0]),
        ({"split_thinking": False}, "<think>cut", "<think>cut"),
        (
            {"read_markers": False},
            f"<tool_call>{CALL}</tool_call></s>",
            f"<tool_call>{CALL}</tool_call></s>",
        ),
    ],
)
def test_keys_decide(keys: dict[str, bool], text: str, parts: str) -> None:
    read = read_row(plain(text), RowFormat(DatasetConfig.model_validate({"path": "."} | keys)))
    assert "|".join(part.text for part in read.messages[-1].parts) == parts
    assert {note.id for note in read.notes} <= {"thinking_read"}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (plain("<reasoning>cut"), "The assistant's <reasoning> is never closed."),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": WRITTEN[0], "thinking": "Other."},
                ]
            },
            "The message gives its thinking twice.",
        ),
        (
            {"messages": [USER, USER | {"role": "tool"}, plain("4")["messages"][-1]]},
            "The tool result names no call.",
        ),
    ],
)
def test_what_means_nothing_is_refused(row: Row, what: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read_row(row, RowFormat())
    assert (caught.value.what, caught.value.message) == (what, 1)


def test_equal_thinking_in_a_key_and_in_the_text_is_learned_once() -> None:
    message = {"role": "assistant", "content": WRITTEN[0], "reasoning_content": "Add."}
    parts = read_row({"messages": [USER, message]}, RowFormat()).messages[-1].parts
    assert parts == (Think("Add."), Text("4"))


@pytest.mark.parametrize("role", ["tool", "user"])
def test_results_answer_the_calls_in_order(role: str, tokenizers: Tokenizers) -> None:
    blocks = "<tool_response>\n7\n</tool_response>\n<tool_response>8</tool_response>"
    asked = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    marked = plain(asked)["messages"] + [{"role": role, "content": blocks}]
    read = read_row({"messages": [*marked, plain("15")["messages"][-1]]}, RowFormat())
    structured = calls(OSLO, OSLO)["messages"]
    for number, content in enumerate("78", 1):
        structured += [{"role": "tool", "tool_call_id": f"text{number:05d}", "content": content}]
    structured += [plain("15")["messages"][-1]]
    for version in ("v7", "v11", "v13", "v15"):
        expected = oracle.encode({"messages": structured}, tokenizers[version])
        assert render(read, tokenizers[version]).input_ids.tolist() == expected


def test_a_system_prompt_that_shows_thinking_is_split_by_version(tokenizers: Tokenizers) -> None:
    prompt = "First think.\n\n[THINK]Draft.[/THINK]Then answer."
    read = read_row(after_system(prompt, plain("4")), RowFormat())
    shown = says("First think.\n\n", {"thinking": "Draft."}, "Then answer.", role="system")
    for version, system in (("v13", shown), ("v15", {"role": "system", "content": prompt})):
        messages = [system, *plain("4")["messages"]]
        expected = oracle.encode({"messages": messages}, tokenizers[version])
        assert render(read, tokenizers[version]).input_ids.tolist() == expected


words = st.text(st.sampled_from('ab é東\n"{}[]<>|/\\'), min_size=1, max_size=12).map(
    lambda text: f"x{text}x"
)
blanks = st.text(" \n", max_size=3)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), thinking=words, answer=words, marks=st.sampled_from(THINKING))
def test_what_is_written_with_markers_is_read_back(
    data: st.DataObject, thinking: str, answer: str, marks: tuple[str, str]
) -> None:
    around = data.draw(st.lists(blanks, min_size=6, max_size=6))
    call = {"name": "f", "arguments": {"value": thinking}}
    written = marks[0] + around[1] + thinking + around[2] + marks[1] + around[3] + answer
    written += around[4] + f"<tool_call>{around[5]}{json.dumps(call)}{around[0]}</tool_call>"
    message = read_row(plain(around[0] + written), RowFormat()).messages[-1]
    assert message.parts == (Think(thinking), Text(answer))
    assert [(each.name, each.arguments) for each in message.tool_calls] == [tuple(call.values())]


EVERY = [*(each for pair in THINKING + ANSWERS + CALLS + RESULTS + TOOLS for each in pair), *ENDS]


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from([*EVERY, CALL, TOOLS_TEXT, " ", "\n", "x"]), max_size=6).map(
            "".join
        ),
        min_size=3,
        max_size=3,
    ),
    split=st.sampled_from((None, True, False)),
)
def test_markers_in_any_order_are_read_or_refused_in_a_sentence(
    texts: list[str], split: bool | None, tokenizers: Tokenizers
) -> None:
    roles = ("system", "user", "assistant")
    messages = [{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)]
    row_format = RowFormat(DatasetConfig(path=".", split_thinking=split))
    with contextlib.suppress(RowProblem):
        render(read_row({"messages": messages}, row_format), tokenizers["v13"])

"""What rendering decides beyond mistral-common: thinking, effort, withheld messages, sources."""

from dataclasses import fields
from typing import Any

import pytest

from engine.chat.conversation import Conversation, Message, RowProblem, Text, Think
from engine.chat.render import WITHHELD, Kind, LabelRule, Rendered, labels, learned, render
from engine.chat.tokenizer import ChatTokenizer
from tests.support import oracle
from tests.support.exact import render_exact
from tests.support.tokenizers import ANSWER, USER, Read, Tokenizers


def text_of(rendered: Rendered, tokenizer: ChatTokenizer) -> str:
    return "".join(tokenizer.pieces(rendered.input_ids))


def learned_text(rendered: Rendered, tokenizer: ChatTokenizer, rule: LabelRule) -> str:
    kept = rendered.input_ids[learned(rendered.kinds, rule)]
    return "".join(tokenizer.pieces(kept))


@pytest.mark.parametrize(
    ("content", "thinking_tokens"),
    [
        ("<think>t</think>a", "[THINK]t[/THINK]a</s>"),
        ("\n<think>\nt\n</think>\n\na  ", "[THINK]t[/THINK]a</s>"),
        ("<think>\n\n</think>\n\na", "a</s>"),
        ([{"type": "text", "text": "<think>t</think>a"}], "[THINK]t[/THINK]a</s>"),
        ("a <think>t</think>", "a <think>t</think></s>"),
    ],
)
def test_think_tags_become_tokens_where_there_are_tokens_for_them(
    content: Any, thinking_tokens: str, read: Read, tokenizers: Tokenizers
) -> None:
    row = read(USER, {"role": "assistant", "content": content})
    for version in ("v13", "v15"):
        text = text_of(render(row, tokenizers[version]), tokenizers[version])
        assert text.partition("[/INST]")[2] == thinking_tokens


@pytest.mark.parametrize("version", ["v3", "v7", "v11"])
def test_think_tags_are_text_where_unknown(
    version: str, read: Read, tokenizers: Tokenizers
) -> None:
    row = read(USER, {"role": "assistant", "content": "<think>t</think>a"})
    text = text_of(render(row, tokenizers[version]), tokenizers[version])
    assert text.endswith("[/INST]<think>t</think>a</s>")


def test_think_tags_that_never_close_are_refused(read: Read, tokenizers: Tokenizers) -> None:
    row = read(USER, {"role": "assistant", "content": "<think>I was cut"})
    with pytest.raises(RowProblem, match="never closed"):
        render(row, tokenizers["v13"])


TWO_TURNS = (
    USER,
    {"role": "assistant", "content": "one", "reasoning_content": "t1"},
    USER,
    {"role": "assistant", "content": "two", "reasoning_content": "t2"},
)


def test_history_thinking_is_kept_unless_it_is_dropped(read: Read, tokenizers: Tokenizers) -> None:
    tokenizer, row = tokenizers["v13"], read(*TWO_TURNS)
    assert text_of(render(row, tokenizer), tokenizer).count("[THINK]") == 2
    for way in (render, render_exact):
        dropped = text_of(way(row, tokenizer, history_thinking="drop"), tokenizer)
        assert "one</s>" in dropped
        assert "t1" not in dropped
        assert "[THINK]t2[/THINK]two" in dropped


def test_thinking_after_last_question_is_not_history(read: Read, tokenizers: Tokenizers) -> None:
    call = {"id": "abcdefghi", "function": {"name": "f", "arguments": {}}}
    row = read(
        USER,
        {"role": "assistant", "reasoning_content": "t1", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "r"},
        ANSWER,
    )
    rendered = render(row, tokenizers["v13"], history_thinking="drop")
    assert "[THINK]t1" in text_of(rendered, tokenizers["v13"])


def test_history_thinking_in_tags_is_dropped_too(read: Read, tokenizers: Tokenizers) -> None:
    tagged = {"role": "assistant", "content": "<think>t1</think>one"}
    rendered = render(read(USER, tagged, USER, ANSWER), tokenizers["v11"], history_thinking="drop")
    assert "[/INST]one</s>" in text_of(rendered, tokenizers["v11"])


def test_answer_that_is_all_thinking_cannot_be_dropped(read: Read, tokenizers: Tokenizers) -> None:
    only = {"role": "assistant", "content": None, "reasoning_content": "t"}
    with pytest.raises(RowProblem, match="Nothing is left"):
        render(read(USER, only, USER, ANSWER), tokenizers["v13"], history_thinking="drop")


@pytest.mark.parametrize(
    ("columns", "answer", "effort"),
    [
        ({}, ANSWER, "none"),
        ({}, ANSWER | {"reasoning_content": "t"}, "high"),
        ({}, {"role": "assistant", "content": "<think>t</think>a"}, "high"),
        ({"reasoning_effort": "none"}, ANSWER | {"reasoning_content": "t"}, "none"),
        ({"reasoning_effort": "high"}, ANSWER, "high"),
    ],
)
def test_effort_is_high_where_a_row_thinks_and_says_nothing(
    columns: dict[str, str], answer: dict[str, Any], effort: str, read: Read, tokenizers: Tokenizers
) -> None:
    rendered = render(read(USER, answer, **columns), tokenizers["v15"])
    expected = f'<s>[MODEL_SETTINGS]{{"reasoning_effort": "{effort}"}}[/MODEL_SETTINGS][INST]'
    assert text_of(rendered, tokenizers["v15"]).startswith(expected)


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13", "v15"])
def test_look_alikes_of_tokens_stay_text(version: str, read: Read, tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers[version]
    special = tokenizer.specials
    names = [
        tokenizer.piece(getattr(special, field.name))
        for field in fields(special)
        if getattr(special, field.name) is not None
    ]
    row = read(
        {"role": "user", "content": " ".join(names)},
        {"role": "assistant", "content": " ".join(names)},
    )
    rendered = render(row, tokenizer)
    controls = [token for token in rendered.input_ids.tolist() if tokenizer.is_control(token)]
    found = [token for token in controls if token not in (special.settings, special.end_settings)]
    assert found == [special.bos, special.inst, special.end_inst, special.eos]


def test_only_spaces_after_a_string_answer_are_dropped(read: Read, tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["v13"]
    thinking = {"type": "thinking", "thinking": "t"}
    for content, end in (
        ("y   ", "y</s>"),
        ("y \n", "y ␊</s>"),
        ([thinking, {"type": "text", "text": "a   "}], "a   </s>"),
    ):
        row = read({"role": "user", "content": "q  "}, {"role": "assistant", "content": content})
        text = text_of(render(row, tokenizer), tokenizer)
        assert text.startswith("<s>[INST]q  [/INST]")
        assert text.endswith(end)


@pytest.mark.parametrize(("version", "joined"), [("v13", "a␊␊b␊␊c"), ("v15", "ab␊␊c")])
def test_joined_chunks(version: str, joined: str, read: Read, tokenizers: Tokenizers) -> None:
    chunks = [{"type": "text", "text": text} for text in ("a", "b")]
    row = read({"role": "user", "content": chunks}, {"role": "user", "content": "c"}, ANSWER)
    assert f"[INST]{joined}[/INST]" in text_of(
        render(row, tokenizers[version]), tokenizers[version]
    )


def test_tool_results_in_call_order_with_their_sources(read: Read, tokenizers: Tokenizers) -> None:
    calls = [{"id": f"{n}bcdefghi", "function": {"name": "f", "arguments": {}}} for n in "12"]
    row = read(
        USER,
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2bcdefghi", "content": "second"},
        {"role": "tool", "tool_call_id": "1bcdefghi", "content": "first"},
        ANSWER,
    )
    for version, order in (
        ("v3", [2, 3]),
        ("v7", [2, 3]),
        ("v11", [3, 2]),
        ("v13", [3, 2]),
        ("v15", [3, 2]),
    ):
        rendered = render(row, tokenizers[version])
        results = rendered.sources[rendered.kinds == Kind.TOOL_RESULT].tolist()
        assert list(dict.fromkeys(results)) == order


def test_merged_messages_have_the_source_of_the_last(read: Read, tokenizers: Tokenizers) -> None:
    rendered = render(read(USER, USER, ANSWER, ANSWER, system="S"), tokenizers["v13"])
    words = dict(zip(rendered.kinds.tolist(), rendered.sources.tolist(), strict=True))
    assert words == {Kind.BOS: -1, Kind.SYSTEM: -1, Kind.USER: 1, Kind.TEXT: 3, Kind.EOS: 3}


def test_message_out_of_the_loss_is_marked_not_learned(read: Read, tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["v13"]
    row = read(USER, {**ANSWER, "content": "no", "weight": 0}, USER, ANSWER)
    for way in (render, render_exact):
        rendered = way(row, tokenizer)
        assert (rendered.kinds[rendered.sources == 1] & WITHHELD).all()
        assert not (rendered.kinds[rendered.sources != 1] & WITHHELD).any()
        assert learned_text(rendered, tokenizer, LabelRule()) == "a</s>"
        assert "no" not in learned_text(rendered, tokenizer, LabelRule(inputs=True))


def test_thinking_is_learned_or_not_by_the_rule(read: Read, tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["v13"]
    rendered = render(read(USER, {**ANSWER, "reasoning_content": "t"}), tokenizer)
    assert learned_text(rendered, tokenizer, LabelRule()) == "[THINK]t[/THINK]a</s>"
    assert learned_text(rendered, tokenizer, LabelRule(thinking=False)) == "a</s>"
    both = learned_text(rendered, tokenizer, LabelRule(thinking=False, inputs=True))
    assert both == "[INST]q[/INST]a</s>"


def test_call_id_of_v11_is_learned_with_its_call(read: Read, tokenizers: Tokenizers) -> None:
    call = {"id": "abcdefghi", "function": {"name": "f", "arguments": {"a": 1}}}
    rendered = render(read(USER, {"role": "assistant", "tool_calls": [call]}), tokenizers["v11"])
    assert learned_text(rendered, tokenizers["v11"], LabelRule()) == (
        '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}</s>'
    )


def test_unclosed_thinking_at_the_end_has_no_end_token(read: Read, tokenizers: Tokenizers) -> None:
    row = Conversation(
        (Message("user", "q", source=0), Message("assistant", (Think("t", False),), source=1))
    )
    rendered = render(row, tokenizers["v13"])
    assert text_of(rendered, tokenizers["v13"]).endswith("[/INST][THINK]t</s>")
    assert rendered.input_ids.tolist() == render_exact(row, tokenizers["v13"]).input_ids.tolist()


def test_thinking_between_texts_joins_as_in_mistral_common(tokenizers: Tokenizers) -> None:
    parts = (Text("b"), Think("t"), Text("c"), Text("d"))
    row = Conversation(
        (
            Message("user", "q", source=0),
            Message("assistant", "a", source=1),
            Message("assistant", parts, source=2),
            Message("assistant", "e", source=3),
        )
    )
    for version, text in (
        ("v13", "a␊␊b[THINK]t[/THINK]c␊␊d␊␊e"),
        ("v15", "a␊␊b[THINK]t[/THINK]cd␊␊e"),
    ):
        fast, exact = render(row, tokenizers[version]), render_exact(row, tokenizers[version])
        assert text_of(fast, tokenizers[version]).endswith(f"[/INST]{text}</s>")
        assert fast.input_ids.tolist() == exact.input_ids.tolist()


def test_labels_are_the_learned_ids_and_nothing_else(read: Read, tokenizers: Tokenizers) -> None:
    rendered = render(read(USER, ANSWER), tokenizers["v13"])
    found = labels(rendered.input_ids, rendered.kinds, LabelRule())
    assert found.dtype == "int64"
    assert found.tolist() == oracle.scan_labels(rendered.input_ids.tolist(), tokenizers["v13"])
    assert found.tolist().count(-100) == 4

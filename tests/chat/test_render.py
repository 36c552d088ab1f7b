"""What rendering decides beyond mistral-common: thinking, effort, withheld messages, sources."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.chat.conversation import Conversation, Message, RowProblem, Text, Think
from engine.chat.render import (
    WITHHELD,
    Kind,
    LabelRule,
    Rendered,
    labels,
    learned,
    render,
    truncate,
)
from engine.chat.tokenizer import ChatTokenizer
from tests.support import oracle
from tests.support.exact import render_exact
from tests.support.tokenizers import ANSWER, SPECS, USER, Read, Tokenizers


def text_of(rendered: Rendered, tokenizer: ChatTokenizer) -> str:
    return "".join(tokenizer.pieces(rendered.input_ids))


def learned_text(rendered: Rendered, tokenizer: ChatTokenizer, rule: LabelRule) -> str:
    kept = rendered.input_ids[learned(rendered.kinds, rule)]
    return "".join(tokenizer.pieces(kept))


@pytest.fixture
def text(read: Read, tokenizers: Tokenizers) -> Callable[..., str]:
    """What a version writes for a row, given as its messages and other columns."""

    def render_text(version: str, *messages: object, drop: bool = False, **columns: object) -> str:
        row, tokenizer = read(*messages, **columns), tokenizers[version]
        rendered = render(row, tokenizer, history_thinking="drop" if drop else "keep")
        return text_of(rendered, tokenizer)

    return render_text


TAGGED = {"role": "assistant", "content": "<think>t</think>a"}


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
    content: Any, thinking_tokens: str, text: Callable[..., str]
) -> None:
    for version in ("v13", "v15"):
        written = text(version, USER, {"role": "assistant", "content": content})
        assert written.partition("[/INST]")[2] == thinking_tokens


@pytest.mark.parametrize("version", ["v3", "v7", "v11"])
def test_think_tags_are_text_where_unknown(version: str, text: Callable[..., str]) -> None:
    assert text(version, USER, TAGGED).endswith("[/INST]<think>t</think>a</s>")


def test_think_tags_that_never_close_are_refused(text: Callable[..., str]) -> None:
    with pytest.raises(RowProblem, match="never closed"):
        text("v13", USER, {"role": "assistant", "content": "<think>I was cut"})


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


CALL = {"id": "abcdefghi", "function": {"name": "f", "arguments": {}}}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "r"}


def test_thinking_after_last_question_is_not_history(text: Callable[..., str]) -> None:
    calling = {"role": "assistant", "reasoning_content": "t1", "tool_calls": [CALL]}
    assert "[THINK]t1" in text("v13", USER, calling, RESULT, ANSWER, drop=True)


def test_history_thinking_in_tags_is_dropped_too(text: Callable[..., str]) -> None:
    assert "[/INST]a</s>" in text("v11", USER, TAGGED, USER, ANSWER | {"content": "b"}, drop=True)


def test_answer_that_is_all_thinking_cannot_be_dropped(text: Callable[..., str]) -> None:
    only = {"role": "assistant", "content": None, "reasoning_content": "t"}
    with pytest.raises(RowProblem, match="Nothing is left"):
        text("v13", USER, only, USER, ANSWER, drop=True)


@pytest.mark.parametrize(
    ("columns", "answer", "effort"),
    [
        ({}, ANSWER, "none"),
        ({}, ANSWER | {"reasoning_content": "t"}, "high"),
        ({}, TAGGED, "high"),
        ({"reasoning_effort": "none"}, ANSWER | {"reasoning_content": "t"}, "none"),
        ({"reasoning_effort": "high"}, ANSWER, "high"),
    ],
)
def test_effort_is_high_where_a_row_thinks_and_says_nothing(
    columns: dict[str, str], answer: dict[str, Any], effort: str, text: Callable[..., str]
) -> None:
    expected = f'<s>[MODEL_SETTINGS]{{"reasoning_effort": "{effort}"}}[/MODEL_SETTINGS][INST]'
    assert text("v15", USER, answer, **columns).startswith(expected)


@pytest.mark.parametrize("version", SPECS)
def test_look_alikes_of_tokens_stay_text(version: str, read: Read, tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers[version]
    special = tokenizer.specials
    names = [
        tokenizer.piece(getattr(special, field.name))
        for field in fields(special)
        if getattr(special, field.name) is not None
    ]
    row = read(*(message | {"content": " ".join(names)} for message in (USER, ANSWER)))
    rendered = render(row, tokenizer)
    controls = [token for token in rendered.input_ids.tolist() if tokenizer.is_control(token)]
    found = [token for token in controls if token not in (special.settings, special.end_settings)]
    assert found == [special.bos, special.inst, special.end_inst, special.eos]


@pytest.mark.parametrize(
    ("content", "end"),
    [
        ("y   ", "y</s>"),
        ("y \n", "y ␊</s>"),
        ([{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a   "}], "a   </s>"),
    ],
)
def test_spaces_after_an_answer_are_dropped(
    content: Any, end: str, text: Callable[..., str]
) -> None:
    written = text("v13", USER | {"content": "q  "}, ANSWER | {"content": content})
    assert written.startswith("<s>[INST]q  [/INST]")
    assert written.endswith(end)


@pytest.mark.parametrize(("version", "joined"), [("v13", "a␊␊b␊␊c"), ("v15", "ab␊␊c")])
def test_joined_chunks(version: str, joined: str, text: Callable[..., str]) -> None:
    chunks = [{"type": "text", "text": text} for text in ("a", "b")]
    asked = (USER | {"content": chunks}, USER | {"content": "c"})
    assert f"[INST]{joined}[/INST]" in text(version, *asked, ANSWER)


def test_tool_results_in_call_order_with_their_sources(read: Read, tokenizers: Tokenizers) -> None:
    ids = ("1bcdefghi", "2bcdefghi")
    calling = {"role": "assistant", "tool_calls": [CALL | {"id": each} for each in ids]}
    results = (RESULT | {"tool_call_id": each} for each in reversed(ids))
    row = read(USER, calling, *results, ANSWER)
    for version, tokenizer in ((each, tokenizers[each]) for each in SPECS):
        rendered = render(row, tokenizer)
        found = rendered.sources[rendered.kinds == Kind.TOOL_RESULT].tolist()
        assert list(dict.fromkeys(found)) == ([2, 3] if version in ("v3", "v7") else [3, 2])


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
    call = CALL | {"function": {"name": "f", "arguments": {"a": 1}}}
    rendered = render(read(USER, {"role": "assistant", "tool_calls": [call]}), tokenizers["v11"])
    assert learned_text(rendered, tokenizers["v11"], LabelRule()) == (
        '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}</s>'
    )


def test_unclosed_thinking_at_the_end_has_no_end_token(read: Read, tokenizers: Tokenizers) -> None:
    answer = Message("assistant", (Think("t", False),), source=1)
    row = Conversation((Message("user", "q", source=0), answer))
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


WORDS = [
    *("bos", "system", "tools", "settings", "user", "image", "tool_result", "text"),
    *("think", "call", "eos"),
]


def row_of(*kinds: int) -> Rendered:
    ids = np.arange(len(kinds), dtype=np.uint32)
    return Rendered(ids, np.array(kinds, np.uint8), np.zeros(len(kinds), np.int32))


def test_kinds_are_the_words_of_the_contract_in_their_order() -> None:
    assert [kind.word for kind in Kind] == WORDS


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LabelRule(), "text think call eos"),
        (LabelRule(thinking=False), "text call eos"),
        (LabelRule(inputs=True), "system tools settings user tool_result text think call eos"),
    ],
)
def test_a_rule_learns_its_kinds_and_nothing_withheld(rule: LabelRule, expected: str) -> None:
    kinds = np.array(list(Kind), np.uint8)
    assert [kind.word for kind, kept in zip(Kind, learned(kinds, rule), strict=True) if kept] == (
        expected.split()
    )
    assert not learned(kinds | np.uint8(WITHHELD), rule).any()


USER_THEN_TEXT = (Kind.BOS, Kind.USER, Kind.TEXT, Kind.TEXT, Kind.EOS)


def test_a_row_within_the_limit_is_not_copied() -> None:
    row = row_of(*USER_THEN_TEXT)
    assert truncate(row, 5) is row


def test_the_tail_is_cut() -> None:
    cut = truncate(row_of(*USER_THEN_TEXT), 3)
    assert cut is not None
    assert cut.input_ids.tolist() == [0, 1, 2]
    assert len(cut.kinds) == len(cut.sources) == 3


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_nothing_remains_where_nothing_learned_remains(limit: int) -> None:
    assert truncate(row_of(*USER_THEN_TEXT), limit) is None


def test_what_remains_is_judged_by_the_rule() -> None:
    row = row_of(Kind.BOS, Kind.USER, Kind.THINK, Kind.TEXT)
    assert truncate(row, 3) is not None
    assert truncate(row, 3, LabelRule(thinking=False)) is None
    assert truncate(row_of(Kind.BOS, Kind.TEXT | WITHHELD), 2) is None


IMAGE_RUNS = (
    *(Kind.BOS, Kind.TEXT, *[Kind.IMAGE] * 4, Kind.USER),
    *(*[Kind.IMAGE | WITHHELD] * 3, Kind.EOS),
)


@given(limit=st.integers(0, len(IMAGE_RUNS) + 2))
def test_a_cut_never_leaves_a_part_of_an_image(limit: int) -> None:
    cut = truncate(row_of(*IMAGE_RUNS), limit)
    if cut is not None:
        assert len(cut) <= limit
        images = np.count_nonzero((cut.kinds & ~np.uint8(WITHHELD)) == Kind.IMAGE)
        assert images in (0, 4, 7)

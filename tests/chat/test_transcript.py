"""A conversation in one text gives the ids of the structured row, or a sentence."""

import json
from typing import Any

import pytest

from engine.chat.conversation import RowFormat, RowProblem
from engine.chat.render import render
from engine.chat.row import read_row
from tests.support import oracle
from tests.support.tokenizers import Tokenizers

SAID = (("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "6"))
SYSTEM = (("system", "Be brief."), *SAID)
FUNCTION = {"name": "f", "description": "", "parameters": {}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"name": "f", "arguments": {}, "id": "abcdefghi"}
USES = (
    f"<s>[AVAILABLE_TOOLS] {json.dumps(TOOLS)}[/AVAILABLE_TOOLS][INST] q [/INST][TOOL_CALLS] "
    f"[{json.dumps(CALL)}]</s>[TOOL_RESULTS] "
    '{"content": 7, "call_id": "abcdefghi"}[/TOOL_RESULTS] 7</s>',
    f"<s>[AVAILABLE_TOOLS]{json.dumps(TOOLS)}[/AVAILABLE_TOOLS][INST]q[/INST][TOOL_CALLS]f"
    "[CALL_ID]abcdefghi[ARGS]{}</s>[TOOL_RESULTS]abcdefghi[TOOL_CONTENT]7[/TOOL_RESULTS]7</s>",
)


def chat(pattern: str, said: tuple[tuple[str, str], ...], **names: str) -> str:
    return "".join(pattern.format(names.get(role, role), content) for role, content in said)


def row(said: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


@pytest.mark.parametrize(
    ("text", "structured"),
    [
        ("<s>[INST] 2+2? [/INST] 4</s>[INST] 3+3? [/INST] 6</s>", row(SAID)),
        ("<s>[INST]2+2?[/INST]4</s>[INST]3+3?[/INST]6", row(SAID)),
        (
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n2+2? [/INST] 4 </s><s>[INST] 3+3? [/INST] 6",
            row(SYSTEM),
        ),
        ("[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]2+2?[/INST]4</s>", row(SYSTEM[:3])),
        (chat("<|im_start|>{}\n{}<|im_end|>\n", SYSTEM), row(SYSTEM)),
        (
            "<|begin_of_text|>"
            + chat("<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>", SYSTEM),
            row(SYSTEM),
        ),
        (chat("<start_of_turn>{}\n{}<end_of_turn>\n", SAID, assistant="model"), row(SAID)),
        (chat("<|{}|>\n{}</s>\n", SYSTEM), row(SYSTEM)),
        (chat("<|{}|>\n{}<|end|>\n", SYSTEM), row(SYSTEM)),
        (
            chat("<｜{}｜>{}", SAID, user="User", assistant="Assistant") + "<｜end▁of▁sentence｜>",
            row(SAID),
        ),
        (chat("### {}: {}", SAID, user="Human", assistant="Assistant"), row(SAID)),
        (chat("### {}:\n{}\n\n", SAID, user="Instruction", assistant="Response"), row(SAID)),
        (
            "Below is an instruction that describes a task, paired with an input that provides"
            " further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n2+2\n\n### Response:\n4",
            row((("user", "Add.\n\n2+2"), ("assistant", "4"))),
        ),
        (
            chat(
                "{}: {} <|endoftext|>\n\n\n",
                SYSTEM,
                user="USER",
                assistant="ASSISTANT",
                system="SYSTEM",
            ),
            row(SYSTEM),
        ),
        (chat("\n\n{}: {}", SAID, user="Human", assistant="Assistant"), row(SAID)),
        *(
            (
                use,
                {
                    "tools": TOOLS,
                    "messages": [
                        {"role": "user", "content": "q"},
                        {
                            "role": "assistant",
                            "content": "",
                            "tool_calls": [
                                {"id": "abcdefghi", "function": FUNCTION | {"arguments": "{}"}}
                            ],
                        },
                        {"role": "tool", "tool_call_id": "abcdefghi", "content": "7"},
                        {"role": "assistant", "content": "7"},
                    ],
                },
            )
            for use in USES
        ),
    ],
)
def test_a_text_column_encodes_as_its_messages_do_in_mistral_common(
    text: str, structured: dict[str, Any], tokenizers: Tokenizers
) -> None:
    read = read_row({"text": text}, RowFormat())
    assert read.notes[0].text.endswith("in text: read as messages.")
    for version in ("v7", "v11", "v13", "v15"):
        expected = oracle.encode(structured, tokenizers[version])
        assert expected is not None
        assert render(read, tokenizers[version]).input_ids.tolist() == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "<s>[INST] 2+2? [/INST] 4</s>[INST] 3+3? [/INST]",
        chat("<|im_start|>{}\n{}<|im_end|>\n", SAID[:3]) + "<|im_start|>assistant\n",
        chat("<|im_start|>{}\n{}<|im_end|>\n", SAID[:3]) + "<|im_start|>assistant\n<think>\n",
    ],
)
def test_a_prompt_column_holds_the_turns_before_its_answer(prompt: str) -> None:
    read = read_row({"prompt": prompt, "completion": "6</s>"}, RowFormat())
    assert [(each.role, each.content) for each in read.messages] == list(SAID)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[INST] a [/INST] b</s> c [INST] d [/INST] e", "'c' stands outside every message."),
        ("[INST] what is [INST]? [/INST] a token", "Two messages of the user follow one another."),
        ("USER: a ASSISTANT: b ASSISTANT: c", "Two messages of the assistant follow one another."),
    ],
)
def test_a_text_that_can_be_split_in_two_ways_is_refused(text: str, why: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read_row({"text": text}, RowFormat())
    assert caught.value.why == why


@pytest.mark.parametrize("text", ["A book about [INST].", "USER: only a question", "### Human: q"])
def test_other_texts_are_no_conversation(text: str) -> None:
    with pytest.raises(RowProblem, match="has no messages"):
        read_row({"text": text}, RowFormat())

"""A whole conversation in one text, as chat templates write it, back to its messages.

A template is the pattern of what separates its messages; what stands behind a separator belongs to
the role that this names. Blanks around a message are the template's. Thinking, calls and tools that
the messages hold stay in them: `markers` reads those.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.chat.conversation import Role, RowProblem, describe


@dataclass(frozen=True, slots=True)
class _Template:
    """`separators` names a role in its group, or is a key of `roles`; others end a message."""

    name: str
    separators: re.Pattern[str]
    roles: Mapping[str, str]


_NAMES: Final = {
    **dict.fromkeys(("user", "human", "instruction", "prompter"), "user"),
    **dict.fromkeys(("assistant", "model", "bot", "response", "gpt"), "assistant"),
    **dict.fromkeys(("tool", "ipython", "function response", "observation"), "tool"),
    **{"system": "system", "input": "input"},
}
_TEMPLATES: Final = (
    _Template(
        "[INST]",
        re.compile(
            r"<s>|</s>|\[/?INST\]|\[/?SYSTEM_PROMPT\]|\[/?TOOL_RESULTS\]|<</?SYS>>"
            r"|(?=\[AVAILABLE_TOOLS\])|(?<=\[/AVAILABLE_TOOLS\])"
        ),
        {
            **{"[INST]": "user", "[/INST]": "assistant", "[SYSTEM_PROMPT]": "system"},
            **{"[TOOL_RESULTS]": "tool", "[/TOOL_RESULTS]": "assistant"},
            **{"<<SYS>>": "system", "<</SYS>>": "user"},
        },
    ),
    *(
        _Template(name, re.compile(pattern), _NAMES)
        for name, pattern in (
            (
                "<|im_start|>",
                r"<\|im_start\|>(\w+)(?:\n|<\|im_sep\|>|$)|<\|im_end\|>|<\|endoftext\|>",
            ),
            (
                "<|start_header_id|>",
                r"<\|start_header_id\|>(\w+)<\|end_header_id\|>"
                r"|<\|(?:begin_of_text|eot_id|eom_id|end_of_text)\|>",
            ),
            ("<start_of_turn>", r"<start_of_turn>(\w+)(?:\n|$)|<bos>|<end_of_turn>|<eos>"),
            ("<｜User｜>", r"<｜(User|Assistant)｜>|<｜(?:begin|end)▁of▁sentence｜>"),
            ("<|user|>", r"<\|(system|user|assistant)\|>|<s>|</s>|<\|end\|>|<\|endoftext\|>"),
            ("### Human:", r"### ?(Human|User|Assistant|Bot|System):"),
            (
                "### Instruction:",
                r"### ?(Instruction|Input|Response):|</s>|<\|endoftext\|>"
                r"|Below is an instruction that describes a task(?:, paired with an input that"
                r" provides further context)?\. Write a response that appropriately completes the"
                r" request\.",
            ),
            (
                "USER:",
                r"(?:^|(?<=\s))(SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):|</s>|<\|endoftext\|>",
            ),
            ("Human:", r"(?:^|\n\n)(Human|Assistant):"),
        )
    ),
)

# Prompts of models that always think end with it.
_OPEN_THINKING: Final = re.compile(r"(?:<think>|\[THINK\])$")
# A question may begin with "USER:" and mean it; it does not with a control token.
_WITH_CONTROL_TOKENS: Final = 6
_SPEAKS: Final[Mapping[str, Role]] = {"system": "system", "user": "user", "assistant": "assistant"}


def read_transcript(text: str) -> tuple[str, list[dict[str, Any]]] | None:
    """The template's name and the messages of a text that a chat template wrote, else None.

    Raises RowProblem for a text that begins as one and cannot be split without doubt.
    """
    text = text.strip()
    for template in _TEMPLATES:
        if template.separators.match(text) is None:
            continue
        messages, doubt = _split(text, template)
        if {"user", "assistant"} <= {role for role, _ in messages}:
            if doubt:
                raise RowProblem(
                    f"The text cannot be split at {template.name}.",
                    f"{doubt}.",
                    'Write the row as {"messages": [{"role": "user", "content": "..."}, ...]}.',
                )
            return template.name, [_message(role, content) for role, content in messages]
    return None


def read_prompt(text: str) -> tuple[str, list[tuple[Role, str]]] | None:
    """The same for a text that ends where the assistant's answer begins, as (role, content)."""
    text = text.strip()
    for template in _TEMPLATES[:_WITH_CONTROL_TOKENS]:
        if template.separators.match(text) is not None:
            messages, doubt = _split(_OPEN_THINKING.sub("", text), template)
            spoken = [(_SPEAKS[role], content) for role, content in messages if role in _SPEAKS]
            if (
                not doubt
                and messages
                and messages[-1][0] == "user"
                and len(spoken) == len(messages)
            ):
                return template.name, spoken
    return None


def _split(text: str, template: _Template) -> tuple[list[tuple[str, str]], str]:
    """Messages as (role, content) without empty ones, and what makes the split doubtful."""
    found = list(template.separators.finditer(text))
    messages: list[tuple[str, str]] = []
    doubt = ""
    for separator, after in zip(found, [*found[1:], None], strict=True):
        name = (separator.lastindex and separator[1]) or separator[0]
        role = template.roles.get(name.lower() if separator.lastindex else name, "")
        content = text[separator.end() : after.start() if after else len(text)].strip()
        if not content:
            continue
        if not role and content.startswith("[AVAILABLE_TOOLS]"):
            role = "system"
        if not role:
            doubt = doubt or f"{describe(content)} stands outside every message"
        elif role == "input" and messages:
            role, content = messages[-1][0], f"{messages.pop()[1]}\n\n{content}"
        elif messages and messages[-1][0] == role and role in ("user", "assistant"):
            doubt = doubt or f"Two messages of the {role} follow one another"
        messages.append((role, content))
    return messages, doubt


def _message(role: str, content: str) -> dict[str, Any]:
    if role != "tool":
        return {"role": role, "content": content}
    call_id, marker, result = content.partition("[TOOL_CONTENT]")
    if marker:
        return {"role": role, "content": result, "tool_call_id": call_id.strip()}
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("call_id"), str):
        return {"role": role, "content": content}
    returned = value.get("content")
    if not isinstance(returned, str):
        returned = json.dumps(returned, ensure_ascii=False)
    return {"role": role, "content": returned, "tool_call_id": value["call_id"]}

"""What mistral-common says of a row, and what the control tokens alone say of its ids.

Neither shares a line with the renderer: the first is `encode_chat_completion` on the row as given,
the second a state machine over the flat ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from engine.chat.render import Kind
from engine.chat.tokenizer import ChatTokenizer

REFUSALS = (MistralCommonException, ValueError, AssertionError, KeyError, TypeError, RecursionError)
LEARNED = frozenset(map(int, (Kind.TEXT, Kind.THINK, Kind.CALL, Kind.EOS)))


def encode(row: Mapping[str, Any], tokenizer: ChatTokenizer) -> list[int] | None:
    """mistral-common's ids of an OpenAI row cut after its last answer; None where refused."""
    messages = row["messages"]
    while messages and messages[-1].get("role") != "assistant":
        messages = messages[:-1]
    effort = row.get("reasoning_effort")
    try:
        request: ChatCompletionRequest[Any] = ChatCompletionRequest.from_openai(
            messages,
            tools=row.get("tools"),
            **({"reasoning_effort": effort} if effort is not None else {}),
        )
        ids: list[int] = tokenizer.mistral.encode_chat_completion(request).tokens
    except REFUSALS:
        return None
    return ids


def scan(ids: Sequence[int], tokenizer: ChatTokenizer) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The kind of each token, from the control tokens among the ids and nothing else."""
    special = tokenizer.specials
    opens = {
        special.system: Kind.SYSTEM,
        special.tools: Kind.TOOLS,
        special.settings: Kind.SETTINGS,
        special.inst: Kind.USER,
        special.results: Kind.TOOL_RESULT,
        special.call: Kind.CALL,
    }
    closes = (
        *(special.end_system, special.end_tools, special.end_settings),
        *(special.end_inst, special.end_results),
    )
    kinds = np.empty(len(ids), np.uint8)
    state = Kind.TEXT
    for index, token in enumerate(ids):
        if token in opens:
            state = opens[token]
        elif token == special.think and state == Kind.TEXT:
            state = Kind.THINK
        kinds[index] = state
        if token == special.bos:
            kinds[index] = Kind.BOS
        elif token == special.eos:
            kinds[index], state = Kind.EOS, Kind.TEXT
        elif token in closes or (token == special.end_think and state == Kind.THINK):
            state = Kind.TEXT
    return kinds


def scan_labels(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[int]:
    kinds = scan(ids, tokenizer).tolist()
    return [token if kind in LEARNED else -100 for token, kind in zip(ids, kinds, strict=True)]

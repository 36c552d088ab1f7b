"""What mistral-common says of a row, and what the control tokens alone say of its ids.

Neither shares a line with the renderer: the first is `encode_chat_completion` on the row as given,
the second a state machine over the flat ids.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers import instruct
from mistral_common.tokens.tokenizers.image import ImageEncoder, ImageEncoding
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer, load_image_encoder

from engine.chat.render import Kind
from engine.chat.tokenizer import ChatTokenizer

REFUSALS = (MistralCommonException, ValueError, AssertionError, KeyError, TypeError, RecursionError)
_GRID_URL = "grid:"
LEARNED = frozenset(map(int, (Kind.TEXT, Kind.THINK, Kind.CALL, Kind.EOS)))


@cache
def mistral_of(tokenizer: ChatTokenizer) -> MistralTokenizer[Any, Any, Any, Any, Any]:
    """mistral-common's own tokenizer, in its finetuning mode."""
    tekken = tokenizer.tekken
    images = load_image_encoder(tekken.image, tekken) if tekken.image else None
    encoder = getattr(instruct, f"InstructTokenizer{tekken.version.value.upper()}")
    return MistralTokenizer(
        encoder(
            tekken, image_encoder=images and _GridEncoder(images.image_config, images.special_ids)
        ),
        validator=get_validator(tekken.version, mode=ValidationMode.finetuning),
        request_normalizer=get_normalizer(tekken.version, tekken.model_settings_builder),
    )


def grid_url(rows: int, columns: int) -> str:
    """An image for `mistral_of` of which only the grid matters."""
    return f"{_GRID_URL}{rows}x{columns}"


class _GridEncoder(ImageEncoder):
    """mistral-common's, which makes the pixels too and needs OpenCV for them, not for a grid."""

    def __call__(self, content: Any) -> ImageEncoding:
        url = content.get_url() if content.type == "image_url" else ""
        if not url.startswith(_GRID_URL):
            return super().__call__(content)
        rows, columns = map(int, url.removeprefix(_GRID_URL).split("x"))
        special = self.special_ids
        tokens = ([special.img] * columns + [special.img_break]) * rows
        tokens[-1] = special.img_end
        return ImageEncoding(tokens, np.empty((3, 0, 0), np.float32))


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
        ids: list[int] = mistral_of(tokenizer).encode_chat_completion(request).tokens
    except REFUSALS:
        return None
    return ids


def numbered(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with an id for each call that has none, and for results the ids in their order."""
    messages, waiting, made = [], list[str](), 0
    for message in row["messages"]:
        calls = []
        for call in message.get("tool_calls") or ():
            if call.get("id") in (None, "null"):
                made += 1
                call = call | {"id": f"text{made:05d}"}
            waiting.append(call["id"])
            calls.append(call)
        given = message.get("tool_call_id")
        if given in waiting:
            waiting.remove(given)
        elif message["role"] == "tool" and given is None and waiting:
            message = message | {"tool_call_id": waiting.pop(0)}
        messages.append(message | {"tool_calls": calls} if calls else message)
    return {**row, "messages": messages}


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
    shows = (special.image, special.image_break, special.image_end)
    kinds = np.empty(len(ids), np.uint8)
    state = Kind.TEXT
    for index, token in enumerate(ids):
        if token in opens:
            state = opens[token]
        elif token == special.think and state == Kind.TEXT:
            state = Kind.THINK
        kinds[index] = Kind.IMAGE if token in shows else state
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

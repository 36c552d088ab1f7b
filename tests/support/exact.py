"""The same arrays through mistral-common's own validator, normalizer and encoders.

It stands between `render` and `encode_chat_completion`: the first knows the kind and source of each
token and shares only the settled conversation with this, the second gives ids alone.
"""

import json
from itertools import groupby
from typing import Any, Literal

import numpy as np
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.chunk import (
    ContentChunk,
    ImageURLChunk,
    TextChunk,
    ThinkChunk,
)
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from pydantic import ValidationError

from engine.chat.conversation import Conversation, Image, Message, Part, RowProblem, Text, Think
from engine.chat.render import WITHHELD, Kind, Kinds, Rendered, RenderedImage, measure
from engine.chat.rules import settle
from engine.chat.tokenizer import ChatTokenizer
from tests.support.oracle import grid_url, mistral_of

# What mistral-common raises at a conversation that it refuses; asserts are among its checks.
_REFUSALS = (MistralCommonException, ValidationError, ValueError, AssertionError, RecursionError)


def render_exact(
    conversation: Conversation,
    tokenizer: ChatTokenizer,
    *,
    history_thinking: Literal["keep", "drop"] = "keep",
) -> Rendered:
    """The arrays that `render` should give. Raises RowProblem where mistral-common refuses."""
    try:
        return _encode(settle(conversation, tokenizer, history_thinking), tokenizer)
    except _REFUSALS as error:
        raise RowProblem(
            "mistral-common refuses the conversation.",
            f"{error}" if str(error).endswith(".") else f"{error}.",
            "Change the row so that it follows the order and the types that it names.",
        ) from error


def _to_request(conversation: Conversation, tokenizer: ChatTokenizer) -> ChatCompletionRequest[Any]:
    """The request that mistral-common would encode for a settled conversation."""
    return ChatCompletionRequest(
        messages=[_to_mistral(message, tokenizer) for message in conversation.messages],
        tools=[Tool.model_validate(tool) for tool in conversation.tools] or None,
        reasoning_effort=conversation.reasoning_effort,  # type: ignore[arg-type]
    )


def _to_chunk(part: Part, tokenizer: ChatTokenizer, source: int) -> ContentChunk:
    match part:
        case Text():
            return TextChunk(text=part.text)
        case Think():
            return ThinkChunk(thinking=part.text, closed=part.closed)
        case Image():
            image = measure(part, tokenizer, source)
            return ImageURLChunk(image_url=grid_url(image.rows, image.columns))


def _to_mistral(message: Message, tokenizer: ChatTokenizer) -> Any:
    content: str | list[ContentChunk]
    if isinstance(message.content, str):
        content = message.content
    else:
        content = [_to_chunk(part, tokenizer, message.source) for part in message.content]
    match message.role:
        case "user":
            return UserMessage(content=content)
        case "system":
            return SystemMessage(content=content)
        case "tool":
            return ToolMessage(content=content, tool_call_id=message.tool_call_id)
        case "assistant":
            calls = [
                ToolCall(
                    id="null" if call.id is None else call.id,
                    function=FunctionCall(name=call.name, arguments=json.dumps(call.arguments)),
                )
                for call in message.tool_calls
            ]
            return AssistantMessage(content=content, tool_calls=calls or None)


def _encode(conversation: Conversation, tokenizer: ChatTokenizer) -> Rendered:
    mistral = mistral_of(tokenizer)
    encoder: Any = mistral.instruct_tokenizer
    asked = _to_request(conversation, tokenizer)
    request = mistral._chat_completion_request_validator.validate_request(asked)
    instruct = mistral._instruct_request_normalizer.from_chat_completion_request(request)
    encoder.validate_messages(instruct.messages)
    turns = _group_turns(conversation.messages, tokenizer.version)
    assert len(turns) == len(instruct.messages), "a message without its turn"
    first_user, last_user = encoder.find_first_last_user(instruct)
    ids: list[int] = list(encoder.start())
    kinds = [np.full(len(ids), Kind.BOS, np.uint8)]
    sources = [np.full(len(ids), -1, np.int32)]
    for index, (message, turn) in enumerate(zip(instruct.messages, turns, strict=True)):
        if isinstance(message, UserMessage):
            tokens, _, _ = encoder.encode_user_message(
                message,
                instruct.available_tools,
                index == last_user,
                index == first_user,
                system_prompt=instruct.system_prompt,
                force_img_first=True,
                settings=instruct.settings,
            )
        elif isinstance(message, ToolMessage):
            tokens, _, _ = encoder.encode_tool_message(message, index < last_user)
        elif isinstance(message, AssistantMessage):
            tokens = encoder.encode_assistant_message(message, index < last_user)
        else:
            tokens, _ = encoder.encode_system_message(message)
        found = _find_kinds(tokens, message, tokenizer) | np.uint8(_mark(turn))
        found_sources = np.full(len(tokens), turn[-1].source, np.int32)
        if index == last_user and instruct.system_prompt:
            systems = [each for each in conversation.messages if each.role == "system"]
            of_system = _find_prompt(tokens, f"{instruct.system_prompt}\n\n", tokenizer)
            found[of_system] = Kind.SYSTEM | _mark(tuple(systems))
            found_sources[of_system] = systems[-1].source
        ids += tokens
        kinds.append(found)
        sources.append(found_sources)
    return Rendered(
        np.array(ids, np.uint32),
        np.concatenate(kinds),
        np.concatenate(sources),
        _images(turns, tokenizer),
    )


def _mark(turn: tuple[Message, ...]) -> int:
    return 0 if all(part.learn for part in turn) else WITHHELD


def _find_prompt(tokens: list[int], prompt: str, tokenizer: ChatTokenizer) -> slice:
    """The tokens of a user message of v3 that hold its system prompt and nothing else."""
    tekken: Any = tokenizer.tekken
    start = tokens.index(tokenizer.specials.inst) + 1
    size = len(tekken.decode(tekken.encode(prompt, bos=False, eos=False)).encode())
    shown = SpecialTokenPolicy.KEEP
    ends = np.cumsum([len(tekken.id_to_byte_piece(token, shown)) for token in tokens[start:-1]])
    return slice(start, start + int(np.searchsorted(ends, size, "right")))


def _images(
    turns: list[tuple[Message, ...]], tokenizer: ChatTokenizer
) -> tuple[RenderedImage, ...]:
    return tuple(
        measure(part, tokenizer, message.source)
        for turn in turns
        for message in turn
        for part in message.content
        if isinstance(part, Image)
    )


def _group_turns(messages: tuple[Message, ...], version: str) -> list[tuple[Message, ...]]:
    """The messages behind each normalized message: users and assistants in a row are merged.

    Replays the grouping of mistral-common's `_aggregate_messages`, from v11 on its sorting of tool
    results, and for v3 its user message where the row begins with none.
    """
    turns: list[tuple[Message, ...]] = []
    called: list[str] = []
    first = next(message.role for message in messages if message.role != "system")
    if version == "v3" and first != "user":
        turns.append((Message("user", ""),))
    for role, group in groupby(messages, lambda message: message.role):
        turn = list(group)
        if role in ("user", "assistant"):
            turns.append(tuple(turn))
        if role == "assistant":
            called = [call.id or "null" for message in turn for call in message.tool_calls]
        if role == "tool" and version not in ("v3", "v7"):
            turn.sort(key=lambda message: called.index(message.tool_call_id or "null"))
        if role == "tool" or (role == "system" and version != "v3"):
            turns += [(message,) for message in turn]
    return turns


def _find_kinds(tokens: list[int], message: Any, tokenizer: ChatTokenizer) -> Kinds:
    """The kind of each token of one message, by the control tokens among them."""
    special = tokenizer.specials
    if isinstance(message, SystemMessage):
        return np.full(len(tokens), Kind.SYSTEM, np.uint8)
    shown = (special.image, special.image_break, special.image_end)
    if isinstance(message, ToolMessage):
        kinds = np.full(len(tokens), Kind.TOOL_RESULT, np.uint8)
        kinds[np.isin(tokens, [token for token in shown if token is not None])] = Kind.IMAGE
        return kinds
    switches: dict[int | None, Kind] = {
        special.tools: Kind.TOOLS,
        special.settings: Kind.SETTINGS,
        special.inst: Kind.USER,
        special.think: Kind.THINK,
        special.call: Kind.CALL,
        special.eos: Kind.EOS,
    }
    kind = Kind.TEXT if isinstance(message, AssistantMessage) else Kind.USER
    kinds = np.empty(len(tokens), np.uint8)
    for index, token in enumerate(tokens):
        kind = switches.get(token, kind)
        kinds[index] = Kind.IMAGE if token in shown else kind
        if token == special.end_think:
            kind = Kind.TEXT
    return kinds

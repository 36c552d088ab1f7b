"""What rows write as text although the models have tokens for it: thinking, calls, results, tools.

A marker is read where the row can mean only one thing, and a note counts the rows; elsewhere the
text stays as it is, and a note says so with an example. Blanks and line breaks directly inside and
around a marker belong to it; those further inside stay.

Thinking is marked at the start of an answer, or ended by a closing marker alone on its line where
the chat template opened it in the prompt; calls end an answer; an end of text ends one. `written`
of a message keeps the text for models whose tokenizer has no [THINK].
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from engine.chat.conversation import (
    Message,
    Note,
    NoteId,
    Part,
    RowProblem,
    Text,
    Think,
    ToolCall,
    describe,
)
from engine.chat.message import read_tool_calls
from engine.chat.transcript import read_prompt
from engine.chat.written import load_json
from engine.config import DatasetConfig

Tools = tuple[dict[str, object], ...]
_Pairs = tuple[tuple[str, str], ...]

THINKING: Final[_Pairs] = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "thoughts")),
    *((f"<{name}>", f"</{name}>") for name in ("reasoning", "scratchpad", "scratch_pad", "cot")),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThoughts, Sky-T1, STILL
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("## Thinking\n", "## Final Response\n"),  # HuatuoGPT-o1
)
"""Openings and closings of thinking, in upper or lower case."""
ANSWERS: Final[_Pairs] = (
    *((f"<{name}>", f"</{name}>") for name in ("answer", "output", "response", "solution")),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|start|>assistant<|channel|>final<|message|>", ""),
)
"""What may stand around the whole answer behind thinking; "" closes with the text."""
CALLS: Final[_Pairs] = (
    *((f"<{name}>", f"</{name}>") for name in ("tool_call", "tool_calls", "function_call")),
    ("<function=", "</function>"),  # Llama 3.1
    ("<|tool_call|>", ""),  # Granite
    ("<|fn_start|>", "<|fn_end|>"),
    ("<functioncall>", ""),  # Glaive
    ("[TOOL_CALLS]", ""),
    ("<|python_tag|>", ""),  # Llama 3
)
RESULTS: Final[_Pairs] = tuple(
    (f"<{name}>", f"</{name}>") for name in ("tool_response", "tool_result", "function_response")
)
TOOLS: Final[_Pairs] = (
    *((f"<{name}>", f"</{name}>") for name in ("tools", "available_tools", "functions")),
    ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
)
ENDS: Final = (
    *("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>"),
    *(
        "</functioncall>",
        "<|return|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
    ),
)
BEGINNINGS: Final = (
    *("[/INST]", "<|im_start|>assistant", "<|start_header_id|>assistant<|end_header_id|>"),
    *("<start_of_turn>model", "<｜Assistant｜>"),
)
"""What some templates write before an answer."""
_OTHERS: Final = (
    *("[INST]", "[/INST]", "<<SYS>>", "[SYSTEM_PROMPT]", "[TOOL_RESULTS]", "<|im_start|>"),
    *("<|start_header_id|>", "<start_of_turn>", "<｜User｜>", "<｜Assistant｜>"),
    *("<|begin_of_solution|>", "<｜tool▁calls▁begin｜>"),
)
# What Hermes' and Qwen's system prompts say of the markers; it is wrong once these are tokens.
_PROTOCOL = re.compile(
    r"You are provided with function signatures within <tools> ?</tools> XML tags[.:]\s*"
    r"|After calling & executing the functions, you will be provided with function results"
    r" within <tool_response> ?</tool_response> XML tags\.\s*"
    r"|Here are the available tools:\s*"
    r"|(?:For each function call,? return a json object"
    r"|Use the following pydantic model json schema for each tool call).*</tool_call>\s*",
    re.IGNORECASE | re.DOTALL,
)


def _any_of(markers: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(markers, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)


def _firsts(pairs: _Pairs) -> re.Pattern[str]:
    return _any_of([opening for opening, _ in pairs])


_CLOSING_OF = {opening.lower(): closing for opening, closing in THINKING + ANSWERS + CALLS}
_OPENS_THINKING, _OPENS_CALL = _firsts(THINKING), _firsts(CALLS)
_CLOSES_THINKING = _any_of([closing for _, closing in THINKING])
_CLOSES_ALONE = re.compile(rf"^[ \t]*({_CLOSES_THINKING.pattern})[ \t]*$", re.I | re.M)
_TOOLS = re.compile("|".join(rf"{re.escape(a)}(.*?){re.escape(b)}" for a, b in TOOLS), re.S)
_RESULT = re.compile(
    r"\s*(?:" + "|".join(rf"{re.escape(a)}(.*?){re.escape(b)}" for a, b in RESULTS) + r")\s*", re.S
)
_NAMED_CALL = re.compile(r"\s*([\w-]+)(?:(?:\[CALL_ID\](\w+))?\[ARGS\]|>)")
_LEFT = _any_of(
    [opening for opening, _ in CALLS + RESULTS if opening != "<functioncall>"]
    + [*ENDS, *_OTHERS, "<|begin_of_thought|>", "[AVAILABLE_TOOLS]"]
)

# One look at a text: most have no marker, and many none of the characters that begin one.
_EVERY: Final = (
    *(each for pair in THINKING + CALLS + RESULTS + TOOLS for each in pair if each),
    *(*ENDS, *BEGINNINGS, *_OTHERS),
)
_FIRST_CHARACTERS: Final = sorted({each[0] for each in _EVERY})
_ANY = _any_of(_EVERY)


def _has_marker(text: str) -> bool:
    for first in _FIRST_CHARACTERS:
        if first in text:
            return _ANY.search(text) is not None
    return False


def _is_marked(message: Message) -> bool:
    if isinstance(message.content, str):
        return _has_marker(message.content)
    texts = (part.text for part in message.content if isinstance(part, Text | Think))
    return any(map(_has_marker, texts))


def read_markers(
    messages: Sequence[Message],
    tools: Tools,
    dataset: DatasetConfig,
    read_tools: Callable[[object], Tools],
) -> tuple[Sequence[Message], Tools, list[Note]]:
    """The messages and tools with what their texts mark, and what there is to know about it.

    `read_tools` checks definitions. Raises RowProblem for thinking that never closes or is given
    twice, and for a tool result without an id that answers no call.
    """
    if not any(message.role == "tool" or _is_marked(message) for message in messages):
        return messages, tools, []
    last = max((at for at, each in enumerate(messages) if each.role == "assistant"), default=0)
    has_lone_result = any(m.role == "tool" and m.tool_call_id is None for m in messages[:last])
    reader = _Reader(dataset, tools, read_tools, has_lone_result)
    read = [each for message in messages for each in reader.read(message)]
    return read, reader.tools, reader.notes


@dataclass(slots=True)
class _Reader:
    """Remembers which calls are unanswered: results without an id answer them in their order.

    Calls written as text have no ids; other calls get theirs only where a result needs one.
    """

    dataset: DatasetConfig
    tools: Tools
    check_tools: Callable[[object], Tools]
    has_lone_result: bool
    notes: list[Note] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    made: int = 0

    def read(self, message: Message) -> Iterator[Message]:
        """The messages that one stands for: several where it holds several results."""
        if self.has_lone_result and message.tool_calls:
            if any(call.id is None for call in message.tool_calls):
                text = "The calls have no ids, so they are numbered."
                self.notes.append(Note("call_ids_made", text, message.source))
            message = replace(message, tool_calls=tuple(map(self._number, message.tool_calls)))
        if not _is_marked(message):
            yield self._identify(message) if message.role == "tool" else message
            return
        if self.dataset.read_markers:
            results = list(self._read_results(message))
            if results:
                yield from map(self._identify, results)
                return
            turns = self._read_prompt(message)
            if turns:
                for turn in turns:
                    yield from self.read(turn)
                return
            if message.role == "assistant":
                message = self._read_calls(self._drop_end(message))
            elif message.role == "system":
                before, message = message, self._read_tools(message)
                if before.content and not message.content:
                    return
                message = _show_thinking(message)
        if message.role == "assistant" and self.dataset.split_thinking is not False:
            message = self._read_thinking(message)
        elif message.role == "tool":
            message = self._identify(message)
        self._report_left(message)
        yield message

    def _read_prompt(self, message: Message) -> list[Message]:
        """The messages of a user's text that a chat template wrote up to the answer."""
        text = message.content if message.role == "user" else ""
        found = read_prompt(text) if isinstance(text, str) else None
        if found is None:
            return []
        name, turns = found
        self._note("markers_read", f"Messages written as {name}: read as messages", name, message)
        return [replace(message, role=role, content=content) for role, content in turns]

    def _drop_end(self, message: Message) -> Message:
        """An answer without the beginning and the end of a turn that it spells out."""
        head, text = _last_text(message)
        kept, about = text.strip(), ""
        while (end := next((end for end in ENDS if kept.endswith(end)), None)) is not None:
            if end == "</s>" and "<s>" in kept:  # HTML's
                break
            about, kept = end, kept.removesuffix(end).rstrip()
        start = next((start for start in BEGINNINGS if not head and kept.startswith(start)), None)
        if start is not None:
            about, kept = start, kept.removeprefix(start).lstrip()
        if not about:
            return message
        self._note("markers_read", f"{about} around an answer: left out", about, message)
        return _with_last(message, head, kept)

    def _read_calls(self, message: Message) -> Message:
        """An answer that ends in nothing but calls, with these as calls."""
        head, text = _last_text(message)
        start = max((found.end() for found in _CLOSES_THINKING.finditer(text)), default=0)
        found = _OPENS_CALL.search(text, start)
        if found is None or message.tool_calls:
            return message
        calls = _parse_calls(text[found.start() :])
        if not calls:
            return message
        self._note("markers_read", f"Calls written as {found[0]}: read as calls", found[0], message)
        message = _with_last(message, head, text[: found.start()].rstrip())
        return replace(message, tool_calls=tuple(map(self._number, calls)))

    def _number(self, call: ToolCall) -> ToolCall:
        if call.id is None:
            self.made += 1
            # Nine letters and digits: the only form that v7 and v11 take.
            call = replace(call, id=f"text{self.made:05d}")
        self.unanswered.append(str(call.id))
        return call

    def _read_results(self, message: Message) -> Iterator[Message]:
        """A result for each block, where a tool's or a user's message is nothing but blocks."""
        waits = message.role == "tool" or (message.role == "user" and self.unanswered)
        if not waits or not isinstance(message.content, str):
            return
        blocks, end = list[str](), 0
        while (found := _RESULT.match(message.content, end)) is not None:
            blocks.append(next(each for each in found.groups() if each is not None).strip())
            end = found.end()
        if end < len(message.content):
            return
        opening = message.content.lstrip().partition(">")[0] + ">"
        for index, block in enumerate(blocks):
            given = message.tool_call_id if index == 0 else None
            yield replace(message, role="tool", content=block, tool_call_id=given)
        if blocks:
            text = f"Tool results written as {opening}: read as results"
            self._note("markers_read", text, opening, message)

    def _identify(self, result: Message) -> Message:
        if result.tool_call_id is not None:
            if result.tool_call_id in self.unanswered:
                self.unanswered.remove(result.tool_call_id)
            return result
        if self.unanswered:
            return replace(result, tool_call_id=self.unanswered.pop(0))
        raise result.problem(
            "The tool result names no call.",
            "It has no tool_call_id, and every call before it has its result.",
            "Set tool_call_id to the id of the call that it answers. Where calls are to stay text,"
            " results are the user's: roles: {user: [tool]}, with your name for tool.",
        )

    def _read_tools(self, message: Message) -> Message:
        """A system prompt without the tools that it lists, which become the row's."""
        if not isinstance(message.content, str):
            return message
        for found in _TOOLS.finditer(message.content):
            listed = next(each for each in found.groups() if each is not None)
            tools = self._parse_tools(listed)
            if not tools or (self.tools and self.tools != tools):
                continue
            self.tools = tools
            opening = found[0][: found[0].index(listed)]
            text = f"Tools written as {opening} in the system prompt: read as tools"
            self._note("markers_read", text, opening, message)
            before, after = message.content[: found.start()], message.content[found.end() :]
            left = (_PROTOCOL.sub("", each).strip() for each in (before, after))
            return replace(message, content="\n\n".join(each for each in left if each))
        return message

    def _parse_tools(self, listed: str) -> Tools:
        value = _parse(listed)
        if value is None:  # Qwen's: an object a line
            value = [_parse(line) for line in listed.splitlines() if line.strip()]
        try:
            return self.check_tools(value if isinstance(value, list) else [value])
        except RowProblem:
            return ()

    def _read_thinking(self, message: Message) -> Message:
        everywhere = self.dataset.split_thinking is True
        parts = list(message.parts)
        given = parts.pop(0) if parts and isinstance(parts[0], Think) else None
        if not parts or not isinstance(parts[0], Text):
            return message
        text = parts[0].text
        if isinstance(given, Think) and (inner := _unwrap(given.text, THINKING)) != given.text:
            given = replace(given, text=inner)
            message = replace(message, content=(given, *parts))
            self._note("markers_read", "Markers inside a thinking key: left out", "", message)
        if given is not None and _CLOSES_THINKING.search(text) is None:
            return message
        split = _split(text, everywhere, message)
        if split is None:
            return message
        marker, found = split
        if given is not None:
            if any(isinstance(each, Think) and each != given for each in found):
                raise message.problem(
                    "The message gives its thinking twice.",
                    f"It has a key or a chunk for it, and other thinking written as {marker}.",
                    "Keep one of them.",
                )
            found = [given, *(each for each in found if isinstance(each, Text))]
        if isinstance(message.content, str):
            *found, last = found
            assert isinstance(last, Text)
            found.append(Text(last.text.rstrip(" ")))  # as mistral-common does to one string
        self._note(
            "thinking_read", f"Thinking written as {marker}: read as thinking", marker, message
        )
        content: str | tuple[Part, ...] = (*found, *parts[1:])
        if isinstance(message.content, str) and len(content) == 1:
            content = "".join(each.text for each in found if isinstance(each, Text))
        return replace(message, content=content, written=message.content)

    def _report_left(self, message: Message) -> None:
        """A note where a marker stays text."""
        if message.role == "tool":
            return
        text = "\n".join(part.text for part in message.parts if isinstance(part, Text))
        if message.role == "assistant" and self.dataset.split_thinking is None:
            found = _CLOSES_THINKING.search(text)
            if found is not None and found[0] not in ENDS:
                self._note(
                    "thinking_unsure",
                    f"{found[0]} inside an answer stays text ({_excerpt(text, found)});"
                    " split_thinking: true reads it as thinking, false keeps it without this line",
                    found[0],
                    message,
                )
        found = _LEFT.search(text) if self.dataset.read_markers else None
        if found is not None and not (found[0] == "</s>" and "<s>" in text):
            self._note(
                "markers_left",
                f"{found[0]} stays text ({_excerpt(text, found)}); delete it where it comes from"
                " a chat template; read_markers: false keeps it without this line",
                found[0],
                message,
            )

    def _note(self, name: NoteId, text: str, about: str, message: Message) -> None:
        if not any(note.id == name and note.about == about for note in self.notes):
            self.notes.append(Note(name, f"{text}.", message.source, about))


def _last_text(message: Message) -> tuple[tuple[Part, ...], str]:
    """A message's last part as text, "" where it is none, and the parts before it."""
    *head, last = message.parts or (Text(""),)
    return (tuple(head), last.text) if isinstance(last, Text) else (message.parts, "")


def _with_last(message: Message, head: tuple[Part, ...], text: str) -> Message:
    return replace(
        message, content=text if isinstance(message.content, str) else (*head, Text(text))
    )


def _show_thinking(message: Message) -> Message:
    """A system prompt that shows where thinking goes, as on the models' pages: blanks stay."""
    text = message.content
    if not isinstance(text, str) or (text.count("[THINK]"), text.count("[/THINK]")) != (1, 1):
        return message
    before, _, rest = text.partition("[THINK]")
    thinking, closing, after = rest.partition("[/THINK]")
    if not closing:
        return message
    parts = (Text(before), Think(thinking), Text(after))
    return replace(message, content=parts, written=text)


def _excerpt(text: str, found: re.Match[str]) -> str:
    return describe(text[max(0, found.start() - 20) : found.end() + 20])


def _split(text: str, everywhere: bool, message: Message) -> tuple[str, list[Part]] | None:
    """The marker of thinking in an answer, and its parts, the last of them a text.

    None where no thinking is marked.
    """
    parts, rest, marker = list[Part](), text.lstrip(), ""
    opens = _OPENS_THINKING.search if everywhere else _OPENS_THINKING.match
    while (found := opens(rest)) is not None and (everywhere or not marker):
        marker = marker or found[0].strip()
        closing = _CLOSING_OF[found[0].lower()].strip()
        end = re.compile(re.escape(closing), re.IGNORECASE).search(rest, found.end())
        if end is None:
            raise message.problem(
                f"The assistant's {found[0].strip()} is never closed.",
                "Nothing marks where the thinking ends and the answer begins.",
                f"Add {closing} where the answer begins, delete the row if it was cut off, or keep"
                " it as text with split_thinking: false.",
            )
        inside = rest[found.end() : end.start()]
        if not everywhere and _OPENS_THINKING.search(inside) is not None:
            return None
        parts += _blocks(rest[: found.start()], inside)
        rest = rest[end.end() :].lstrip()
    if not marker:
        alone = (_CLOSES_THINKING if everywhere else _CLOSES_ALONE).search(rest)
        if alone is None or _CLOSES_THINKING.search(rest, alone.end()) is not None:
            return None
        if _OPENS_THINKING.search(rest) is not None:
            return None
        marker = f"{alone[0].strip()} without its start"
        parts += _blocks("", rest[: alone.start()])
        rest = rest[alone.end() :].lstrip()
    return marker, [*parts, Text(_unwrap(rest))]


def _blocks(before: str, thinking: str) -> Iterator[Part]:
    """A text and the thinking behind it, without the blanks around the markers."""
    if before.strip():
        yield Text(before.rstrip())
    if thinking.strip():
        yield Think(thinking.strip())


def _unwrap(text: str, pairs: _Pairs = ANSWERS) -> str:
    """A text without the markers that stand around the whole of it."""
    for opening, closing in pairs:
        inner = text.strip()
        if not inner.startswith(opening) or not inner.endswith(closing):
            continue
        inner = inner.removeprefix(opening).removesuffix(closing)
        if opening not in inner and (not closing or closing not in inner):
            return inner.strip()
    return text


def _parse(text: str) -> object:
    try:
        return load_json(text)
    except (ValueError, RecursionError):
        return None


def _parse_calls(text: str) -> tuple[ToolCall, ...]:
    """The calls of a text that is nothing but calls; none where it is anything else."""
    calls: list[ToolCall] = []
    try:
        while text:
            opening = _OPENS_CALL.match(text)
            if opening is None:
                return ()
            closing = _CLOSING_OF[opening[0].lower()]
            value, text = _take_value(text[opening.end() :], closing)
            calls += read_tool_calls(value)
    except (RowProblem, ValueError, RecursionError):
        return ()
    return tuple(calls)


def _take_value(text: str, closing: str) -> tuple[object, str]:
    """What one call marker holds, and the text behind it. Raises ValueError where it is no call."""
    named = _NAMED_CALL.match(text)
    start = named.end() if named else len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        inner, _, rest = text.partition(closing) if closing else (text, "", "")
        value = _parse(inner)
        if not isinstance(value, dict | list):
            raise
        return value, rest.lstrip()
    rest = text[end:].lstrip()
    if closing and not rest.startswith(closing):
        raise ValueError
    if isinstance(value, dict) and "arguments" not in value and "name" in value:
        value = value | {"arguments": value.get("parameters")}  # Llama 3's name for them
    if named:
        value = {"name": named[1], "arguments": value} | ({"id": named[2]} if named[2] else {})
    return value, rest.removeprefix(closing).lstrip()

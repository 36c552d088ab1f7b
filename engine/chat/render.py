"""A conversation to token ids, the kind of each token and the message that it came from.

mistral-common encodes every piece of a conversation on its own, and no text ever becomes a control
token: so piece boundaries are token boundaries and the masks are exact by construction. What its
normalizer and encoders of v3, v7, v11, v13 and v15 would write is written here with one tokenizer
call a piece and no pydantic; the tests hold it to `encode_chat_completion`.

Kinds are stored, labels are derived from them when a batch is made: whether thinking is trained is
then a switch, not a reason to tokenize again.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.chat.conversation import (
    Conversation,
    Image,
    Message,
    Part,
    RowProblem,
    Text,
    Think,
    ToolCall,
)
from engine.chat.images import grid, read_size
from engine.chat.rules import check_tools, check_version, settle, write_json, write_result

if TYPE_CHECKING:
    from engine.chat.tokenizer import ChatTokenizer


Ids: TypeAlias = NDArray[np.uint32]
Kinds: TypeAlias = NDArray[np.uint8]
Sources: TypeAlias = NDArray[np.int32]

# The high bit of a stored kind: the token's message is kept out of the loss by the row.
WITHHELD = 0x80
# What torch's cross entropy skips.
IGNORED_LABEL = -100
# Part of the key of prepared arrays: raised when any conversation gives other arrays than before.
RENDERER_VERSION = 6


class Kind(IntEnum):
    """The kind of a token; its lower-case name is the contract's word."""

    BOS = 0
    SYSTEM = 1
    TOOLS = 2
    SETTINGS = 3
    USER = 4
    IMAGE = 5
    TOOL_RESULT = 6
    TEXT = 7
    THINK = 8
    CALL = 9
    EOS = 10

    @property
    def word(self) -> str:
        return self.name.lower()


# Plain integers: numpy reads a list of IntEnum members ten times slower.
_BOS, _SYSTEM, _TOOLS, _SETTINGS, _USER, _IMAGE = map(int, tuple(Kind)[:6])
_RESULT, _TEXT, _THINK, _CALL, _EOS = map(int, tuple(Kind)[6:])
_JOIN = "\n\n"

# What one call writes: control tokens by id, texts as strings.
Piece: TypeAlias = int | str


@dataclass(frozen=True, slots=True)
class RenderedImage:
    """An image behind a run of image tokens: the bytes of its file, and its grid of tokens."""

    content: bytes | memoryview
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Tokens of the run: each row of the grid ends with one more."""
        return self.rows * (self.columns + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """One conversation as tokens: three arrays of one length, and its images in their order.

    `kinds` holds a `Kind`, with `WITHHELD` set where the row keeps the message out of the loss;
    `sources` the index of the message in the row as given, -1 for tokens of none.
    """

    input_ids: Ids
    kinds: Kinds
    sources: Sources
    images: tuple[RenderedImage, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class LabelRule:
    """Which kinds are learned: the assistant's always, its thinking and the rest by choice.

    `inputs` adds system, tools, settings, user and tool_result tokens. Nothing adds bos, which no
    token precedes, or image tokens, which a model never writes.
    """

    thinking: bool = True
    inputs: bool = False


@lru_cache
def _learned_by_kind(rule: LabelRule) -> NDArray[np.bool_]:
    table = np.zeros(256, np.bool_)  # kinds with WITHHELD stay False
    table[[Kind.TEXT, Kind.CALL, Kind.EOS]] = True
    table[Kind.THINK] = rule.thinking
    table[[Kind.SYSTEM, Kind.TOOLS, Kind.SETTINGS, Kind.USER, Kind.TOOL_RESULT]] = rule.inputs
    return table


def learned(kinds: Kinds, rule: LabelRule) -> NDArray[np.bool_]:
    """True for each token that the loss counts."""
    return _learned_by_kind(rule)[kinds]


def count_learned(kind_counts: Mapping[int, int], rule: LabelRule) -> int:
    """Learned tokens among so many of each stored kind."""
    flags = learned(np.array(list(kind_counts), dtype=np.uint8), rule)
    return int(np.dot(flags, np.array(list(kind_counts.values()), dtype=np.int64)))


def labels(input_ids: Ids, kinds: Kinds, rule: LabelRule) -> NDArray[np.int64]:
    """The ids that are learned, -100 elsewhere; not shifted."""
    return np.where(learned(kinds, rule), input_ids.astype(np.int64), IGNORED_LABEL)


def truncate(
    rendered: Rendered, limit_tokens: int, rule: LabelRule | None = None
) -> Rendered | None:
    """The first `limit_tokens` tokens at most, or None where none that is learned remains.

    A cut inside a run of image tokens moves to before it: a part of an image means nothing.
    """
    end = min(limit_tokens, len(rendered))
    kinds = rendered.kinds & ~np.uint8(WITHHELD)
    if end < len(rendered) and kinds[end] == Kind.IMAGE:
        while end and kinds[end - 1] == Kind.IMAGE:
            end -= 1
    if not learned(rendered.kinds[:end], rule or LabelRule()).any():
        return None
    if end == len(rendered):
        return rendered
    left = int(np.count_nonzero(kinds[:end] == Kind.IMAGE)) if rendered.images else 0
    whole = 0
    while whole < len(rendered.images) and left >= rendered.images[whole].tokens:
        left -= rendered.images[whole].tokens
        whole += 1
    return Rendered(
        rendered.input_ids[:end],
        rendered.kinds[:end],
        rendered.sources[:end],
        rendered.images[:whole],
    )


def render(
    conversation: Conversation,
    tokenizer: "ChatTokenizer",
    *,
    history_thinking: Literal["keep", "drop"] = "keep",
) -> Rendered:
    """The arrays of a conversation, ids equal to mistral-common's `encode_chat_completion`.

    `history_thinking` "drop" leaves out the assistant's thinking before the last user message,
    as some servers do. Raises RowProblem where the tokenizer's version refuses the conversation.
    """
    return render_settled(settle(conversation, tokenizer, history_thinking), tokenizer)


def render_settled(conversation: Conversation, tokenizer: "ChatTokenizer") -> Rendered:
    """The arrays of a conversation that `settle` has made. Raises RowProblem as `render` does."""
    try:
        with unheard():
            return _encode(conversation, tokenizer)
    except BaseException as error:
        # tiktoken's Rust panics on a run of some 10^6 blanks, outside Exception and unexported.
        if type(error).__name__ != "PanicException":
            raise
        raise RowProblem(
            "The text cannot be tokenized.",
            "It holds a run of blanks, or of one character, that is too long for the tokenizer's"
            " pattern.",
            "Shorten the run, or delete the row.",
        ) from None


@contextmanager
def unheard() -> Iterator[None]:
    """Without stderr: Rust writes there where it panicked before Python hears of it."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    try:
        os.dup2(_null(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@cache
def _null() -> int:
    return os.open(os.devnull, os.O_WRONLY)


def _encode(conversation: Conversation, tokenizer: "ChatTokenizer") -> Rendered:
    check_version(conversation, tokenizer)
    writer = _TokenWriter(conversation, tokenizer)
    writer.write(_BOS, -1, tokenizer.specials.bos)
    messages = conversation.messages
    if tokenizer.version == "v3" and next(m for m in messages if m.role != "system").role != "user":
        messages = (Message("user", ""), *messages)  # as mistral-common does
    tools_at = _place_of_tools(messages, tokenizer.version)
    calls: Sequence[ToolCall] = ()
    start = 0
    while start < len(messages):
        role = messages[start].role
        end = start + 1
        while end < len(messages) and messages[end].role == role:
            end += 1
        turn = messages[start:end]
        if role == "assistant":
            calls = [call for message in turn for call in message.tool_calls]
            writer.write_assistant(turn, calls)
        elif role == "user":
            writer.write_user(turn, start <= tools_at < end)
        elif role == "tool":
            writer.write_results(turn, calls)
        elif tokenizer.version != "v3":
            writer.write_system(turn)
        start = end
    return writer.finish()


def _place_of_tools(messages: Sequence[Message], version: str) -> int:
    """Index of a message of the user turn before which the tools are written, or -1."""
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    if not users:
        return -1
    return users[-1] if version in ("v3", "v7", "v11") else users[0]


class _TokenWriter:
    """Writes a conversation: ids, and runs of tokens of one kind and source."""

    def __init__(self, conversation: Conversation, tokenizer: "ChatTokenizer") -> None:
        self._conversation = conversation
        self._tokenizer = tokenizer
        self._tools_json: str | None = None
        if conversation.tools:
            self._tools_json = write_json(conversation.tools, "The tools", None)
            check_tools(self._tools_json)
        self._chunk_join = "" if tokenizer.version == "v15" else _JOIN
        self._writes_ids = tokenizer.version in ("v3", "v7", "v11")
        self._offset = tokenizer.first_text_id
        self._ids: list[int] = []
        self._images: list[RenderedImage] = []
        self._lengths: list[int] = []
        self._kinds: list[int] = []
        self._sources: list[int] = []
        systems = [message for message in conversation.messages if message.role == "system"]
        self._prompt = self._join_prompt(systems) if tokenizer.version == "v3" else ""
        self._prompt_kind = _SYSTEM | _mark(systems)
        self._prompt_source = systems[-1].source if systems else -1

    def _join_prompt(self, systems: Sequence[Message]) -> str:
        """What v3 writes before the last user's text; empty where there is no system prompt."""
        texts = [self._join((message,)) for message in systems if message.content]
        prompt = _JOIN.join(text for text in texts if isinstance(text, str))
        return prompt and prompt + _JOIN

    def write(self, kind: int, source: int, *pieces: Piece) -> None:
        ids = self._ids
        before = len(ids)
        for piece in pieces:
            if isinstance(piece, str):
                ids += self._tokenizer.encode_ordinary(piece)
            else:
                ids.append(piece - self._offset)
        self._close_run(kind, source, before)

    def _write_repeated(self, kind: int, source: int, start: int, text: str, end: int) -> None:
        """As `write`, for a text that other rows have too."""
        before = len(self._ids)
        self._ids.append(start - self._offset)
        self._ids += self._tokenizer.encode_repeated(text)
        self._ids.append(end - self._offset)
        self._close_run(kind, source, before)

    def _close_run(self, kind: int, source: int, before: int, end: int | None = None) -> None:
        self._lengths.append((len(self._ids) if end is None else end) - before)
        self._kinds.append(kind)
        self._sources.append(source)

    def write_system(self, turn: Sequence[Message]) -> None:
        special = self._tokenizer.specials
        for message in turn:
            kind = _SYSTEM | _mark((message,))
            content = self._join((message,))
            if isinstance(content, str):
                start, end = special.system, special.end_system
                self._write_repeated(kind, message.source, start, content, end)
            else:
                pieces = [piece for part in content for piece in self._pieces(part)]
                self.write(kind, message.source, special.system, *pieces, special.end_system)

    def write_user(self, turn: Sequence[Message], with_tools: bool) -> None:
        special = self._tokenizer.specials
        mark, source = _mark(turn), turn[-1].source
        if with_tools:
            self._write_tools(mark, source)
        content, prompt = self._join(turn), self._prompt if with_tools else ""
        if isinstance(content, str) and not prompt:
            self.write(_USER | mark, source, special.inst, content, special.end_inst)
            return
        self.write(_USER | mark, source, special.inst)
        if isinstance(content, str):
            self._write_prompted(content, mark, source)
        else:
            if prompt:
                self.write(self._prompt_kind, self._prompt_source, prompt)
            self._write_shown(_USER, mark, source, _image_first(content))
        self.write(_USER | mark, source, special.end_inst)

    def _write_prompted(self, text: str, mark: int, source: int) -> None:
        """The user's text behind v3's system prompt; a token that holds some of both is its."""
        ids, start = self._ids, len(self._ids)
        ids += self._tokenizer.encode_ordinary(self._prompt + text)
        end, left = start, _utf8_size(self._prompt)
        while end < len(ids) and (left := left - self._tokenizer.size(ids[end])) >= 0:
            end += 1
        self._close_run(self._prompt_kind, self._prompt_source, start, end)
        self._close_run(_USER | mark, source, end)

    def _write_shown(self, kind: int, mark: int, source: int, parts: Sequence[Part]) -> None:
        """Texts and images of a user or a tool."""
        for part in parts:
            if isinstance(part, Image):
                self._write_image(measure(part, self._tokenizer, source), mark, source)
            else:
                self.write(kind | mark, source, part.text)

    def _write_image(self, image: RenderedImage, mark: int, source: int) -> None:
        special = self._tokenizer.specials
        assert special.image is not None
        assert special.image_break is not None
        assert special.image_end is not None
        before = len(self._ids)
        line = [special.image] * image.columns + [special.image_break]
        self._ids += [token - self._offset for token in line] * image.rows
        self._ids[-1] = special.image_end - self._offset
        self._close_run(_IMAGE | mark, source, before)
        self._images.append(image)

    def _write_tools(self, mark: int, source: int) -> None:
        special = self._tokenizer.specials
        if self._tools_json is not None:
            start, end = special.tools, special.end_tools
            self._write_repeated(_TOOLS | mark, source, start, self._tools_json, end)
        effort = self._conversation.reasoning_effort
        if effort is not None and special.settings is not None:
            assert special.end_settings is not None
            text = json.dumps({"reasoning_effort": effort})
            start, end = special.settings, special.end_settings
            self._write_repeated(_SETTINGS | mark, source, start, text, end)

    def write_assistant(self, turn: Sequence[Message], calls: Sequence[ToolCall]) -> None:
        mark, source = _mark(turn), turn[-1].source
        content = self._join(turn)
        if isinstance(content, str):
            # mistral-common drops the spaces that end an answer, but not those of a chunk.
            self.write(_TEXT | mark, source, content.rstrip(" "))
        else:
            for part in content:
                kind = _THINK if isinstance(part, Think) else _TEXT
                self.write(kind | mark, source, *self._pieces(part))
        if calls:
            self.write(_CALL | mark, source, *self._call_pieces(calls, source))
        self.write(_EOS | mark, source, self._tokenizer.specials.eos)

    def _pieces(self, part: Part) -> tuple[Piece, ...]:
        special = self._tokenizer.specials
        if isinstance(part, Text):
            return (part.text,)
        assert isinstance(part, Think)
        assert special.think is not None
        assert special.end_think is not None
        opened = (special.think, part.text)
        return (*opened, special.end_think) if part.closed else opened

    def _call_pieces(self, calls: Sequence[ToolCall], source: int) -> list[Piece]:
        special = self._tokenizer.specials
        what = "A tool call's arguments"
        if self._tokenizer.version in ("v3", "v7"):
            listed = [
                {"name": call.name, "arguments": call.arguments}
                | ({"id": call.id} if call.id is not None else {})
                for call in calls
            ]
            return [special.call, write_json(listed, what, source)]
        assert special.args is not None
        pieces: list[Piece] = []
        for call in calls:
            pieces += (special.call, call.name)
            if self._writes_ids and call.id is not None:
                assert special.call_id is not None
                pieces += (special.call_id, call.id)
            pieces += (special.args, write_json(call.arguments, what, source))
        return pieces

    def write_results(self, turn: Sequence[Message], calls: Sequence[ToolCall]) -> None:
        """One block a result; from v11 on in the order of the calls."""
        special = self._tokenizer.specials
        version = self._tokenizer.version
        if version not in ("v3", "v7"):
            place = {call.id: index for index, call in enumerate(calls)}
            turn = sorted(turn, key=lambda message: place[message.tool_call_id])
        for message in turn:
            content, mark = self._join((message,)), _mark((message,))
            if not isinstance(content, str):
                self.write(_RESULT | mark, message.source, special.results)
                self._write_shown(_RESULT, mark, message.source, content)
                self.write(_RESULT | mark, message.source, special.end_results)
                continue
            pieces: tuple[Piece, ...] = (content,)
            if self._writes_ids:
                assert message.tool_call_id is not None
                pieces = (message.tool_call_id, special.result_content, content)
                if version == "v3":
                    pieces = (write_result(content, message.tool_call_id, message.source),)
            kind = _RESULT | mark
            self.write(kind, message.source, special.results, *pieces, special.end_results)

    def _join(self, turn: Sequence[Message]) -> str | list[Part]:
        """The content of a turn: one text, or parts where thinking or images are among it."""
        first = turn[0].content
        if len(turn) == 1 and isinstance(first, str):
            return first
        parts: list[Part] = []
        texts: list[str] = []
        for message in turn:
            join = _JOIN
            for part in message.parts:
                if not isinstance(part, Text):
                    if texts:
                        parts.append(Text("".join(texts)))
                        texts.clear()
                    parts.append(part)
                elif part.text:
                    texts += (join, part.text) if texts else (part.text,)
                    join = self._chunk_join
        if texts and parts:
            parts.append(Text("".join(texts)))
        return parts or "".join(texts)

    def finish(self) -> Rendered:
        ids = np.fromiter(self._ids, np.int32, len(self._ids))
        ids += self._offset
        lengths = np.array(self._lengths)
        return Rendered(
            ids.view(np.uint32),
            np.array(self._kinds, np.uint8).repeat(lengths),
            np.array(self._sources, np.int32).repeat(lengths),
            tuple(self._images),
        )


def _mark(turn: Sequence[Message]) -> int:
    return 0 if all(message.learn for message in turn) else WITHHELD


def _utf8_size(text: str) -> int:
    """Bytes of a text as the tokenizer reads it: half a surrogate pair becomes U+FFFD."""
    return len(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())


def measure(image: Image, tokenizer: "ChatTokenizer", source: int) -> RenderedImage:
    """The image with its grid. Raises RowProblem where it was not looked up or is no image."""
    if isinstance(image.content, str):
        raise RowProblem(
            "The image was not looked up.",
            f"It is only named: {image.content[:100]}.",
            "Prepare the dataset from its file, so that the image is read from its folder.",
            source,
        )
    assert tokenizer.image is not None
    width, height = image.size or read_size(image.content)
    return RenderedImage(image.content, *grid(width, height, tokenizer.image))


def _image_first(parts: Sequence[Part]) -> Sequence[Part]:
    """An image that ends a message of texts comes first, as in mistral-common's encoders."""
    if (
        len(parts) > 1
        and isinstance(parts[-1], Image)
        and all(isinstance(part, Text) for part in parts[:-1])
    ):
        return [parts[-1], *parts[:-1]]
    return parts

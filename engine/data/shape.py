"""How a dataset's first rows look: as they are written, as they are understood, in what shape.

It answers "is this the right file?" and "which column is which?" before all rows are read, and
proposes the mapping of columns that the config can express.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from engine.chat.column_names import is_bookkeeping
from engine.chat.conversation import Conversation, Image, Part, RowFormat, RowProblem, Think
from engine.chat.image_values import looks_like_image
from engine.chat.judged import propose_judged
from engine.chat.row import read_row
from engine.chat.written import load_json
from engine.config import DatasetConfig
from engine.data.requests import FirstRow, Shape
from engine.data.sources import iterate_rows

# A raw row is shown, not read to its end.
_SHOWN_CHARACTERS = 4000
_EXAMPLE = 30
_MOST = 10**9
_NAMES = {
    "role": ("role", "from", "speaker", "author", "sender"),
    "content": ("content", "value", "text", "message", "body"),
    "thinking": ("reasoning_content", "reasoning", "thinking", "thoughts", "thought", "rationale"),
}
"""Our property -> the keys that are usual for it, best first."""
_COLUMNS = {
    "field_question": ("question", "instruction", "prompt", "query", "input"),
    "field_answer": ("answer", "output", "response", "completion", "reply"),
}
"""The same for the columns of a table."""
_ADDED = (
    *("field_messages", "field_tools", "field_system", "field_context", "field_thinking"),
    *("field_label", "field_image", "field_question", "field_answer", "message_field_training"),
)
_SUGGESTED = {
    "field_thinking": re.compile("think|reason|rationale|explanation|cot$|chain", re.IGNORECASE),
    "field_system": re.compile("system|persona", re.IGNORECASE),
    "field_context": re.compile(
        r"(?:context|passage|document|article|evidence|source_?text|input(?:_[a-z]{2})?|hint)s?$"
    ),
}
"""Key of an entry -> names of columns which it is likely to read, where nothing else does."""
_LEARNED = re.compile("train|learn|loss|mask", re.IGNORECASE)


def read_shape(dataset: DatasetConfig, folder: Path, count: int) -> Shape:
    """The shape of the first `count` rows. Raises what `iterate_rows` raises."""
    row_format = RowFormat.from_config(dataset)
    columns: dict[str, None] = {}
    images: dict[str, None] = {}
    texts: dict[str, str] = {}
    lists: dict[str, dict[str, None]] = {}
    shows_images = False
    rows, raws = [], list[Mapping[str, object]]()
    for source in islice(iterate_rows(dataset, folder), count):
        raw: Mapping[str, object] = source.row or {}
        raws.append(raw)
        columns.update(dict.fromkeys(raw))
        for column, keys in list_columns(raw):
            lists.setdefault(column, {}).update(dict.fromkeys(keys))
        images.update(dict.fromkeys(name for name, value in raw.items() if looks_like_image(value)))
        for name, value in raw.items():
            if isinstance(value, str) and not is_bookkeeping(name, value):
                texts.setdefault(name, value if len(value) <= _EXAMPLE else f"{value[:_EXAMPLE]}…")
        text = json.dumps(source.row, ensure_ascii=False, default=_shown)[:_SHOWN_CHARACTERS]
        conversation, problem = _understand(raw, row_format, source.problem)
        shows_images |= conversation is not None and any(
            message.holds(Image) for message in conversation.messages
        )
        messages = tuple(_messages(conversation)) if conversation else ()
        rows.append(FirstRow(source.line, source.file, text, messages, problem))
    found = {column: tuple(keys) for column, keys in lists.items() if column not in images}
    written = tuple(name for name in texts if name not in images and name not in found)
    usual = propose_mapping(found, tuple(images), written)
    proposed, reads_more = _propose(dataset, raws, usual)
    return Shape(
        _title(dataset, tuple(columns), found),
        tuple(columns),
        found,
        tuple(images),
        written,
        proposed,
        shows_images,
        tuple(rows),
        texts,
        reads_more,
    )


def propose_mapping(
    lists: Mapping[str, Sequence[str]], images: Sequence[str] = (), texts: Sequence[str] = ()
) -> dict[str, str]:
    """What `mapped` takes: our name of a column or key -> the dataset's; empty if unknown.

    The arguments are as in `Shape`. The first column whose messages have a role and a content is
    taken; where there are none, the columns of a table by the usual names, else in their order.
    """
    image = {"field_image": images[0]} if images else {}
    for column, keys in lists.items():
        found = {
            name: next((key for key in usual if key in keys), None)
            for name, usual in _NAMES.items()
        }
        if found["role"] and found["content"]:
            return {
                "field_messages": column,
                **{k: key for k, key in found.items() if key},
                **image,
            }
    return {} if lists else _propose_columns(texts, images)


def _propose(
    dataset: DatasetConfig, rows: Sequence[Mapping[str, object]], usual: dict[str, str]
) -> tuple[dict[str, str], bool]:
    """The mapping under which most of the rows are read and least of them is left unread, and
    whether it does better than the dataset's entry as it is; empty where none reads any."""
    given = {key: name for key, name in dataset.model_dump().items() if key in _ADDED and name}
    given |= dataset.message_property_mappings or {}
    judged = next((found for row in rows if (found := propose_judged(row, dataset))), None)
    if judged is not None:
        usual = given | judged[1] if judged[1] else {}
    now = best = _worth(dataset, rows, given)
    mapping = usual if _worth(dataset, rows, usual) >= max(now, (1, -_MOST)) else {}
    candidates = [usual]
    readable = next((each for each in (usual, given) if _worth(dataset, rows, each)[0]), None)
    if readable is not None:
        for key, name in _read_more(mapped(dataset, readable), rows):
            readable = readable | {key: name}
            candidates.append(readable)
    for candidate in candidates:
        new = _worth(dataset, rows, candidate)
        # What is read now is not given up for what would be read then.
        gives_up = now[0] and _unread(dataset, rows, candidate) - _unread(dataset, rows, given)
        if new > best and not gives_up:
            mapping, best = candidate, new
    # Rows that nothing reads yet are not offered a mapping that would lose some of them.
    whole = judged is not None or now[0] > 0 or best[1] == 0
    return mapping, best > now and whole


def _unread(
    dataset: DatasetConfig, rows: Sequence[Mapping[str, object]], mapping: Mapping[str, str]
) -> set[str]:
    row_format = RowFormat.from_config(mapped(dataset, mapping))
    read = (_understand(row, row_format, None)[0] for row in rows)
    return {name for each in read if each is not None for name in each.unread}


def _worth(
    dataset: DatasetConfig, rows: Sequence[Mapping[str, object]], mapping: Mapping[str, str]
) -> tuple[int, int]:
    """How many rows are read under a mapping, and, negative, what is left unread in them."""
    row_format = RowFormat.from_config(mapped(dataset, mapping))
    read = [_understand(row, row_format, None)[0] for row in rows]
    found = [each for each in read if each is not None]
    left = sum(
        not is_bookkeeping(name, value) for each in found for name, value in each.unread.items()
    )
    return len(found), -left


def _read_more(
    dataset: DatasetConfig, rows: Sequence[Mapping[str, object]]
) -> Iterator[tuple[str, str]]:
    """Keys that would read what is unread, by what its name says of it."""
    row_format = RowFormat.from_config(dataset)
    for row in rows:
        conversation, _ = _understand(row, row_format, None)
        for name, value in (conversation.unread if conversation else {}).items():
            key = name.removeprefix("messages[].")
            if key != name and isinstance(value, bool) and _LEARNED.search(key):
                yield "message_field_training", key
            for field, words in _SUGGESTED.items() if isinstance(value, str) else ():
                if words.search(key) and (key == name or field == "field_thinking"):
                    yield field, key


def mapped(dataset: DatasetConfig, mapping: Mapping[str, str]) -> DatasetConfig:
    """The dataset read by `mapping`, as `propose_mapping` gives it."""
    fields = DatasetConfig.model_fields
    columns = {name: key for name, key in mapping.items() if name in fields}
    keys = {name: key for name, key in mapping.items() if name not in columns}
    return dataset.model_copy(update={**columns, "message_property_mappings": keys or None})


def _propose_columns(texts: Sequence[str], images: Sequence[str]) -> dict[str, str]:
    """The columns of a table: a question and an answer, or an image and its caption."""
    image = {"field_image": images[0]} if images else {}
    named = {
        name: key
        for name, usual in _COLUMNS.items()
        if (key := next((each for each in usual if each in texts), None))
    }
    left = [text for text in texts if text not in named.values()]
    missing = [name for name in _COLUMNS if name not in named]
    if len(left) == len(missing):
        named |= dict(zip(missing, left, strict=True))
    elif images and len(texts) == 1:
        named = {"field_answer": texts[0]}
    complete = "field_answer" in named and (images or "field_question" in named)
    return {**image, **named} if complete else {}


def _understand(
    row: Mapping[str, object], row_format: RowFormat, problem: RowProblem | None
) -> tuple[Conversation | None, str | None]:
    if problem is None:
        try:
            return read_row(row, row_format), None
        except RowProblem as found:
            problem = found
    return None, str(problem)


def _messages(conversation: Conversation) -> Iterator[tuple[str, str]]:
    for message in conversation.messages:
        parts = () if isinstance(message.content, str) else message.content
        for part in parts:
            yield ("think" if isinstance(part, Think) else message.role), _text(part)
        if isinstance(message.content, str) and (message.content or not message.tool_calls):
            yield message.role, message.content
        for call in message.tool_calls:
            yield "call", f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}"


def _text(part: Part) -> str:
    if not isinstance(part, Image):
        return part.text
    if isinstance(part.content, str):
        return f"[image {part.content}]"
    return f"[image of {len(part.content):,} bytes]"


def _shown(value: object) -> str:
    """For `json.dumps(default=...)`: pictures by their size, other values as their text."""
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else str(value)


def list_columns(row: Mapping[str, object]) -> Iterator[tuple[str, list[str]]]:
    """The columns that hold a list of objects, as a list or as the JSON text of one."""
    for column, value in row.items():
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            try:
                value = load_json(value)
            except (ValueError, RecursionError):
                continue
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            yield column, list(dict.fromkeys(key for each in value for key in each))


def _title(
    dataset: DatasetConfig, columns: Sequence[str], lists: Mapping[str, Sequence[str]]
) -> str:
    if dataset.message_property_mappings:
        return f"{dataset.field_messages} ({', '.join(dataset.message_property_mappings.values())})"
    for column in (dataset.field_messages, "conversations", "conversation"):
        if column in lists:
            keys = lists[column]
            if "from" in keys and "value" in keys:
                return f"ShareGPT turns in {column}"
            return f"chat messages in {column}"
    return f"columns {', '.join(columns[:6])}" if columns else "no columns"

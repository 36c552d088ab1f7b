"""Where a row keeps what: which columns hold its conversation, system prompt, thinking and tools.

A column is known by a key of the config, else by the usual names for it, whatever their case and
punctuation. `Columns` remembers which were read: the others are reported, so that nothing that
carries meaning vanishes without a word.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NoReturn

from engine.chat.choices import Choices, read_choices
from engine.chat.column_names import (
    ANSWERS,
    ASKED_WITH_CHOICES,
    CAPTIONS,
    CHOSEN,
    LISTS,
    PAIRS,
    PERHAPS_LISTS,
    QUESTIONS,
    SWITCHES,
    TRANSCRIPTS,
    USUAL,
    index_of,
    is_bookkeeping,
)
from engine.chat.conversation import (
    THINKING_NAMES,
    Message,
    Note,
    NoteId,
    Role,
    RowFormat,
    RowProblem,
    Text,
    Think,
    describe,
    plain_name,
)
from engine.chat.image_values import looks_like_image
from engine.chat.judged import refuse_judged
from engine.chat.message import (
    MessageReader,
    describe_keys,
    has_role,
    looks_like_calls,
    read_thinking,
    read_tool_calls,
)
from engine.chat.nested import join_texts, list_in, open_nested
from engine.chat.transcript import read_transcript
from engine.chat.written import parse_json
from engine.config import DatasetConfig

_PLAIN_TEXT: Final = (
    "Windtunnel learns answers, not plain text: write each row as a question and its answer, such"
    ' as {{"question": "Tell what you know of ...", "answer": the text of {}}}.'
)


class Columns:
    """The columns of one row; `used` names those that a rule read, `notes` what a person should
    know of how."""

    __slots__ = ("_choices", "_dataset", "_index", "notes", "reader", "row", "used")

    def __init__(self, row: Mapping[str, object], row_format: RowFormat) -> None:
        row = open_nested(row, row_format.nested) if row_format.nested else row
        self.row = row
        self._choices: Choices | None = None
        self.reader = MessageReader(row_format)
        self.used: set[str] = set()
        self.notes: list[Note] = []
        self._dataset = row_format.dataset
        self._index = index_of(tuple(row)) if all(isinstance(c, str) for c in row) else {}

    def column(self, field: str) -> str | None:
        """The column that a key such as field_system names, else one by a usual name that holds
        something; None where there is none."""
        chosen = _chosen(self._dataset, field)
        if chosen is not None:
            return chosen if self.row.get(chosen) is not None else None
        return self.named(USUAL[field])

    def named(self, names: Sequence[str]) -> str | None:
        """The first column by one of these plain names that holds something."""
        for name in names:
            column = self._index.get(name)
            if column is not None and self.row[column] is not None:
                return column
        return None

    def take(self, field: str) -> object:
        """The value of `column(field)`, which counts as read; None where there is none."""
        column = self.column(field)
        if column is None:
            return None
        self.used.add(column)
        return self.row[column]

    def note(self, name: NoteId, text: str) -> None:
        self.notes.append(Note(name, text))

    def text(self, column: str) -> str:
        """A column that has to hold a text; it counts as read."""
        self.used.add(column)
        value = self.row[column]
        if isinstance(value, str):
            return value
        inside = next(_texts({column: value}), None) if isinstance(value, Mapping) else None
        raise RowProblem(
            f"The column {column} is not text.",
            f"It is {describe(value)}.",
            "Write it as a string"
            + (
                f", or name a text in it in field_question or another key: {inside}."
                if inside
                else "."
            ),
        )

    def refuse_judged(self) -> None:
        """`judged.refuse_judged` of this row, whose verdict counts as read."""
        label = self._dataset.field_label
        if label is not None and label in self.row:
            self.used.add(label)
        refuse_judged(self.row, self._dataset)

    def find_list(self) -> Sequence[object] | None:
        """The turns of a conversation that a column holds as a list or as one text."""
        chosen = self._dataset.field_messages
        answer = self._dataset.field_answer
        if answer is not None and chosen == LISTS[0] and self.row.get(answer) is not None:
            return None
        firm = LISTS if chosen == LISTS[0] else ()
        for name in (chosen, *firm):
            value = self.row.get(name)
            if value is None or value == "":
                continue
            self.used.add(name)
            if isinstance(value, str):
                value = self._read_transcript(name, value) or parse_json(value, name)
            if isinstance(value, list | tuple):
                return value
            raise RowProblem(
                "The messages are not a list.",
                f"{name} is {describe(value)}.",
                'Write them as [{"role": "user", "content": "..."}, ...].',
            )
        if not firm:
            return None
        for name in (*PERHAPS_LISTS, "text"):
            column = self._index.get(name, "")
            value = self.row.get(column)
            if isinstance(value, str) and name in TRANSCRIPTS:
                found = self._read_transcript(column, value)
            else:
                found = find_conversation(value)
            if found is not None:
                self.used.add(column)
                if isinstance(found[0], str):
                    text = f"The texts of {column} are turns by their place, the user's first."
                    self.note("turns_by_place", text)
                return found
        return None

    def _read_transcript(self, column: str, text: str) -> Sequence[object] | None:
        found = read_transcript(text)
        if found is None:
            return None
        template, messages = found
        said = f"Messages written as {template} in {column}: read as messages."
        self.notes.append(Note("markers_read", said, None, template))
        return messages

    def read_list(self, value: Sequence[object], start: int = 0) -> list[Message]:
        """Messages, texts by turns of user and assistant, or pairs of a question and an answer;
        they count from `start`."""
        read: list[Message] = []
        for index, each in enumerate(map(_open_message, value), start):
            if isinstance(each, str):
                role: Role = "assistant" if (index - start) % 2 else "user"
                read.append(Message(role, each, source=index))
            elif isinstance(each, list | tuple):
                read += _read_pair(each, index)
            elif isinstance(each, Mapping) and (keys := _pair_keys(each)):
                read += _read_pair([each[key] for key in keys], index)
                self.reader.leave(each, keys)
            else:
                read.append(self.reader.read(each, index))
        return read

    def answer_beside(self, messages: list[Message]) -> list[Message]:
        """The messages and, where they end before it, the answer that a column of its own holds."""
        column = self._dataset.field_answer or self.named(ANSWERS)
        if not messages or messages[-1].role == "assistant" or column is None:
            return messages
        if not isinstance(self.row.get(column), str):
            return messages
        replies = self._read_answer(column, len(messages))
        self.note("answer_beside", f"The answer in {column} follows the messages.")
        return [*messages, *self._with_thinking(replies)]

    def _with_thinking(self, replies: list[Message]) -> list[Message]:
        """The thinking of a column before the first reply."""
        column = self.column("field_thinking")
        if column is None or (
            self._dataset.field_thinking is None and str(self.row[column]).lower() in SWITCHES
        ):
            return replies
        thinking = self.take("field_thinking")
        return [_think(replies[0], thinking), *replies[1:]] if thinking else replies

    def read_tree(self) -> list[Message] | None:
        """The best-ranked path of an OASST tree, None where the row is none."""
        tree = self.row.get("prompt")
        if not isinstance(tree, Mapping) or "replies" not in tree:
            return None
        self.used.add("prompt")
        turns, left_out = _follow_tree(tree)
        if left_out:
            self.note(
                "tree_path", "Of the tree of replies the best-ranked path is read, no other branch."
            )
        return self.read_list(turns)

    def read_table(self, shows_image: bool) -> list[Message]:
        """Columns of a question and an answer, with what usually stands around them."""
        question, answer = self._find_pair(shows_image)
        turns = None if question is None else self._read_turns(question, answer)
        if turns is not None:
            return turns
        asked = [] if question is None else self._read_question(question)
        listed = question is not None and isinstance(self.row[question], list | tuple)
        replies = self._read_answer(answer, len(asked) if listed else 0)
        history = self.row.get("history")
        before: list[Message] = []
        if isinstance(history, str) and history.lstrip().startswith("["):
            history = parse_json(history, "history")
        if isinstance(history, list | tuple) and not any(isinstance(h, str) for h in history):
            self.used.add("history")
            before = self.read_list(history)
        replies = self._with_thinking(replies)
        return [*before, *(asked or [Message("user", "")]), *replies]

    def _find_pair(self, shows_image: bool) -> tuple[str | None, str]:
        """The columns of the question, None for an image with a caption alone, and the answer."""
        asks, answers = self._dataset.field_question, self._dataset.field_answer
        for names in ("question", asks), ("answer", answers):
            if names[1] is not None and self.row.get(names[1]) is None:
                raise RowProblem(
                    f"The row has no {names[0]}.",
                    f"field_{names[0]} names {names[1]}, and that is"
                    f" {'empty' if names[1] in self.row else f'not in {describe_keys(self.row)}'}.",
                    "Correct the name, or delete the row.",
                )
        self._choices = self._find_choices()
        has_choices = self._choices is not None
        questions: Sequence[str] = ASKED_WITH_CHOICES if has_choices else QUESTIONS
        replies: Sequence[str] = (*CHOSEN, *ANSWERS) if has_choices else ANSWERS
        for question, answer in () if has_choices else PAIRS:
            ask, reply = asks or self.named([question]), answers or self.named([answer])
            if ask is not None and reply is not None:
                return ask, reply
        reply = answers or self.named(replies) or self._label_text()
        ask = asks or self.named([name for name in questions if self._index.get(name) != reply])
        if reply is not None and ask is not None:
            return ask, reply
        if shows_image and (caption := answers or self.named(CAPTIONS)):
            return None, caption
        self._refuse_columns()

    def _label_text(self) -> str | None:
        """The column label where it holds an answer, as ChartQA's, and no class or verdict."""
        label = self.named(["label"])
        return label if label is not None and isinstance(self.row[label], str | list) else None

    def _find_choices(self) -> Choices | None:
        column = self.column("field_choices")
        found = None if column is None else read_choices(column, self.row[column])
        if found is None and self._dataset.field_choices is not None:
            raise RowProblem(
                "The row has no choices.",
                f"field_choices names {self._dataset.field_choices}, and that holds"
                f" {describe(self.row.get(column or ''))}.",
                'Write them as a list of texts, such as ["Paris", "Rome"], or delete the row.',
            )
        letters = "ABCDEFGHIJ"
        beside = {name: self.row[name] for name in letters if name in self.row}
        if found is None and "".join(beside) == letters[: len(beside)]:
            found = read_choices("columns A, B, ...", beside)
            self.used.update(beside if found else ())
        if found is not None and column is not None:
            self.used.add(column)
        return found

    def _refuse_columns(self) -> NoReturn:
        empty = [name for name, value in self.row.items() if value is None or value == ""]
        if self.named(["parentid"]) or {"messageid", "text", "role"} <= self._index.keys():
            raise RowProblem(
                "The row is one message of a tree, not a conversation.",
                f"Its columns are {describe_keys(self.row)}, and the answers are in other rows.",
                "Take the file of whole trees of the same dataset (OASST's *.trees.jsonl), which"
                " is read, or join the rows by parent_id.",
            )
        if splits := _splits(self.row):
            raise RowProblem(
                "The row is a whole dataset, with its splits in one object.",
                f"It has {describe_keys(self.row)}, each a list of rows.",
                "Write each list to a file of its own in one folder, a row a line"
                f" ({', '.join(f'{name}.jsonl' for name in splits)}), and give that folder: train"
                " is learned, the others can be held out.",
            )
        texts = [name for name in _texts(self.row) if plain_name(name) not in THINKING_NAMES]
        fix = "Name the column in field_messages, or use columns such as question and answer, or"
        fix += " name yours in field_question and field_answer"
        others = [name for name, value in self.row.items() if not is_bookkeeping(name, value)]
        talks = [
            name
            for name in others
            if (found := find_conversation(self.row[name]))
            and (not isinstance(found[0], str) or self.named(QUESTIONS) is None)
        ]
        if len(talks) == 1:
            fix = f"Write `field_messages: {talks[0]}` in the dataset's entry"
        elif pair := _pair_among(texts):
            ask, reply = pair
            fix += f": `field_question: {ask}` and `field_answer: {reply}` learn {reply}"
        raise RowProblem(
            "The row has no messages.",
            f"It has no {self._dataset.field_messages}; its columns are {describe_keys(self.row)}"
            + (f"; empty: {describe_keys(dict.fromkeys(empty))}." if empty else "."),
            _PLAIN_TEXT.format(texts[0]) if len(others) == len(texts) == 1 else f"{fix}.",
        )

    def _read_question(self, column: str) -> list[Message]:
        value = self.row[column]
        if isinstance(value, list | tuple):
            self.used.add(column)
            return self.read_list(value)
        texts = [self.text(column)]
        more = self._index.get("input") if plain_name(column) == "instruction" else None
        if more is not None and self.row[more] is not None:
            texts.append(self.text(more))
        return [self._ask(column, texts)]

    def _read_turns(self, question: str, answer: str) -> list[Message] | None:
        """Questions and answers that two columns list in the same order, None where they do not."""
        asked, replies = self.row[question], list_in(self.row[answer])
        if not isinstance(asked, list | tuple) or not isinstance(replies, list | tuple):
            return None
        texts = (*asked, *replies)
        if len(asked) != len(replies) or len(asked) < 2 or {*map(type, texts)} != {str}:
            return None
        self.used.update((question, answer))
        self.note("turns_by_place", f"{question} and {answer} are turns by their place.")
        turns = self.read_list(list(zip(asked, replies, strict=True)))
        return [self._ask(question, [str(asked[0])]), *turns[1:]]

    def _ask(self, column: str, texts: list[str]) -> Message:
        """The user's message of these texts, what usually stands around them in its place."""
        context = self._read_context(column)
        if context and context not in texts:
            texts.insert(0, context)
            name = self.column("field_context") or ""
            value = self.row[name]
            listed = [value] if isinstance(value, Mapping) else value
            is_objects = isinstance(listed, list | tuple) and isinstance(listed[0], Mapping)
            alone = ", its texts alone" if is_objects else ""
            self.note("context_placed", f"{name} stands before {column}{alone}.")
        if self._choices is not None:
            texts[-1] = self._choices.list_after(texts[-1])
        return Message("user", "\n\n".join(text for text in texts if text))

    def _read_context(self, question: str) -> str:
        column = self.column("field_context")
        if column is None or column == question:
            return ""
        value = join_texts(self.row[column])
        if value is None:
            return self.text(column) if self._dataset.field_context is not None else ""
        self.used.add(column)
        return value

    def _read_answer(self, column: str, start: int) -> list[Message]:
        value = self.row[column]
        self.used.add(column)
        if looks_like_calls(value):
            return [Message("assistant", "", self.reader.number(read_tool_calls(value)))]
        if isinstance(value, Mapping):
            if has_role(value):
                return [self.reader.read(value, start)]
            value = list_in(value)
        if self._choices is not None and not isinstance(value, list | tuple | Mapping):
            return [Message("assistant", self._take_choice(self._choices, column, value))]
        if isinstance(value, int | float):
            value = json.dumps(value)
            self.note("answer_written", f"What is no text in {column} is learned as it is written.")
        if plain_name(column) in ("answers", "solutions") and str(value).lstrip()[:2] == '["':
            value = parse_json(str(value), column)
        if isinstance(value, list | tuple):
            if any(isinstance(each, Mapping) and has_role(each) for each in value):
                return self.read_list(value, start)
            value = self._choose(column, value)
        if not isinstance(value, str):
            value = self.text(column)
        return [Message("assistant", value)]

    def _take_choice(self, choices: Choices, column: str, answer: object) -> str:
        index = choices.find(answer, column)
        counted = "" if isinstance(answer, str) and not answer.isdecimal() else ", counted from 0"
        text = f"The {choices.column} stand after the question; learned is the one of {column}"
        self.note("choices_listed", f"{text}{'' if choices.are_named else counted}.")
        return str(answer) if index is None else choices.show(index)

    def _choose(self, column: str, several: Sequence[object]) -> object:
        """The answer that most give, the first of them; texts, or objects with an `answer`."""
        texts = [each.get("answer") if isinstance(each, Mapping) else each for each in several]
        counts = Counter(text for text in texts if isinstance(text, str))
        if len(counts) == 0 or len(texts) != counts.total():
            raise RowProblem(
                f"The column {column} holds no answer.",
                f"It is {'an empty list' if not several else 'a list of what is not text'}.",
                "Write the answer as a string, or delete the row.",
            )
        if len(counts) > 1:
            text = f"Of several {column} the most frequent, else the first, is learned."
            self.note("answer_chosen", text)
        return counts.most_common(1)[0][0]

    def unread(self, messages: Sequence[Message]) -> dict[str, object]:
        """Columns, and keys of messages as messages[].KEY, that no rule read and that do not
        repeat what was read; each with its value."""
        left = {
            name: value
            for name, value in self.row.items()
            if name not in self.used and not _is_empty(value)
        }
        if left:
            said = {
                part.text.strip()
                for message in messages
                for part in message.parts
                if isinstance(part, Text | Think)
            }
            read = [self.row[name] for name in self.used if name in self.row]
            left = {
                name: value
                for name, value in left.items()
                if not (isinstance(value, str) and value.strip() in said) and value not in read
            }
        return left | self.reader.unread


def find_conversation(value: object) -> Sequence[object] | None:
    """The turns in a value of a column that may hold something else, None where it does."""
    if not isinstance(value, list | tuple) or not value:
        return None
    if all(isinstance(each, str) for each in value):
        return value if len(value) > 1 else None
    fits = all(isinstance(each, Mapping) and (has_role(each) or _pair_keys(each)) for each in value)
    return value if fits else None


def _splits(row: Mapping[str, object]) -> list[str]:
    """The columns of a row that is a dataset whole, each a split's list of rows; else none."""
    is_set = "train" in row and all(
        isinstance(each, list) and {*map(type, each)} == {dict} for each in row.values()
    )
    return list(row) if is_set else []


def _texts(row: Mapping[str, object]) -> Iterator[str]:
    """The columns that hold a text, or texts, which can be meant for learning; those in objects as
    COLUMN.KEY."""
    for name, value in row.items():
        if is_bookkeeping(name, value) or looks_like_image(value):
            continue
        if isinstance(value, str):
            if value.strip():
                yield name
        elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            yield from (f"{name}.{key}" for key in _texts(value))
        elif isinstance(value, list | tuple) and {*map(type, value)} == {str}:
            yield name


def _pair_among(texts: Sequence[str]) -> tuple[str, str] | None:
    """The question and the answer among the columns, where their number or names leave no doubt."""
    if len(texts) == 2:
        return texts[0], texts[1]
    asks, replies = (
        [name for name in texts if plain_name(name).endswith(words)]
        for words in (QUESTIONS, ANSWERS)
    )
    return (asks[0], replies[0]) if len(asks) == len(replies) == 1 and asks != replies else None


def _chosen(dataset: DatasetConfig, field: str) -> str | None:
    value: str | None = getattr(dataset, field)
    return None if (field, value) == ("field_tools", "tools") else value


def _pair_keys(value: Mapping[str, object]) -> tuple[str, str] | None:
    """The keys of a turn that holds a question and its answer, as The Cauldron and Capybara do."""
    if has_role(value) or len(value) < 2:
        return None
    index = index_of(tuple(value))
    question = next((index[name] for name in QUESTIONS if name in index), None)
    replies = (index[name] for name in ANSWERS if name in index and index[name] != question)
    answer = next(replies, None)
    return (question, answer) if question is not None and answer is not None else None


def _open_message(each: object) -> object:
    """A message of a list, opened where it is written as the JSON text of one."""
    if isinstance(each, str) and each.startswith("{") and each.endswith("}"):
        try:
            opened = parse_json(each, "the message")
        except RowProblem:
            return each
        return opened if isinstance(opened, Mapping) and has_role(opened) else each
    return each


def _read_pair(pair: Sequence[object], index: int) -> Iterator[Message]:
    if len(pair) != 2 or not all(isinstance(each, str) for each in pair):
        raise RowProblem(
            "A turn is not a question and an answer.",
            f"It is {describe(pair)} of {len(pair)}, and both must be strings.",
            "Write it as two strings, or as two messages with a role and a content.",
            index,
        )
    yield Message("user", str(pair[0]), source=index)
    yield Message("assistant", str(pair[1]), source=index)


def _think(message: Message, thinking: object) -> Message:
    think = Think(read_thinking(thinking))
    return Message(
        "assistant",
        (think, *message.parts),
        message.tool_calls,
        message.tool_call_id,
        message.source,
        message.learn,
    )


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


def _follow_tree(tree: Mapping[str, object]) -> tuple[list[dict[str, object]], bool]:
    """The turns on the best-ranked path of an OASST tree, and whether other replies were left out.

    Replies without a rank come after those with one, in their order.
    """
    turns: list[dict[str, object]] = []
    left_out = False
    node: Mapping[str, object] | None = tree
    while node is not None:
        turns.append({"role": node.get("role"), "content": node.get("text")})
        listed = node.get("replies")
        replies = [
            reply
            for reply in (listed if isinstance(listed, list | tuple) else ())
            if isinstance(reply, Mapping) and not reply.get("deleted")
        ]
        left_out |= len(replies) > 1
        node = min(replies, key=_rank, default=None)
    return turns, left_out


def _rank(reply: Mapping[str, object]) -> float:
    rank = reply.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")

"""What stands over the Data page when asked for: its first rows, and the mapping of columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from engine.data.requests import FirstRow, Shape
from engine.data.statistics import Checkup
from engine.report.data import row_lines, shape_lines
from engine.visible import visible
from engine.wizard.switches import Switch
from tui.widgets.choices import Switches
from tui.widgets.pane import Pane, TextPane

_BARS: Final = "▁▂▃▄▅▆▇█"
_RAW_CHARACTERS: Final = 600
_MESSAGE_CHARACTERS: Final = 300
_NONE: Final = "none"
_KEYS: Final = ("role", "content", "thinking")
"""Of a message; the other names are of columns."""
_ABOUT_LISTS: Final = (
    "messages is the column with the list of messages; role, content and thinking are keys of "
    "each message. The usual names are proposed."
)
_ABOUT_TABLE: Final = (
    "answer is what is learned, question and image are what it answers. Without a question an "
    "image gets its caption alone. The usual names are proposed."
)


def first_rows(rows: Sequence[FirstRow]) -> TextPane:
    """Each row as it is written, then as it is understood or why not."""
    parts = []
    for row in rows:
        file = visible(row.file, one_line=True)
        parts.append(Content.styled(f"line {row.line:,} of {file}", "bold $lit"))
        parts.append(Content.styled(_cut(row.raw, _RAW_CHARACTERS), "$muted"))
        for role, text in row.messages:
            said = _cut(text, _MESSAGE_CHARACTERS)
            parts.append(Content.assemble((f"{role:<10}", "$accent"), said))
        if row.problem:
            problem = visible(row.problem, one_line=True)
            parts.append(Content.assemble(("✗ ", "$error"), problem))
        parts.append(Content(""))
    return TextPane("first rows, as written and as understood", Content("\n").join(parts))


def _cut(text: str, limit: int) -> str:
    shown = visible(text, one_line=True)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


class MappingPanel(Pane):
    """Which column holds the messages, and which of their keys is what; in a table, which columns
    are the question and the answer; and which column is the image. Posts Applied.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "apply", "use this", show=False)]

    @dataclass
    class Applied(Message):
        """`mapping` as `engine.data.shape.mapped` takes it."""

        mapping: dict[str, str]

    def __init__(self, shape: Shape) -> None:
        super().__init__(title="which column is which", subtitle="enter uses this, esc does not")
        self._lists: Mapping[str, Sequence[str]] = shape.lists
        self._images: Sequence[str] = shape.images
        self._texts: Sequence[str] = shape.texts
        proposed: Mapping[str, str] = shape.proposed
        first = next(iter(self._lists), "")
        self._taken = {"field_messages": proposed.get("field_messages", first)}
        self._propose(proposed)

    @staticmethod
    def applies_to(shape: Shape) -> bool:
        """Whether there is anything to choose: messages, or texts of a table."""
        return bool(shape.lists or shape.texts)

    def compose(self) -> ComposeResult:
        yield Switches()
        about = _ABOUT_LISTS if self._lists else _ABOUT_TABLE
        yield Static(Content.styled(f"\n{about}", "$muted"), markup=False)

    def on_mount(self) -> None:
        self._show()

    def _answers(self) -> dict[str, tuple[str, ...]]:
        """What each name can be, in the order of the panel."""
        image = {"field_image": (_NONE, *self._images)} if self._images else {}
        if not self._lists:
            texts = tuple(self._texts)
            return {"field_question": (_NONE, *texts), "field_answer": texts, **image}
        keys = tuple(self._lists[self._taken["field_messages"]])
        own = {"field_messages": tuple(self._lists), "role": keys, "content": keys}
        return {**own, "thinking": (_NONE, *keys), **image}

    def _propose(self, proposed: Mapping[str, str]) -> None:
        """The proposed answer of each name, else its first."""
        messages = self._taken["field_messages"]
        answers = self._answers()
        self._taken = {name: proposed.get(name, values[0]) for name, values in answers.items()}
        self._taken["field_messages"] = messages

    def _show(self) -> None:
        self.query_one(Switches).show_switches(
            [
                Switch(name.removeprefix("field_"), values, values.index(self._taken[name]))
                for name, values in self._answers().items()
            ]
        )

    def on_switches_turned(self, message: Switches.Turned) -> None:
        message.stop()
        name = message.name if message.name in _KEYS else f"field_{message.name}"
        self._taken[name] = message.answer
        if name == "field_messages":
            kept = {"field_image": self._taken["field_image"]} if self._images else {}
            self._propose(kept)
        self._show()

    def action_apply(self) -> None:
        taken = {name: self._taken[name] for name in self._answers()}
        self.post_message(self.Applied({name: key for name, key in taken.items() if key != _NONE}))


def found_content(found: Checkup, shape: Shape, width: int) -> Content:
    """What was found, in lines of at most `width` cells; bars of the lengths before their line."""
    lines = row_lines(found, shape) if found.usable else shape_lines(shape)
    shown = []
    for line in lines:
        text = visible(line.text, one_line=True)
        if line.label == "length" and found.tokens:
            bars = spark(found.tokens.length_counts, min(24, width - len(text) - 11))
            text = f"{bars}  {text}"
        shown.append(Content.assemble((f"{line.label:<9}", "$muted"), text))
    if not found.usable and shape.proposed:
        named = (f"{word.removeprefix('field_')} = {key}" for word, key in shape.proposed.items())
        text = visible(f"m maps them: {', '.join(named)}", one_line=True)
        shown.append(Content.assemble((f"{'try':<9}", "$muted"), text))
    return Content("\n").join(shown)


def spark(counts: Sequence[int], width: int) -> str:
    """Bars of the counts, neighbours added up until they fit into `width` cells."""
    if not counts or width < 1:
        return ""
    step = -(-len(counts) // width)
    merged = [sum(counts[at : at + step]) for at in range(0, len(counts), step)]
    top = max(merged) or 1
    return "".join(_BARS[-(-count * 7 // top)] for count in merged)

"""What stands over the Data page when asked for: its first rows, and the mapping of columns."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from engine.visible import visible
from tui.screens.help import TextPane
from tui.widgets.pane import Pane
from tui.widgets.switches import Switch, Switches

_RAW_CHARACTERS: Final = 600
_MESSAGE_CHARACTERS: Final = 300
_NONE: Final = "none"
_PROPERTIES: Final = ("role", "content", "thinking")


def first_rows(rows: Sequence[Mapping[str, Any]]) -> TextPane:
    """Each row as it is written, then as it is understood or why not."""
    parts = []
    for row in rows:
        file = visible(row["file"], one_line=True)
        parts.append(Content.styled(f"line {row['line']:,} of {file}", "bold $lit"))
        parts.append(Content.styled(_cut(row["raw"], _RAW_CHARACTERS), "$muted"))
        for role, text in row["messages"]:
            said = _cut(text, _MESSAGE_CHARACTERS)
            parts.append(Content.assemble((f"{role:<10}", "$accent"), said))
        if row["problem"]:
            problem = visible(row["problem"], one_line=True)
            parts.append(Content.assemble(("✗ ", "$error"), problem))
        parts.append(Content(""))
    return TextPane("first rows, as written and as understood", Content("\n").join(parts))


def _cut(text: str, limit: int) -> str:
    shown = visible(text, one_line=True)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


class MappingPanel(Pane):
    """Which column holds the messages, and which of their keys is what. Posts Applied."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "apply", "use this", show=False)]

    class Applied(Message):
        """`field_messages` and `message_property_mappings` of the dataset."""

        def __init__(self, field_messages: str, mappings: dict[str, str]) -> None:
            super().__init__()
            self.field_messages = field_messages
            self.mappings = mappings

    def __init__(self, lists: Mapping[str, Sequence[str]], proposed: Mapping[str, str]) -> None:
        super().__init__(title="which column is which", subtitle="enter uses this, esc does not")
        self._lists = lists
        self._taken = {
            "messages": next(iter(lists)),
            "role": "",
            "content": "",
            "thinking": _NONE,
        }
        if proposed:
            self._taken["messages"] = proposed["field_messages"]
        self._propose(proposed)

    def compose(self) -> ComposeResult:
        yield Switches()
        yield Static(
            Content.styled(
                "\nmessages is the column with the list of messages; the others are keys of "
                "each message. The usual names are proposed.",
                "$muted",
            ),
            markup=False,
        )

    def on_mount(self) -> None:
        self._show()

    def _propose(self, proposed: Mapping[str, str]) -> None:
        keys = self._lists[self._taken["messages"]]
        for name in ("role", "content"):
            self._taken[name] = proposed.get(name, keys[0])
        self._taken["thinking"] = proposed.get("thinking", _NONE)

    def _show(self) -> None:
        keys = tuple(self._lists[self._taken["messages"]])
        answers = {
            "messages": tuple(self._lists),
            "role": keys,
            "content": keys,
            "thinking": (_NONE, *keys),
        }
        self.query_one(Switches).show_switches(
            [
                Switch(name, values, values.index(self._taken[name]))
                for name, values in answers.items()
            ]
        )

    def on_switches_turned(self, message: Switches.Turned) -> None:
        message.stop()
        self._taken[message.name] = message.answer
        if message.name == "messages":
            self._propose({})
        self._show()

    def action_apply(self) -> None:
        mappings = {name: self._taken[name] for name in _PROPERTIES if self._taken[name] != _NONE}
        self.post_message(self.Applied(self._taken["messages"], mappings))

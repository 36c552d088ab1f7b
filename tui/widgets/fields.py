"""Values as in a spreadsheet: arrows step through the usual ones, a digit starts typing.

They are no inputs, because letters are actions of the page; whoever owns the list checks a value
and shows the new state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Key
from textual.message import Message

from engine.visible import visible
from engine.wizard.settings import Field
from tui.widgets.choices import Lines

_KEY_CELLS: Final = 28
_VALUE_CELLS: Final = 19
_TYPED: Final = frozenset("0123456789.-e")


class Fields(Lines):
    """Posts Moved and Changed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,l,space", "turn(1)", "the next usual value", show=False),
        Binding("left,h", "turn(-1)", "the usual value before", show=False),
        Binding("backspace", "erase", "take back a typed digit", show=False),
    ]

    class Moved(Message):
        """The cursor stands on another value."""

    @dataclass
    class Changed(Message):
        """The person typed or chose `text` for `key`."""

        key: str
        text: str

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 (Textual's name)
        super().__init__(id=id)
        self._fields: Sequence[Field] = ()
        self._typed: str | None = None

    @property
    def field(self) -> Field | None:
        """The one under the cursor."""
        return self._fields[self.cursor] if self._fields else None

    def show_fields(self, fields: Sequence[Field]) -> None:
        """Other values; the cursor stays on its key, else on its line."""
        keys = [field.key for field in fields]
        before = self.field.key if self.field else ""
        self._fields = fields
        self.show_count(len(fields), keys.index(before) if before in keys else self.cursor)

    def line(self, place: int, cursor: Content) -> Content:
        field, here = self._fields[place], place == self.cursor
        star = "*" if field.chosen else ""
        if here and self._typed is not None:
            value = f"{self._typed}▏"
        elif here and self.has_focus:
            value = f"‹{field.value}›{star}"
        else:
            value = f"{field.value}{star}"
        return Content.assemble(
            cursor,
            (f"{field.key:<{_KEY_CELLS}}", "$lit" if here else ""),
            (
                f"{visible(value, one_line=True):<{_VALUE_CELLS}}",
                "bold $accent" if here else "bold",
            ),
            (visible(field.reason, one_line=True), "$error" if field.wrong else "$muted"),
        )

    def watch_cursor(self) -> None:
        self._typed = None
        super().watch_cursor()
        self.post_message(self.Moved())

    def on_blur(self) -> None:
        self._typed = None
        self.refresh()

    def on_key(self, event: Key) -> None:
        field = self.field
        letter = event.character or ""
        if field is None or letter not in _TYPED or not letter:
            return
        if self._typed is None and not letter.isdigit():
            return  # a letter is an action until a number has begun
        event.stop()
        event.prevent_default()
        self._type(field, (self._typed or "") + letter)

    def action_erase(self) -> None:
        field = self.field
        if field is None:
            return
        text = (field.value if self._typed is None else self._typed)[:-1]
        self._type(field, text)

    def _type(self, field: Field, text: str) -> None:
        self._typed = text
        self.refresh()
        if text:
            self.post_message(self.Changed(field.key, text))

    def action_turn(self, step: int) -> None:
        field = self.field
        if field is None or not field.usual:
            return
        self._typed = None
        self.post_message(self.Changed(field.key, _next_value(field, step)))


def _next_value(field: Field, step: int) -> str:
    """The usual value beside the present one, which need not be usual itself; ends stay."""
    usual = list(field.usual)
    if field.value in usual:
        return usual[max(0, min(len(usual) - 1, usual.index(field.value) + step))]
    try:
        beyond = [value for value in usual if (float(value) - float(field.value)) * step > 0]
    except ValueError:
        return usual[0]
    return (beyond or usual[-1:])[0] if step > 0 else (beyond or usual[:1])[-1]

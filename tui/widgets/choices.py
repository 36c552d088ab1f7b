"""Lists with a cursor `❯`: choices, switches with a few answers each, values as in a spreadsheet.

Textual's own OptionList marks the cursor by colour alone; here it is a glyph in a column of its
own. A list is one stop of the tab key and nothing in it is an input: letters stay actions of the
page. Whoever owns it checks a value and shows the new state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click, Key
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.visual import Visual
from textual.widget import Widget

from engine.visible import visible

if TYPE_CHECKING:
    from engine.wizard.plan import Field
    from engine.wizard.preview import Switch


class Lines(Widget, can_focus=True):
    """Lines of text, one of them under the cursor.

    Put it into a Pane: the pane scrolls where there are more lines than rows.
    """

    DEFAULT_CSS = "Lines { height: auto; width: 100%; text-wrap: nowrap; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "move(1)", "next", show=False),
        Binding("up,k", "move(-1)", "previous", show=False),
        Binding("home", "move(-1000000)", "first", show=False),
        Binding("end", "move(1000000)", "last", show=False),
    ]

    cursor: reactive[int] = reactive(0)
    """Index of the line under the cursor."""

    count = 0
    """How many lines there are."""

    def line(self, place: int, cursor: Content) -> Content:
        """One line behind its cursor, which is blank for all but one."""
        return cursor

    def click(self) -> None:
        """What a click on a line does once the cursor is there."""

    def show_count(self, count: int, cursor: int) -> None:
        """Other lines, with the cursor at `cursor` or, where that is beyond, at the last."""
        self.count = count
        self.cursor = max(0, min(cursor, count - 1))
        self.refresh(layout=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        # Not by rendering: that asks for a size, which asks for this height.
        return self.count

    def render_line(self, y: int) -> Strip:
        """Only lines that are seen are made: there may be thousands."""
        width = self.size.width
        mark = Content.styled("❯ ", "bold $primary") if y == self.cursor else Content("  ")
        line = self.line(y, mark).truncate(width, ellipsis=True) if y < self.count else Content()
        return Visual.to_strips(self, line, width, 1, self.visual_style)[0]

    def watch_cursor(self) -> None:
        if self.is_attached:
            line = Region(self.virtual_region.x, self.virtual_region.y + self.cursor, 1, 1)
            if isinstance(self.parent, Widget):
                self.parent.scroll_to_region(line, animate=False)

    def action_move(self, lines: int) -> None:
        self.cursor = max(0, min(self.count - 1, self.cursor + lines))

    def on_click(self, event: Click) -> None:
        if event.y < self.count:
            self.cursor = event.y
            self.click()


Item = TypeVar("Item")


class Made(Sequence[Content], Generic[Item]):
    """Lines that are made when they are seen."""

    def __init__(self, items: Sequence[Item], make: Callable[[Item], Content]) -> None:
        self._items, self._make = items, make

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: Any) -> Any:
        return self._make(self._items[place])


class Choices(Lines):
    """Posts Moved and Chosen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("g", "move(-1000000)", "first", show=False),
        Binding("G", "move(1000000)", "last", show=False),
        Binding("enter", "choose", "take it", show=False),
    ]

    @dataclass
    class Moved(Message):
        """The cursor stands on another line."""

        choices: "Choices"

        @property
        def control(self) -> "Choices":
            return self.choices

    class Chosen(Moved):
        """Enter was pressed, or the line was clicked."""

    def __init__(
        self,
        lines: Sequence[Content] = (),
        *,
        id: str | None = None,  # noqa: A002 (Textual's name)
    ) -> None:
        super().__init__(id=id)
        self._lines = lines
        self.count = len(lines)

    def show_lines(self, lines: Sequence[Content]) -> None:
        """Other lines; the cursor stays where it is, or goes to the last line."""
        self._lines = lines
        self.show_count(len(lines), self.cursor)

    def line(self, place: int, cursor: Content) -> Content:
        row = Content.assemble(cursor, self._lines[place])
        return row.stylize("$lit") if place == self.cursor else row

    def watch_cursor(self) -> None:
        super().watch_cursor()
        self.post_message(self.Moved(self))

    def click(self) -> None:
        self.action_choose()

    def action_choose(self) -> None:
        if self._lines:
            self.post_message(self.Chosen(self))


_NAME_CELLS: Final = 13


class Switches(Lines):
    """Posts Turned when another answer is taken; whoever owns it shows the new state."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space,right,l", "turn(1)", "turn the switch", show=False),
        Binding("left,h", "turn(-1)", "turn it back", show=False),
    ]

    @dataclass
    class Turned(Message):
        """The person took `answer` for the question `name`."""

        name: str
        answer: str

    switches: "Sequence[Switch]" = ()

    def show_switches(self, switches: "Sequence[Switch]") -> None:
        self.switches = switches
        self.show_count(len(switches), self.cursor)

    def line(self, place: int, cursor: Content) -> Content:
        switch, here = self.switches[place], place == self.cursor and self.has_focus
        name = (f"{switch.name:<{_NAME_CELLS}}", "$lit" if here else "")
        return Content.assemble(cursor if self.has_focus else "  ", name, *self._answers(switch))

    def _answers(self, switch: "Switch") -> list[tuple[str, str]]:
        if switch.locked:
            return [(f"- {switch.locked}", "$muted")]
        parts = []
        for number, answer in enumerate(switch.answers):
            chosen = number == switch.chosen
            parts.append(("(•) " if chosen else "( ) ", "$accent" if chosen else "$faint"))
            gap = "  " if number + 1 < len(switch.answers) else ""
            parts.append((f"{answer}{gap}", "$foreground" if chosen else "$muted"))
        return parts

    def action_turn(self, step: int) -> None:
        if not self.switches:
            return
        switch = self.switches[self.cursor]
        if not switch.locked and len(switch.answers) > 1:
            answer = switch.answers[(switch.chosen + step) % len(switch.answers)]
            self.post_message(self.Turned(switch.name, answer))

    def click(self) -> None:
        self.action_turn(1)


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

    _fields: "Sequence[Field]" = ()
    _typed: str | None = None

    @property
    def field(self) -> "Field | None":
        return self._fields[self.cursor] if self._fields else None

    def show_fields(self, fields: "Sequence[Field]") -> None:
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

    def _type(self, field: "Field", text: str) -> None:
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


def _next_value(field: "Field", step: int) -> str:
    """The usual value beside the present one, which need not be usual itself; ends stay."""
    usual = list(field.usual)
    if field.value in usual:
        return usual[max(0, min(len(usual) - 1, usual.index(field.value) + step))]
    try:
        beyond = [value for value in usual if (float(value) - float(field.value)) * step > 0]
    except ValueError:
        return usual[0]
    return (beyond or usual[-1:])[0] if step > 0 else (beyond or usual[:1])[-1]

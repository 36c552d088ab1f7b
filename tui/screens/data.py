"""The Data page: one dataset under the cursor is read by the worker; Enter takes it.

It shows what the worker answers. Nothing is read before it is highlighted or typed, and the hub is
asked only after the person has agreed.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, Static

from engine.config import DatasetConfig
from engine.data.requests import FirstRow, Progress, Shape
from engine.data.shape import mapped
from engine.data.sources import SAMPLE_PREFIX
from engine.data.statistics import Checkup
from engine.errors import UserError
from engine.report.data import Remark, list_remarks, mapping_text, row_lines, shape_lines
from engine.units import stored
from engine.visible import visible
from engine.wizard.data import TYPED, USE, DataStep, check_command, find_newest, list_sources
from engine.wizard.preview import Switch
from engine.wizard.question import Choice
from tui.line import marked
from tui.page import HelpText, Key, Page, PathField
from tui.widgets.choices import Choices, Switches
from tui.widgets.pane import Pane, TextPane, columns, sentences

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
        self._shape = shape
        first = next(iter(shape.lists), "")
        self._taken = {"field_messages": shape.proposed.get("field_messages", first)}
        self._propose(shape.proposed)

    def compose(self) -> ComposeResult:
        yield Switches()
        about = _ABOUT_LISTS if self._shape.lists else _ABOUT_TABLE
        yield Static(Content.styled(f"\n{about}", "$muted"), markup=False)

    def on_mount(self) -> None:
        self._show()

    def _answers(self) -> dict[str, tuple[str, ...]]:
        """What each name can be, in the order of the panel."""
        image = {"field_image": (_NONE, *self._shape.images)} if self._shape.images else {}
        if not self._shape.lists:
            texts = tuple(self._shape.texts)
            return {"field_question": (_NONE, *texts), "field_answer": texts, **image}
        keys = tuple(self._shape.lists[self._taken["field_messages"]])
        own = {"field_messages": tuple(self._shape.lists), "role": keys, "content": keys}
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
            kept = {"field_image": self._taken["field_image"]} if self._shape.images else {}
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
    if shape.reads_more:
        text = visible(f"m maps them: {mapping_text(shape)}", one_line=True)
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


# Whoever holds the down key reads no file on the way.
_SETTLE_SECONDS: Final = 0.15


class DataPage(Page):
    """Where from, what was found, what to know."""

    STEP = "Data"
    KEYS = (
        Key("enter", "use it", 1),
        Key("e", "first rows", 1),
        Key("m", "map columns"),
        Key("h", "held out", 1),
        Key("r", "read again"),
        Key("esc", "back"),
    )
    CSS = """
    #from { max-height: 10; }
    #from PathField { display: none; }
    #from.-typing PathField { display: block; }
    #found { height: auto; min-height: 6; }
    #know { height: 1fr; min-height: 3; }
    DataPage.-tall #from { max-height: 14; }
    DataPage.-tall #found { min-height: 8; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "first_rows", "show the first rows", show=False),
        Binding("m", "map", "map columns", show=False),
        Binding("h", "hold_out", "hold more rows out", show=False),
        Binding("r", "read_again", "read again", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._sources = list_sources([])
        self._model: str | None = None
        self._goes_on = False
        self._remarks: list[Remark] = []

    @property
    def _step(self) -> DataStep:
        return self.app.wizard.data

    def compose_body(self) -> ComposeResult:
        with Pane(id="from", title="where from"):
            yield Choices(id="sources")
            yield PathField("type or paste a path; tab completes it")
        with Pane(id="found", title="what was found"):
            yield Static(id="rows", markup=False)
        with Pane(id="know", title="what to know"):
            yield Choices(id="remarks")

    def on_mount(self) -> None:
        self._show_sources()
        self.query_one("#sources").focus()
        self.run_worker(self._look_around(), group="newest")

    async def _look_around(self) -> None:
        newest = await asyncio.to_thread(find_newest, Path.cwd())
        here = self._source.key
        self._sources = list_sources(newest)
        self._show_sources()
        keys = [source.key for source in self._sources]
        self.query_one("#sources", Choices).cursor = keys.index(here) if here in keys else 0

    def _show_sources(self) -> None:
        self.query_one("#sources", Choices).show_lines(
            [
                Content.assemble(
                    f"{visible(source.label, one_line=True):<24} ",
                    (visible(source.note, one_line=True), "$muted"),
                )
                for source in self._sources
            ]
        )

    def refresh_from_draft(self) -> None:
        draft = self.app.draft
        if draft.model is None:
            self.say("·", "no model", "lengths need its tokenizer: esc goes back to it")
            return
        if draft.model == self._model:
            return
        self._model = draft.model
        dataset = self._step.dataset or draft.dataset
        if dataset is None:
            self._highlighted()
        elif dataset.path.startswith(SAMPLE_PREFIX):
            self._consider(dataset)
        else:
            self.part(PathField).value = dataset.path
            keys = [source.key for source in self._sources]
            self.query_one("#sources", Choices).cursor = keys.index(TYPED)
            self._consider(dataset)

    @property
    def _source(self) -> Choice:
        return self._sources[self.query_one("#sources", Choices).cursor]

    def on_choices_moved(self, message: Choices.Moved) -> None:
        if message.choices.id == "sources":
            self._highlighted()

    def _highlighted(self) -> None:
        source = self._source
        typed = bool(source.asks)
        self.query_one("#from").set_class(typed, "-typing")
        if self._model and not typed:
            now = self._step.dataset
            if now is None or now.path != source.key:
                self._consider(DatasetConfig(path=source.key))
        elif typed and not self.part(PathField).value:
            self._forget("a path" if source.key == TYPED else source.asks)

    def _forget(self, wanted: str) -> None:
        self._clear("")
        self._step.back()
        self.say("·", "no data", f"enter, then type {wanted}; enter reads it")
        self.show_command([])

    def _clear(self, waiting: str) -> None:
        self.workers.cancel_group(self, "read")
        self._goes_on = False
        self.query_one("#rows", Static).update(Content(waiting))
        self.query_one("#found", Pane).show_subtitle("")
        self._show_remarks([])

    def _consider(self, dataset: DatasetConfig) -> None:
        """Read that dataset, once the person agrees where it is on the hub."""
        step = self._step
        try:
            asked = step.consent(dataset)
        except UserError as error:
            self._start(dataset)
            step.problem = error
            self._refuse(error)
            return
        if asked is None:
            self._start(dataset)
            self.run_worker(self._read(), group="read", exclusive=True)
            return
        self.ask_again(asked, partial(self._agree, dataset))

    def _agree(self, dataset: DatasetConfig) -> None:
        self._step.agree(dataset)
        self._consider(dataset)

    def _start(self, dataset: DatasetConfig) -> None:
        name = visible(dataset.path, one_line=True)
        self._clear(f"reading {name}")
        self._step.consider(dataset)
        self.say("·", "reading", name)
        self.show_command(check_command(self.app.draft, dataset))

    async def _read(self) -> None:
        await asyncio.sleep(_SETTLE_SECONDS)
        step = self._step
        while work := step.work():
            assert work.request is not None
            try:
                found = await self.app.data_worker.ask(work.request, self._show_progress)
                step.receive(work, found)
            except UserError as error:
                step.receive(work, error)
                self._refuse(error)
                return
            if isinstance(self.focused, PathField):
                self.query_one("#sources").focus()  # the next key is for the page
        self._redraw()
        if self._goes_on and step.state == "read":
            self._take()

    def _show_progress(self, progress: Progress) -> None:
        assert self._step.dataset is not None
        if progress.phase == "tokenizer":
            model = visible(self._model or "", one_line=True)
            shown = f"starting the tokenizer of {model} (about 2 s, once)"
            rows = "the tokenizer first"
        else:
            shown = f"reading {visible(self._step.dataset.path, one_line=True)}"
            shown += f"  {progress.rows:,} rows"
            if total := progress.total_bytes:
                shown += f", {stored(progress.done_bytes, total)} of {stored(total)}"
            rows = f"{progress.rows:,} rows so far"
        self.query_one("#rows", Static).update(Content(shown))
        after = ", goes on when it is read" if self._goes_on else ""
        self.say("·", "reading", rows + after)

    def _refuse(self, error: UserError) -> None:
        self.say("✗", "cannot be read", error.what)
        self.query_one("#rows", Static).update(sentences(error))

    def _redraw(self) -> None:
        found, shape = self._step.found, self._step.shape
        if found is None or shape is None:
            return
        line = self._step.verdict()
        text = line.text.replace("none held out", "none held out: h changes that")
        self.say(line.mark, line.label, text.replace(": choose one", ": esc, then choose one"))
        width = self.query_one("#rows").size.width
        self.query_one("#rows", Static).update(found_content(found, shape, width))
        tokens = found.tokens
        total = f"{tokens.total:,} tokens as {self._model}" if tokens and tokens.total else ""
        self.query_one("#found", Pane).show_subtitle(visible(total, one_line=True))
        self._show_remarks(list_remarks(found))

    def on_resize(self) -> None:
        self.call_after_refresh(self._redraw)

    def _show_remarks(self, remarks: list[Remark]) -> None:
        self._remarks = remarks
        choices = self.query_one("#remarks", Choices)
        choices.can_focus = bool(remarks)
        choices.show_lines(
            [marked(remark.line.mark, str(replace(remark.line, mark=""))) for remark in remarks]
        )

    def action_accept(self) -> None:
        state = self._step.state
        if state == "read":
            self._take()
        elif state == "reading":
            self._goes_on = True
        elif state == "idle" and self._model:
            self.part(PathField).focus()

    def _take(self) -> None:
        self._step.take(USE, "")
        self.app.next_step()

    def choose(self, choices: Choices) -> None:
        if choices.id == "remarks":
            remark = self._remarks[choices.cursor]
            details = [(word, visible(text)) for word, text in remark.details]
            if remark.line.mark != "✗" and "lines" in dict(details):
                details.append(("see", "Preview lists them: w"))
            self.cover(TextPane("what to know", columns(details, "$muted")), [Key("esc", "close")])
        elif self._source.asks and self._step.state in ("idle", "refused"):
            self.part(PathField).focus()
        else:
            self.action_accept()

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        path = message.value.strip()
        if not path:
            return
        now = self._step.dataset
        if now and now.path == path and self._step.state in ("read", "reading"):
            self.action_accept()
        else:
            self._consider(DatasetConfig(path=path))

    def on_path_field_left(self) -> None:
        self.query_one("#sources").focus()

    def action_read_again(self) -> None:
        if self._step.dataset and self._model:
            self._consider(self._step.dataset)

    def action_first_rows(self) -> None:
        if shape := self._step.shape:
            self.cover(first_rows(shape.rows), [Key("esc", "close")])

    def action_map(self) -> None:
        shape = self._step.shape
        if not shape:
            return
        if shape.lists or shape.texts:
            panel = MappingPanel(shape)
            self.cover(panel, [Key("enter", "use this"), Key("space", "turn"), Key("esc", "close")])
        else:
            names = ", ".join(shape.columns)
            self.say("!", "nothing to map", f"no column holds messages or texts; there are {names}")

    def on_mapping_panel_applied(self, message: MappingPanel.Applied) -> None:
        self.uncover()
        assert self._step.dataset is not None
        self._consider(mapped(self._step.dataset, message.mapping))

    def action_hold_out(self) -> None:
        if self._step.state == "read":
            self._step.hold_out()
            self._redraw()

    def help_for(self, focused: Widget | None) -> HelpText:
        if isinstance(focused, PathField):
            return HelpText(
                "a path or a hub id",
                [
                    (
                        "file",
                        "JSON, CSV, Parquet, Arrow, also .gz and .zst; one conversation a row",
                    ),
                    ("folder", "all such files in it, one after another; or images with captions"),
                    ("org/name", "a dataset on huggingface.co; asked before anything is sent"),
                    ("sample:x", "a dataset that comes with Windtunnel"),
                ],
            )
        return HelpText(
            "the conversations to learn from",
            [
                (
                    "usable",
                    "rows that can be rendered; the others are left out, each with a reason",
                ),
                ("held out", "rows that are only evaluated, so that learning by heart is seen"),
                ("length", "tokens a row; the longest decides how much memory a step needs"),
                (
                    "images",
                    "found beside the rows, or inside them; their tokens count into the length "
                    "and are read, never learned",
                ),
                ("map", "m says which column is the question, the answer, the image, ..."),
            ],
        )

"""The Preview page: asks the worker for rows and counts, and keeps both while switches turn.

Labels are derived here from the stored kinds by the engine's own rule, so that a switch of labels
asks nobody; only what changes the tokens themselves is asked for again.
"""

from collections import Counter
from pathlib import Path
from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from engine.chat.render import LabelRule
from engine.config import RunConfig
from engine.data.requests import CheckRows, PreviewRow, PreviewRows, Progress
from engine.data.statistics import Checkup
from engine.errors import UserError
from engine.visible import visible
from engine.wizard.commands import preview_command
from engine.wizard.counting import rows_config
from engine.wizard.judging import OddRow, Verdict, judge, list_odd_rows
from engine.wizard.switches import (
    SWITCH_HELP,
    change_of,
    list_switches,
)
from tui.page import HelpText, Key, Page
from tui.screens.preview.counts import LearnedCounts, say_images
from tui.screens.preview.inspecting import MARKS, describe_token
from tui.token_row import read_row
from tui.widgets.choices import Choices
from tui.widgets.pane import Pane
from tui.widgets.questions import Prompt
from tui.widgets.switches import Switches
from tui.widgets.tokens import TokenView

_KEPT_ROWS: Final = 500
_LEGEND: Final = "underlined = learned, dim = only read"


class PreviewPage(Page):
    """What the model will read, what it will learn, and the switches that decide it."""

    STEP = "Preview"
    KEYS = (
        Key("enter", "looks right"),
        Key("n/p", "next row", 2),
        Key("space", "switch", 2),
        Key("w", "odd rows", 1),
        Key("/", "find", 1),
        Key("m", "labels"),
        Key("g", "row"),
        Key("esc", "back"),
    )
    CSS = """
    #split { height: 1fr; layout: vertical; }
    #reading { height: 1fr; width: 1fr; }
    #row { height: 1fr; overflow: hidden; }
    #trouble { display: none; height: auto; padding: 1 0; }
    #row.-trouble TokenView { display: none; }
    #row.-trouble #trouble { display: block; }
    #inspector { height: 1; padding: 0 2; text-wrap: nowrap; text-overflow: ellipsis; }
    #side { height: 5; layout: horizontal; }
    #learn { width: 37; height: 100%; } #counts { width: 1fr; height: 100%; }
    #learn Switches { height: auto; }
    #switch-help { display: none; color: $muted; margin-top: 1; }
    LearnedCounts { text-wrap: nowrap; height: 100%; }
    PreviewPage.-wide #split { layout: horizontal; }
    PreviewPage.-wide #side { width: 46; height: 100%; layout: vertical; }
    PreviewPage.-wide #learn { width: 100%; height: auto; }
    PreviewPage.-wide #counts { width: 100%; height: 1fr; }
    PreviewPage.-wide #switch-help { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "step(1)", "next row", show=False),
        Binding("p", "step(-1)", "row before", show=False),
        Binding("N", "odd(1)", "next odd row", show=False),
        Binding("P", "odd(-1)", "odd row before", show=False),
        Binding("g", "ask_row", "go to a row", show=False),
        Binding("slash", "ask_text", "find text or id:34", show=False),
        Binding("w", "list_odd", "list the odd rows", show=False),
        Binding("m", "labels", "labels under the tokens", show=False),
        Binding("b", "edges", "edges of the tokens", show=False),
        Binding("space", "switches", "to the switches", show=False),
        Binding("r", "read_again", "read again", show=False),
        Binding("y", "copy_row", "copy the row", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._asked: RunConfig | None = None
        self._config: RunConfig | None = None
        self._number = 1
        self._entries: dict[int, PreviewRow] = {}
        self._efforts: tuple[str, ...] = ()
        self._found: Checkup | None = None
        self._counted_rows = 0
        self._verdict = Verdict("·", "reading", "")
        self._odd_rows: list[OddRow] = []

    def compose_body(self) -> ComposeResult:
        with Container(id="split"):
            with Vertical(id="reading"):
                with Pane(id="row", title="row"):
                    yield TokenView()
                    yield Static(id="trouble", markup=False)
                inspector = Static(id="inspector", markup=False)
                yield inspector
                yield Prompt(inspector)
            with Container(id="side"):
                with Pane(id="learn", title="learn from"):
                    yield Switches()
                    yield Static(id="switch-help", markup=False)
                with Pane(id="counts", title="how much is learned"):
                    yield LearnedCounts()

    def on_mount(self) -> None:
        self.part(TokenView).focus()

    def refresh_from_draft(self) -> None:
        draft = self.app.draft
        if draft.model is None or draft.dataset is None:
            self.say("·", "no data", "choose a model and a dataset first: esc goes back")
            return
        try:
            self._config = draft.config()
        except UserError as error:
            self.show_problem(error)
            return
        asked = rows_config(self._config, labels=False)
        if asked != self._asked:
            same_rows = self._asked is not None and self._asked.datasets == asked.datasets
            self._asked = asked
            self._read(self._number if same_rows else 1)
        self._redraw()

    def action_read_again(self) -> None:
        if self._asked:
            self._read(self._number)
            self._redraw()

    def _read(self, number: int) -> None:
        self._entries, self._found, self._counted_rows = {}, None, 0
        self._number = number
        self.run_worker(self._fetch(number), group="row", exclusive=True)
        self.run_worker(self._count(), group="count", exclusive=True)

    async def _fetch(self, number: int) -> None:
        assert self._asked is not None
        request = PreviewRows(self._asked, Path.cwd(), number)
        try:
            answer = await self.app.data_worker.ask(request, self._show_progress)
        except UserError as error:
            self._show_trouble(f"{error.what}\n{error.why}\n{error.fix}")
            self.say("✗", "stop", error.what)
            return
        if len(self._entries) > _KEPT_ROWS:
            self._entries.clear()
        self._efforts = answer.efforts
        self._entries.update({row.number: row for row in answer.rows})
        if number in self._entries:
            self._show_row(number)
        elif number != self._number:
            self._go(self._number)
        elif number > 1:
            self._go(1)

    async def _count(self) -> None:
        assert self._asked is not None
        request = CheckRows(self._asked, Path.cwd())
        try:
            found = await self.app.data_worker.ask(request, self._show_counting)
        except UserError as error:
            self.say("✗", "stop", error.what)
            return
        self._found = found
        self._redraw()

    def _show_progress(self, progress: Progress) -> None:
        if progress.phase == "tokenizer" and not self._entries:
            model = visible(self.app.draft.model or "", one_line=True)
            self._show_trouble(f"starting the tokenizer of {model} (about 2 s, once)")

    def _show_counting(self, progress: Progress) -> None:
        self._counted_rows = progress.rows
        self._redraw_verdict()

    def _show_trouble(self, text: str) -> None:
        self.query_one("#trouble", Static).update(Content(visible(text)))
        self.query_one("#row").add_class("-trouble")

    @property
    def _rule(self) -> LabelRule:
        assert self._config is not None
        return LabelRule(self._config.train_on_thinking, self._config.train_on_inputs)

    def _go(self, number: int) -> None:
        if number in self._entries:
            self.workers.cancel_group(self, "row")
            self._show_row(number)
        else:
            self.run_worker(self._fetch(number), group="row", exclusive=True)

    def _show_row(self, number: int) -> None:
        entry = self._entries[number]
        moved, self._number = number != self._number, number
        view = self.part(TokenView)
        if entry.problem is None:
            row = read_row(entry)
            cursor = 0 if moved or not view.row else min(view.cursor, len(row) - 1)
            view.show_row(row, entry.learned(self._rule), cursor)
            self.query_one("#row").remove_class("-trouble")
            if self.focused is None:  # a hidden view has lost it
                view.focus()
        else:
            view.show_row(None, ())
            error = entry.problem
            place = "" if error.message is None else f" (message {error.message})"
            self._show_trouble(
                f"✗ row {number} cannot be used{place}\n\n"
                f"{error.what}\n{error.why}\n{error.fix}\n\nn goes to the next row"
            )
        self._redraw()

    def _redraw(self) -> None:
        """Everything that follows from the rows at hand and the switches."""
        if self._config is None:
            return
        entry = self._entries.get(self._number)
        view = self.part(TokenView)
        if entry and entry.problem is None and view.row:
            view.relabel(entry.learned(self._rule))
        switches = list_switches(self._config, self._found, self._efforts)
        self.part(Switches).show_switches(switches)
        self._show_switch_help()
        counts = self._found.tokens.kind_counts if self._found and self._found.tokens else None
        total = f"all {self._found.rows:,}" if self._found else "all rows"
        here = Counter(entry.kinds) if entry else {}
        self.part(LearnedCounts).show_counts(here, counts, self._rule, total)
        self.query_one("#counts", Pane).show_subtitle(say_images(counts or here))
        self._redraw_verdict()
        self._redraw_titles()
        self._inspect()
        self._show_equivalent()

    def _redraw_verdict(self) -> None:
        if self._found is None:
            rows = f" {self._counted_rows:,} rows so far" if self._counted_rows else ""
            self._verdict = Verdict("·", "counting", f"what is learned in all rows{rows}")
        else:
            assert self._config is not None
            limit, excess = self._config.sequence_len, self._config.excess_length_strategy
            self._verdict = judge(self._found, self._rule, limit, excess)
            self._odd_rows = list_odd_rows(self._found, self._rule, limit)
        self.say(self._verdict.mark, self._verdict.word, self._verdict.text)

    def _redraw_titles(self) -> None:
        pane, view = self.query_one("#row", Pane), self.part(TokenView)
        total = f" of {self._found.rows:,}" if self._found else ""
        pane.show_title(f"row {self._number:,}{total} · {_LEGEND}")
        parts = [visible(self.app.draft.model or "", one_line=True)]
        if view.row:
            parts.append(f"{len(view.row):,} tokens")
            if view.lines_below:
                parts.append(f"↓ {view.lines_below:,} more lines")
        pane.show_subtitle(" · ".join(parts))

    def on_token_view_moved(self) -> None:
        self._inspect()
        self._redraw_titles()

    def _inspect(self) -> None:
        view = self.part(TokenView)
        line = describe_token(view, self._entries.get(self._number)) if view.row else Content("")
        self.query_one("#inspector", Static).update(line)

    def _warn(self, text: str) -> None:
        """In place of what stands under the cursor, until that moves."""
        line = Content.styled(visible(text, one_line=True), "$warning")
        self.query_one("#inspector", Static).update(line)

    def _show_switch_help(self) -> None:
        switches = self.part(Switches)
        if switches.switches:
            name = switches.switches[switches.cursor].name
            self.query_one("#switch-help", Static).update(Content(SWITCH_HELP[name]))

    def _show_equivalent(self) -> None:
        assert self._config is not None
        self.show_command(preview_command(self.app.draft, self._config, self._number))

    def action_accept(self) -> None:
        if self._config is not None and not self._verdict.stops:
            self.app.next_step()

    def action_step(self, rows: int) -> None:
        last = self._found.rows if self._found else None
        number = self._number + rows
        if number >= 1 and (last is None or number <= last):
            self._go(number)

    def action_odd(self, direction: int) -> None:
        numbers = [row.number for row in self._odd_rows][::direction]
        beyond = [n for n in numbers if (n - self._number) * direction > 0]
        if beyond:
            self._go(beyond[0])

    def action_list_odd(self) -> None:
        lines = [
            Content.assemble((f"row {row.number:<8,}", "$accent"), visible(row.why, one_line=True))
            for row in self._odd_rows
        ]
        if lines:
            pane = Pane(Choices(lines), title="rows to look at", classes="odd-rows")
            self.cover(pane, [Key("enter", "show it"), Key("esc", "close")])

    def on_choices_chosen(self, message: Choices.Chosen) -> None:
        message.prevent_default()  # Page's own handler would go on to the next step
        message.stop()
        self.uncover()
        self._go(self._odd_rows[message.choices.cursor].number)

    def action_ask_row(self) -> None:
        last = f" of {self._found.rows:,}" if self._found else ""
        self.part(Prompt).ask("row", f"row number{last}")

    def action_ask_text(self) -> None:
        self.part(Prompt).ask("text", "text in this row, or id:34")

    def on_prompt_answered(self, message: Prompt.Answered) -> None:
        if message.name == "row":
            self._go_to_typed(message.text)
        else:
            self._find(message.text)

    def _go_to_typed(self, text: str) -> None:
        digits = text.replace(",", "")
        last = self._found.rows if self._found else None
        if not digits.isdecimal() or not int(digits) or (last and int(digits) > last):
            known = f"; there are {last:,} rows" if last else ""
            self._warn(f"{text} is no row number{known}")
        else:
            self._go(int(digits))

    def _find(self, text: str) -> None:
        view = self.part(TokenView)
        hit = view.row.find(text, view.cursor) if view.row else None
        if hit is None:
            self._warn(f"{text} is not in this row")
        else:
            view.cursor = hit
            view.focus()

    def action_labels(self) -> None:
        self.part(TokenView).action_labels()

    def action_edges(self) -> None:
        self.part(TokenView).action_edges()

    def action_switches(self) -> None:
        self.set_focus(self.part(Switches))  # at once: the next key is for them

    def action_copy_row(self) -> None:
        row = self.part(TokenView).row
        if row:
            columns = zip(row.kinds, row.ids, row.pieces, strict=True)
            text = "\n".join(f"{kind}\t{token}\t{piece}" for kind, token, piece in columns)
            self.app.copy(text, f"row {self._number:,}")

    def on_switches_turned(self, message: Switches.Turned) -> None:
        key, value = change_of(message.name, message.answer)
        self.app.draft.reset(key)
        if getattr(self.app.draft.config(), key) != value:
            self.app.draft.change(key, value)
        self.refresh_from_draft()

    def help_for(self, focused: Widget | None) -> HelpText:
        if isinstance(focused, Switches):
            return HelpText("learn from", [(name, text) for name, text in SWITCH_HELP.items()])
        return HelpText("a row as training reads it", MARKS)

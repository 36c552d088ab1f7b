"""The Preview page prints the wizard's fourth step: rows as training reads them, and switches.

A switch of labels asks nobody; only what changes the tokens themselves is asked for again.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget
from textual.widgets import Static

from engine.chat.render import WITHHELD, LabelRule
from engine.data.requests import PreviewRow, Progress
from engine.errors import UserError
from engine.report.data import learned_text
from engine.visible import visible
from engine.wizard.preview import (
    SWITCH_HELP,
    GroupCount,
    PreviewStep,
    Verdict,
    count_groups,
    preview_command,
)
from tui.page import HelpText, Key, Page
from tui.widgets.choices import Choices, Switches
from tui.widgets.pane import Drawn, Pane, Prompt
from tui.widgets.tokens import TokenRow, TokenView, read_row

Counts = Mapping[int, int]
"""Tokens by stored kind."""
Groups = Mapping[str, GroupCount] | None
_NAME_CELLS: Final = 14
_STYLES: Final = {"thinking": "$think", "answers": "$answer", "tool calls": "$call"}


def learned_table(
    here: Counts, everywhere: Counts | None, rule: LabelRule, heading: str, size: Size
) -> Content:
    """How much is learned, in two columns of counts; where it is tall each group has a line.

    `everywhere` is None while the rows are still being counted.
    """
    rest = None if everywhere is None else count_groups(everywhere, rule)
    columns = count_groups(here, rule), rest
    tall = size.height > 8
    lines = [Content.styled(f"{'':<{_NAME_CELLS}}{'this row':>11}{heading:>14}", "$muted")]
    for learned, mark, name in ((True, "┃", "learned"), (False, "┊", "only read")):
        style = "bold $lit" if learned else "$read"
        lines.append(_line(f"{mark} {name}", columns, list(columns[0]), learned, style))
        for group in columns[0] if tall else ():
            if any(_tokens(each, [group], learned) for each in columns):
                style = _STYLES.get(group, "$lit") if learned else "$muted"
                lines.append(_line(f"{mark}  {group}", columns, [group], learned, style))
    if tall and rest and (total := _total(rest)):
        tokens = _tokens(rest, list(rest), True)
        full = round(size.width * tokens / total)
        bar = ("━" * full, "$primary"), ("┈" * (size.width - full), "$faint")
        lines += [Content(""), Content.assemble(*bar), Content(learned_text(tokens, total))]
    return Content("\n").join(lines)


def say_images(counts: Counts) -> str:
    """How many of the tokens are of images; empty where none is."""
    tokens = count_groups(counts, LabelRule())["images"].total
    return f"{tokens:,} are of images" if tokens else ""


def _line(
    name: str, columns: tuple[Groups, Groups], groups: list[str], learned: bool, style: str
) -> Content:
    here, rest = columns
    text = f"{name:<{_NAME_CELLS}}{_cell(here, groups, learned, 6)}"
    return Content.styled(text + _cell(rest, groups, learned, 9), style)


def _cell(found: Groups, groups: list[str], learned: bool, width: int) -> str:
    if found is None:
        return f"{'…':>{width}}"
    tokens, total = _tokens(found, groups, learned), _total(found)
    shown = f"{tokens:,}" if len(f"{tokens:,}") <= width else f"{tokens / 1e6:,.0f}M"
    share = f"{tokens / total:.0%}" if total else ""
    return f"{shown:>{width}}{share:>5}"


def _tokens(found: Groups, groups: list[str], learned: bool) -> int:
    counts = [found[group] for group in groups] if found else []
    return sum(count.learned if learned else count.total - count.learned for count in counts)


def _total(found: Mapping[str, GroupCount]) -> int:
    return sum(count.total for count in found.values())


MARKS: Final = (
    ("┃", "tokens that are learned: underlined, counted as learned/all"),
    ("┊", "tokens that are only read: dim, counted"),
    ("bold", "a control token; no text of a dataset can become one"),
    ("[image", "one image: its pixels, and its grid of tokens; it is read, never learned"),
    ("think", "the model's thinking; answer and call are what else it writes"),
)


def describe_token(view: TokenView, entry: PreviewRow | None) -> Content:
    """The line below the row: what stands under the cursor."""
    row: TokenRow | None = view.row
    if row is None or entry is None or len(row) != len(entry.kinds):
        return Content("")
    at = view.cursor
    if tokens := row.image_tokens(at):
        return _describe_image(row, at, tokens)
    piece = row.pieces[at].replace(" ", "·") or "(part of a character)"
    is_learned, kind = view.is_learned(at), row.kinds[at]
    state = f"learned as {kind}" if is_learned else f"only read: {kind}"
    if entry.kinds[at] & WITHHELD:
        state += ", kept out by the row"
    source = row.sources[at]
    return Content.assemble(
        (f"token {at + 1:,}", "$lit"),
        ("  id ", "$muted"),
        str(row.ids[at]),
        "  ",
        (piece, "bold $accent"),
        "  ",
        (state, "bold $lit" if is_learned else "$muted"),
        ("  control token" if row.is_control(at) else "", "$muted"),
        (f"  message {source}" if source >= 0 else "", "$faint"),
    )


def _describe_image(row: TokenRow, at: int, tokens: int) -> Content:
    """The whole of an image: its grid, each row of which ends with one more token."""
    source = row.sources[at]
    return Content.assemble(
        (f"{tokens:,} tokens from {at + 2 - tokens:,}", "$lit"),
        "  ",
        (row.pieces[at].strip("[]"), "bold $accent"),
        ("  only read: image", "$muted"),
        (f"  message {source}" if source >= 0 else "", "$faint"),
    )


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
    #learned { text-wrap: nowrap; height: 100%; }
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
        Binding("g", "ask('row')", "go to a row", show=False),
        Binding("slash", "ask('text')", "find text or id:34", show=False),
        Binding("w", "list_odd", "list the odd rows", show=False),
        Binding("m", "labels", "labels under the tokens", show=False),
        Binding("b", "edges", "edges of the tokens", show=False),
        Binding("space", "switches", "to the switches", show=False),
        Binding("r", "read_again", "read again", show=False),
        Binding("y", "copy_row", "copy the row", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._counted_rows = 0
        self._verdict = Verdict("·", "reading", "")

    @property
    def _step(self) -> PreviewStep:
        return self.app.wizard.preview

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
                    yield Drawn(id="learned")

    def on_mount(self) -> None:
        self.part(TokenView).focus()

    def refresh_from_draft(self) -> None:
        draft = self.app.draft
        if draft.model is None or draft.dataset is None:
            self.say("·", "no data", "choose a model and a dataset first: esc goes back")
            return
        try:
            is_new = self._step.follow()
        except UserError as error:
            self.show_problem(error)
            return
        if is_new:
            self._read()
        self._redraw()

    def action_read_again(self) -> None:
        if self._step.config is not None:
            self._step.forget()
            self._read()
            self._redraw()

    def _read(self) -> None:
        self._counted_rows = 0
        self.run_worker(self._fetch(self._step.number), group="row", exclusive=True)
        self.run_worker(self._count(), group="count", exclusive=True)

    async def _fetch(self, number: int) -> None:
        step, work = self._step, self._step.fetching(number)
        try:
            step.receive(work, await self.app.data_worker.ask(work.request, self._show_progress))
        except UserError as error:
            self._show_trouble(f"{error.what}\n{error.why}\n{error.fix}")
            self.say("✗", "stop", error.what)
            return
        if number in step.rows:
            self._show_row(number)
        elif number != step.number:
            self._go(step.number)
        elif number > 1:
            self._go(1)

    async def _count(self) -> None:
        work = self._step.counting()
        try:
            found = await self.app.data_worker.ask(work.request, self._show_counting)
        except UserError as error:
            self.say("✗", "stop", error.what)
            return
        self._step.receive(work, found)
        self._redraw()

    def _show_progress(self, progress: Progress) -> None:
        if progress.phase == "tokenizer" and not self._step.rows:
            model = visible(self.app.draft.model or "", one_line=True)
            self._show_trouble(f"starting the tokenizer of {model} (about 2 s, once)")

    def _show_counting(self, progress: Progress) -> None:
        self._counted_rows = progress.rows
        self._redraw_verdict()

    def _show_trouble(self, text: str) -> None:
        self.query_one("#trouble", Static).update(Content(visible(text)))
        self.query_one("#row").add_class("-trouble")

    def _go(self, number: int) -> None:
        if number in self._step.rows:
            self.workers.cancel_group(self, "row")
            self._show_row(number)
        else:
            self.run_worker(self._fetch(number), group="row", exclusive=True)

    def _show_row(self, number: int) -> None:
        step = self._step
        entry = step.rows[number]
        moved, step.number = number != step.number, number
        view = self.part(TokenView)
        if entry.problem is None:
            row = read_row(entry)
            cursor = 0 if moved or not view.row else min(view.cursor, len(row) - 1)
            view.show_row(row, entry.learned(step.rule), cursor)
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
        if self._step.config is None:
            return
        entry, found, rule = self._step.row, self._step.found, self._step.rule
        view = self.part(TokenView)
        if entry and entry.problem is None and view.row:
            view.relabel(entry.learned(rule))
        switches = self.part(Switches)
        switches.show_switches(self._step.switches())
        if switches.switches:
            name = switches.switches[switches.cursor].name
            self.query_one("#switch-help", Static).update(Content(SWITCH_HELP[name]))
        counts = found.tokens.kind_counts if found and found.tokens else None
        total = f"all {found.rows:,}" if found else "all rows"
        here = Counter(entry.kinds) if entry else {}
        draw = partial(learned_table, here, counts, rule, total)
        self.query_one("#learned", Drawn).show(draw)
        self.query_one("#counts", Pane).show_subtitle(say_images(counts or here))
        self._redraw_verdict()
        self._redraw_titles()
        self._inspect()
        self.show_command(preview_command(self.app.draft, self._step.config, self._step.number))

    def _redraw_verdict(self) -> None:
        if self._step.found is None:
            rows = f" {self._counted_rows:,} rows so far" if self._counted_rows else ""
            self._verdict = Verdict("·", "counting", f"what is learned in all rows{rows}")
        else:
            self._verdict = self._step.judge()
        verdict = self._verdict
        text = f"{verdict.text}: {verdict.key}" if verdict.key else verdict.text
        self.say(verdict.mark, verdict.word, text)

    def _redraw_titles(self) -> None:
        pane, view = self.query_one("#row", Pane), self.part(TokenView)
        pane.show_title(f"row {self._step.number:,}{self._of_all} · {_LEGEND}")
        parts = [visible(self.app.draft.model or "", one_line=True)]
        if view.row:
            parts.append(f"{len(view.row):,} tokens")
            if view.lines_below:
                parts.append(f"↓ {view.lines_below:,} more lines")
        pane.show_subtitle(" · ".join(parts))

    @property
    def _of_all(self) -> str:
        return f" of {self._step.found.rows:,}" if self._step.found else ""

    def on_token_view_moved(self) -> None:
        self._inspect()
        self._redraw_titles()

    def _inspect(self) -> None:
        view = self.part(TokenView)
        line = describe_token(view, self._step.row) if view.row else Content("")
        self.query_one("#inspector", Static).update(line)

    def _warn(self, text: str) -> None:
        """In place of what stands under the cursor, until that moves."""
        line = Content.styled(visible(text, one_line=True), "$warning")
        self.query_one("#inspector", Static).update(line)

    def action_accept(self) -> None:
        if self._step.config is not None and not self._verdict.stops:
            self.app.next_step()

    def action_step(self, rows: int) -> None:
        number = self._step.number + rows
        if self._step.has_row(number):
            self._go(number)

    def action_odd(self, direction: int) -> None:
        numbers = [row.number for row in self._step.odd_rows()][::direction]
        beyond = [n for n in numbers if (n - self._step.number) * direction > 0]
        if beyond:
            self._go(beyond[0])

    def action_list_odd(self) -> None:
        lines = [
            Content.assemble((f"row {row.number:<8,}", "$accent"), visible(row.why, one_line=True))
            for row in self._step.odd_rows()
        ]
        if lines:
            pane = Pane(Choices(lines), title="rows to look at", classes="odd-rows")
            self.cover(pane, [Key("enter", "show it"), Key("esc", "close")])

    def choose(self, choices: Choices) -> None:
        self.uncover()
        self._go(self._step.odd_rows()[choices.cursor].number)

    def action_ask(self, name: str) -> None:
        hints = {"row": f"row number{self._of_all}", "text": "text in this row, or id:34"}
        self.part(Prompt).ask(name, hints[name])

    def on_prompt_answered(self, message: Prompt.Answered) -> None:
        if message.name == "text":
            self._find(message.text)
            return
        try:
            self._go(self._step.row_number(message.text))
        except UserError as error:
            self._warn(error.what)

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
            self.app.copy(text, f"row {self._step.number:,}")

    def on_switches_turned(self, message: Switches.Turned) -> None:
        self._step.turn(message.name, message.answer)
        self.refresh_from_draft()

    def help_for(self, focused: Widget | None) -> HelpText:
        if isinstance(focused, Switches):
            return HelpText("learn from", [(name, text) for name, text in SWITCH_HELP.items()])
        return HelpText("a row as training reads it", MARKS)

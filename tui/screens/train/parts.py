"""The parts of the Train page that no other page has: the bar, the answers, the log."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from engine.events import Phase
from engine.report.run import event_line
from engine.runs.history import Answer, Logged
from engine.visible import fold, visible
from tui.line import line_content
from tui.screens.train.wording import Headline, clock_time

_LABEL_CELLS: Final = 9
_LEAST_BAR_CELLS: Final = 8


class ProgressRow(Widget):
    """The second row: a bar where a share of the work is known, and one sentence."""

    def __init__(self) -> None:
        super().__init__()
        self._headline = Headline("", "", "")

    def show(self, headline: Headline) -> None:
        """Draw this, if it is not what is drawn."""
        if headline != self._headline:
            self._headline = headline
            self.refresh()

    def render(self) -> RenderResult:
        text = visible(self._headline.text, one_line=True)
        share = self._headline.share
        room = self.size.width - len(text) - 2
        if share is None or room < _LEAST_BAR_CELLS:
            return Content(text)
        full = round(room * min(1.0, max(0.0, share)))
        return Content.assemble(
            ("━" * full, "bold $primary"), ("╌" * (room - full), "$faint"), "  ", text
        )


class Answers(Widget):
    """A prompt and what the model said to it, before and since; the newest answer last."""

    def __init__(self) -> None:
        super().__init__()
        self._prompt = ""
        self._answers: Sequence[Answer] = ()

    def show(self, prompt: str, answers: Sequence[Answer]) -> None:
        """Draw the answers to one prompt."""
        self._prompt, self._answers = prompt, answers
        self.refresh()

    def render(self) -> RenderResult:
        if not self._prompt:
            return Content.styled("no answer was asked for yet", "$muted")
        return answer_text(self._prompt, self._answers, self.size.width, self.size.height)


class Log(Widget):
    """What happened, the newest line first."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: Sequence[Logged] = ()

    def show(self, lines: Sequence[Logged]) -> None:
        """Draw these lines, given with the oldest first."""
        self._lines = lines
        self.refresh()

    def render(self) -> RenderResult:
        rows = list(reversed(self._lines))[: max(1, self.size.height)]
        return Content("\n").join(
            log_line(line).truncate(self.size.width, ellipsis=True) for line in rows
        )


def log_line(line: Logged) -> Content:
    """A line of the log: the time, then what happened."""
    told = event_line(line.event, line.best)
    assert told is not None  # what tells a person nothing is not logged
    if isinstance(line.event, Phase):  # how far it is stands in the second row
        told = replace(told, text="")
    return Content.styled(f"{clock_time(line.time)} ", "$faint") + line_content(told, detail=True)


def answer_text(prompt: str, answers: Sequence[Answer], columns: int, rows: int) -> Content:
    """A prompt and its answers in at most `rows` lines of `columns` cells.

    The answer before training and the newest are shown whole before others get room; where even
    they have none, each is cut to one line.
    """
    told = [("asked", prompt, "$muted")]
    told += [(each.label, each.text, "$muted") for each in answers]
    if answers:
        told[-1] = (answers[-1].label, answers[-1].text, "$lit")
    blocks = [_block(label, text, style, columns) for label, text, style in told]
    while len(blocks) > 3 and sum(map(len, blocks)) > rows:
        del blocks[2]  # the oldest answer between the first and the last
    if sum(map(len, blocks)) > rows:
        blocks = [[_cut(block, columns)] for block in blocks]
    lines = [line for block in blocks for line in block]
    return Content("\n").join(lines[:rows])


def _block(label: str, text: str, style: str, columns: int) -> list[Content]:
    shown = fold(visible(text, one_line=True), max(1, columns - _LABEL_CELLS))
    heads = [label, *[""] * (len(shown) - 1)]
    return [
        Content.assemble((f"{head:<{_LABEL_CELLS}}", "$accent"), (line, style))
        for head, line in zip(heads, shown, strict=True)
    ]


def _cut(block: list[Content], columns: int) -> Content:
    first = block[0]
    if len(block) == 1:
        return first
    return first.truncate(columns - 2).rstrip() + Content(" …")

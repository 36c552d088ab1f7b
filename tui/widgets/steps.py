"""The first two rows of a page: where the person is, and the page's answer in one sentence.

They stand together because the pages that are no step of the wizard (Train, Runs) put their answer
into the first row.
"""

from typing import Final

from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

STEPS: Final = ("Machine", "Model", "Data", "Preview", "Plan", "Review")

_COLOURS: Final = {
    "✓": "$success",
    "▶": "$success",
    "!": "$warning",
    "?": "$warning",
    "✗": "$error",
}


def verdict(mark: str, word: str, text: str) -> Content:
    """The mark and the word in bold, in the colour of the mark, then the sentence."""
    style = f"bold {_COLOURS.get(mark, '$lit')}"
    head = " ".join(each for each in (mark, word) if each)
    return Content.assemble((head, style), ("  " if head and text else "", ""), (text, ""))


class StepBar(Widget):
    """A tick for a step that is done, a filled dot for here, a ring for later.

    On a page that is no step the verdict stands in their place. `title` (the device) is shown at
    the right end where there is room for it.
    """

    def __init__(self, step: str) -> None:
        super().__init__()
        self._step = step
        self._title = ""
        self._verdict = Content()

    def show_title(self, text: str) -> None:
        self._title = text
        self.refresh()

    def show_verdict(self, content: Content) -> None:
        self._verdict = content
        self.refresh()

    def render(self) -> RenderResult:
        line = Content.assemble(("windtunnel", "bold $primary"), "  ", self._place())
        if line.cell_length > self.size.width and self._step:
            line = self._place()
        title = Content.styled(self._title, "$muted")
        spare = self.size.width - line.cell_length - title.cell_length
        return Content.assemble(line, " " * spare, title) if spare >= 2 else line

    def _place(self) -> Content:
        if not self._step:
            return self._verdict
        here = STEPS.index(self._step)
        parts = []
        for index, name in enumerate(STEPS):
            if index == here:
                parts.append(Content.styled(f"● {name}", "bold $lit"))
            else:
                mark, style = ("✓", "$muted") if index < here else ("○", "$faint")
                parts.append(Content.styled(f"{mark} {name}", style))
        return Content("  ").join(parts)


class Verdict(Widget):
    """The second row of a step: its name, then the verdict."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self._step = step
        self._verdict = Content()

    def show_verdict(self, content: Content) -> None:
        self._verdict = content
        self.refresh()

    def render(self) -> RenderResult:
        return Content.assemble((f"{self._step}  ", "$muted"), self._verdict)

"""The memory of a plan as one bar and its legend."""

from typing import Final

from textual.app import RenderResult
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from engine.plan import Device, Estimate
from engine.report.plan import Part, Role, bar_parts, legend, stretches

_STYLES: Final[dict[Role, str]] = {
    "weights": "#ff8205",
    "trainable": "#ffa02e",
    "activations": "#ffc04f",
    "process": "$muted",
    "spare": "$success",
    "over": "$error",
    "kept": "$faint",
}


class MemoryBar(Widget):
    """Two rows of bar and one of legend."""

    DEFAULT_CSS = "MemoryBar { height: 3; padding: 0 2; text-wrap: nowrap; }"

    parts: reactive[list[Part]] = reactive(list)

    def show_estimate(self, needs: Estimate, device: Device) -> None:
        """Another plan. A needed size beyond the device draws past the mark `┃`."""
        self.parts = bar_parts(needs, device)

    def render(self) -> RenderResult:
        width = max(2, self.size.width)
        bar = Content.assemble(
            *(
                (text, _STYLES[part.role] if part else "bold $foreground")
                for part, text in stretches(self.parts, width)
            )
        )
        named = [
            Content.assemble((part.glyph, _STYLES[part.role]), text)
            for part, text in legend(self.parts, width)
        ]
        return Content("\n").join([bar, bar, Content("  ").join(named)])

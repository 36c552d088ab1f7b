"""The progress of a run in the foreground: one living line, and above it what is worth keeping.

It needs no screen of its own: it works over ssh, in a scrollback and under `tee`, and leaves the
run's story behind.
"""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from engine.events import Ended, Phase, Recorded, Sample, Started, Step
from engine.report.run import event_line
from engine.visible import visible


class Progress:
    """Draws events as they come; `close` leaves the last state on the screen."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, figures="")
        self._bar.start()

    def show(self, recorded: Recorded) -> None:
        event, line = recorded.event, event_line(recorded.event)
        if line is None or isinstance(event, Ended):  # whoever waits for the end tells it
            return
        match event:
            case Phase():
                self._describe(str(line))
            case Started():
                self._bar.update(self._task, total=event.total_steps, figures="")
                self._describe("training")
                self._keep(str(line))
            case Step():
                self._bar.update(self._task, completed=event.step, figures=line.text)
                self._describe("training")
            case Sample():
                # `demo` and the run's own file have the answers; here they would bury the rest.
                self._describe(f"answering ({event.when})")
            case _:
                self._keep(str(line))

    def close(self) -> None:
        self._bar.stop()

    def _describe(self, work: str) -> None:
        self._bar.update(self._task, description=visible(work, one_line=True), refresh=True)

    def _keep(self, line: str) -> None:
        self._console.print(Text(visible(line, one_line=True)), soft_wrap=True)

"""The progress of a run in the foreground: one living line, and above it what is worth keeping.

Apart from the wizard because it needs no screen of its own: it works over ssh, in a scrollback and
under `tee`, and leaves the run's story behind.
"""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from engine.cli.watch import describe
from engine.events import Phase, Recorded, Sample, Started, Step
from engine.visible import visible
from tui.history import phase_words


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
        """Take in one event."""
        event = recorded.event
        match event:
            case Phase():
                words = visible(phase_words(event.name), one_line=True)
                self._bar.update(self._task, description=words, refresh=True)
            case Started():
                self._bar.update(
                    self._task, description="training", total=event.total_steps, figures=""
                )
                self._keep(describe(event))
            case Step():
                figures = f"loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tok/s"
                self._bar.update(
                    self._task, description="training", completed=event.step, figures=figures
                )
            case Sample():
                # `demo` and the run's own file have the answers; here they would bury the rest.
                self._bar.update(self._task, description=f"answering ({event.when})")
            case _:
                self._keep(describe(event))

    def close(self) -> None:
        """Stop drawing."""
        self._bar.stop()

    def _keep(self, line: str) -> None:
        if line:
            self._console.print(Text(visible(line, one_line=True)), soft_wrap=True)

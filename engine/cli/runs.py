"""The commands that look after runs: `runs`, `watch`, `pause`, `resume`, `stop`.

They decide only what is printed and how long to wait; what a run is and how it answers is in
`engine.runs`, how a dead one is started again in `engine.launch`.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import cyclopts

from engine.cli.printing import AsJson, RunName, RunsFolder
from engine.cli.watch import PlainWatch, Watch, watch_to_end
from engine.errors import UserError, WorkError
from engine.events import Ack
from engine.launch import resume_run
from engine.report.run import progress_text
from engine.runs import (
    Follower,
    Request,
    RunFolder,
    Summary,
    ask,
    find_run,
    follow,
    is_locked,
    list_runs,
    run_home,
    summarize,
)
from engine.visible import visible

_ANSWER_SECONDS: Final = 60.0
_SAVING_SECONDS: Final = 600.0


OpenRun = Callable[[RunFolder, bool], int]
"""Shows a run on a screen, in ASCII or not, until the person leaves; gives the exit status."""


def register(
    app: cyclopts.App,
    make_watch: Callable[[], Watch] = PlainWatch,
    open_run: OpenRun | None = None,
) -> None:
    """Add the commands; `make_watch` makes what shows a run that `resume` restarts, `open_run` is
    the screen of `watch`, None where there is none.

    They raise UserError and return an exit status, or None for 0.
    """
    app.command(show_runs, name="runs")
    app.command(pause)
    app.command(stop)
    _register_train(app, make_watch)
    _register_watch(app, open_run)

    @app.command
    def resume(
        name: RunName,
        /,
        *changes: Annotated[
            str,
            cyclopts.Parameter(help="Changes that alter no result: micro_batch_size=1."),
        ],
        checkpoint: Annotated[
            str | None, cyclopts.Parameter(name="--from", help="Checkpoint to go back to: step-N.")
        ] = None,
        detach: Annotated[
            bool,
            cyclopts.Parameter(negative="", help="Restart in the background and return at once."),
        ] = False,
        home: RunsFolder = None,
        as_json: AsJson = False,
    ) -> int:
        """Lift the pause of a run, or restart one that has ended from its last checkpoint."""
        run = find_run(name, home)
        follower = Follower(run.events, from_end=True)
        patience = _patience_seconds(run)
        resumed = resume_run(
            run,
            checkpoint=checkpoint,
            changes=changes,
            detach=detach,
            timeout_seconds=patience,
        )
        if resumed.ack:
            _require_done(run, resumed.ack)
        if resumed.process and not detach:
            exit_status = watch_to_end(run, resumed.process, follower, make_watch())
            if exit_status:
                return exit_status
        _answer(run, "resume", summarize(run).status.capitalize(), as_json)
        return 0


def _register_watch(app: cyclopts.App, open_run: OpenRun | None) -> None:
    @app.command
    def watch(
        name: RunName | None = None,
        /,
        *,
        plain: Annotated[
            bool, cyclopts.Parameter(negative="", help="Lines of text instead of a screen.")
        ] = False,
        ascii_only: Annotated[
            bool, cyclopts.Parameter(name="--ascii", negative="", help="Draw with ASCII alone.")
        ] = False,
        home: RunsFolder = None,
    ) -> int:
        """Follow a run, the newest one without a name. Leaving never stops it."""
        run = find_run(name, home) if name else _newest(home)
        if open_run and not plain:
            return open_run(run, ascii_only)
        shown = PlainWatch(sys.stdout)
        for recorded in follow(run):
            shown.show(recorded)
        print(_ending(run), flush=True)
        return 0


def show_runs(*, home: RunsFolder = None, as_json: AsJson = False) -> None:
    """Every run that is known, the latest first: status, steps, loss."""
    shown: list[tuple[RunFolder, Summary]] = []
    for run in list_runs(home):
        try:
            shown.append((run, summarize(run)))
        except WorkError as error:
            _print_now(str(error))
    if as_json:
        print(json.dumps({"runs": [_document(run, summary) for run, summary in shown]}))
    elif shown:
        width = max(len(visible(run.name, one_line=True)) for run, _ in shown)
        for run, summary in shown:
            name = visible(run.name, one_line=True)
            print(f"{name:<{width}}  {summary.status:<8}  {progress_text(summary)}".rstrip())
    else:
        where = visible(str(run_home(home)), one_line=True)
        print(f"No runs yet under {where}. `windtunnel demo` makes one in about a minute.")


def pause(name: RunName, /, *, home: RunsFolder = None, as_json: AsJson = False) -> None:
    """Hold a run at the next step; it keeps its memory until `resume`."""
    run = find_run(name, home)
    _ask(run, "pause")
    _answer(run, "pause", "Paused", as_json)


def stop(name: RunName, /, *, home: RunsFolder = None, as_json: AsJson = False) -> None:
    """Save a run at the next step and end it; `resume` goes on from there."""
    run = find_run(name, home)
    _ask(run, "stop")
    _print_now(f"{visible(run.name, one_line=True)} is saving.")
    deadline = time.monotonic() + _SAVING_SECONDS
    while is_locked(run):
        if time.monotonic() > deadline:
            _answer(run, "stop", "Still saving", as_json)
            return
        time.sleep(0.05)
    summary = summarize(run)
    if summary.status in ("failed", "lost"):
        raise WorkError(
            f"The run {visible(run.name, one_line=True)} is {summary.status}.",
            "It accepted to stop and did not end as it should have.",
            f"Read {visible(str(run.log), one_line=True)}.",
        )
    _answer(run, "stop", summary.status.capitalize(), as_json)


def _newest(home: Path | None) -> RunFolder:
    runs = list_runs(home)
    if not runs:
        raise UserError(
            "There is no run to watch.",
            f"No run is known under {visible(str(run_home(home)), one_line=True)}.",
            "Start one with `windtunnel train CONFIG`, or name its folder.",
        )
    return runs[0]


def _ending(run: RunFolder) -> str:
    summary = summarize(run)
    return f"{visible(run.name, one_line=True)} is {summary.status}, {progress_text(summary)}"


def _ask(run: RunFolder, command: Request) -> None:
    _require_done(run, ask(run, command, timeout_seconds=_patience_seconds(run)))


def _require_done(run: RunFolder, ack: Ack) -> None:
    if ack.outcome == "refused":
        raise WorkError(
            f"The run {visible(run.name, one_line=True)} refused to {ack.command}.",
            "It cannot do that where it is now.",
            "See what it does with `windtunnel runs`, then ask again.",
        )


def _patience_seconds(run: RunFolder) -> float:
    """A run answers between two steps, and the steps of a large model take minutes."""
    return max(_ANSWER_SECONDS, 3 * (summarize(run).step_seconds or 0.0))


def _answer(run: RunFolder, command: Request, word: str, as_json: bool) -> None:
    summary = summarize(run)
    if as_json:
        answer = {"run": run.name, "command": command, "outcome": "done"}
        print(json.dumps({**answer, **_document(run, summary)}))
    else:
        print(f"{word}: {visible(run.name, one_line=True)}, {progress_text(summary)}")


def _document(run: RunFolder, summary: Summary) -> dict[str, object]:
    loss = summary.loss
    return {
        "name": summary.name,
        "status": summary.status,
        "step": summary.step,
        "total_steps": summary.total_steps,
        "loss": loss if loss is not None and math.isfinite(loss) else None,
        "path": str(run.path),
    }


def _print_now(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""The commands about runs: `train`, `runs`, `watch`, `pause`, `resume`, `stop`.

They decide only what is printed and how long to wait; what a run is and how it answers is in
`engine.runs`, how one is started in `engine.launch`.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Annotated, Final

from cyclopts import Parameter

from engine.cli.dry_run import try_dry
from engine.cli.terminal import (
    HOST,
    Ascii,
    AsEvents,
    AsJson,
    CommandHost,
    ConfigPath,
    EventLines,
    Host,
    NoWatch,
    PlainWatch,
    RunName,
    RunsFolder,
    Watch,
    print_lines,
)
from engine.errors import UserError, WorkError
from engine.events import Ack, Ended
from engine.interrupt import INTERRUPTED, last_words
from engine.launch import ALONE, Nodes, find_nodes, forwarded_signals, launch, resume_run
from engine.report.run import progress_text, read_results, require_end, state_lines
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
from engine.runs.listing import AT_ONCE, summaries
from engine.visible import visible
from engine.wizard.start import Created, create, plan_run, spread

NODE_VARIABLE: Final = "SLURM_NODEID"
"""Slurm's number of this node in its job; all nodes write one log, and only the first tells."""
_ANSWER_SECONDS: Final = 60.0
_SAVING_SECONDS: Final = 600.0
NOT_BEGUN: Final = "Nothing was trained or saved yet."


def train(
    config: ConfigPath,
    /,
    *changes: Annotated[str, Parameter(help="Changes, such as learning_rate=1e-4.")],
    detach: Annotated[
        bool, Parameter(help="Start it and return; it outlives the terminal.")
    ] = False,
    max_steps: Annotated[int | None, Parameter(help="Stop after so many optimizer steps.")] = None,
    anyway: Annotated[bool, Parameter(help="Start even where the estimate does not fit.")] = False,
    verify: Annotated[
        bool,
        Parameter(
            "--verify-resume",
            help="Prove here, in a few steps, that a stopped run goes on to the same losses.",
        ),
    ] = False,
    nodes: Annotated[
        int, Parameter(help="Computers of the run: the same command is started on each.")
    ] = 1,
    rendezvous: Annotated[
        str, Parameter(help="Where they find each other: HOST:PORT of one of them.")
    ] = "",
    as_json: AsJson = False,
    as_events: AsEvents = False,
    home: RunsFolder = None,
    host: CommandHost = HOST,
) -> int:
    """Train what a config says. Exit status 3: it does not fit this machine.

    With --max-steps 0 nothing is trained or loaded: config, model, plan and rows are checked.
    """
    last_words(NOT_BEGUN)
    if max_steps == 0:
        tried = try_dry(config, changes)
        document = {"run": None, "dry_run": tried.lines, "rows_left_out": tried.rows_left_out}
        print(json.dumps(document) if as_json else "\n".join(tried.lines))
        return tried.exit_status if not anyway else 0
    if max_steps is not None:
        changes = (*changes, f"max_steps={max_steps}")
    computers = find_nodes(nodes, rendezvous, verify=verify)
    changes = spread(config, changes, nodes)
    plan = plan_run(config, changes, anyway=anyway, nodes=nodes)
    if verify:
        return _verify(config, changes, plan, home, host, as_json)
    created = create(config, changes, home)
    run = created.run
    heard = os.environ.get(NODE_VARIABLE, "0") == "0"
    watch = None if detach else EventLines() if as_events else host.make_watch()
    status = start(created, watch if heard else NoWatch(), host, plan, computers)
    if as_json:
        print(json.dumps({"run": str(run.path)}))
    elif not as_events and heard:
        if not detach:
            print_lines(read_results(run))
        print_lines(state_lines(run))
    return status


def _verify(
    config: Path,
    changes: Sequence[str],
    plan: Mapping[str, object] | None,
    home: Path | None,
    host: Host,
    as_json: bool,
) -> int:
    from engine.wizard.verify import verify_resume

    watch = PlainWatch()
    proof = verify_resume(
        config, changes, plan, home=home, module=host.trainer, say=_print_now, show=watch.show
    )
    document = {"run": None, "verify_resume": proof.document()}
    print(json.dumps(document) if as_json else proof.verdict())
    return 0 if proof.holds else 1


def start(
    created: Created,
    watch: Watch | None,
    host: Host,
    plan: Mapping[str, object] | None = None,
    nodes: Nodes = ALONE,
) -> int:
    """Launch a created run, detached where nobody watches; returns the exit status."""
    follower = Follower(created.run.events, from_end=True)
    process = launch(
        created.run,
        detach=watch is None,
        config=created.config,
        plan=plan,
        resume=created.resume,
        checkpoint=created.checkpoint,
        module=host.trainer,
        nodes=nodes,
    )
    last_words("")
    return watch_to_end(created.run, process, follower, watch) if watch else 0


def watch_to_end(run: RunFolder, process: "Popen[bytes]", follower: Follower, watch: Watch) -> int:
    """Show a foreground trainer's events until it is gone; returns 0, or 130 when interrupted
    before its last step.

    Raises the sentence of a run that failed, and WorkError for one that ended without a word.
    """
    end: Ended | None = None
    with forwarded_signals(run, process) as received:
        try:
            for recorded in follow(run, lambda: process.poll() is not None, follower=follower):
                if isinstance(recorded.event, Ended):
                    end = recorded.event
                watch.show(recorded)
        finally:
            watch.close()
    if end or not received:
        require_end(run, end, process.returncode)
    finished = end is not None and end.outcome == "finished"
    return INTERRUPTED if received and not finished else 0


def show_runs(*, home: RunsFolder = None, as_json: AsJson = False) -> None:
    """Every run that is known, the latest first: status, steps, loss."""
    shown = []
    width = max((len(visible(run.name, one_line=True)) for run in list_runs(home)), default=0)
    for run, summary in summaries(home):
        if isinstance(summary, UserError):
            _print_now(str(summary))
            continue
        shown.append(_document(run, summary))
        if not as_json:
            name = visible(run.name, one_line=True)
            line = f"{name:<{width}}  {summary.status:<8}  {progress_text(summary)}"
            print(line.rstrip(), flush=len(shown) == AT_ONCE)
    if as_json:
        print(json.dumps({"runs": shown}))
    elif not shown:
        where = visible(str(run_home(home)), one_line=True)
        print(f"No runs yet under {where}. `windtunnel demo` makes one in about a minute.")


def watch(
    name: RunName | None = None,
    /,
    *,
    plain: Annotated[bool, Parameter(help="Lines of text instead of a screen.")] = False,
    ascii_only: Ascii = False,
    home: RunsFolder = None,
    host: CommandHost = HOST,
) -> int:
    """Follow a run, the newest one without a name. Leaving never stops it."""
    run = find_run(name, home) if name else _newest(home)
    if host.open_run and not plain:
        return host.open_run(run, ascii_only)
    shown = PlainWatch(sys.stdout)
    for recorded in follow(run):
        shown.show(recorded)
    summary = summarize(run)
    ended = f"{visible(run.name, one_line=True)} is {summary.status}, {progress_text(summary)}"
    print(ended, flush=True)
    return 0


def pause(name: RunName, /, *, home: RunsFolder = None, as_json: AsJson = False) -> None:
    """Hold a run at the next step; it keeps its memory until `resume`."""
    run = find_run(name, home)
    _ask(run, "pause")
    _answer(run, "pause", "Paused", as_json)


def resume(
    name: RunName,
    /,
    *changes: Annotated[str, Parameter(help="Changes that alter no result: micro_batch_size=1.")],
    checkpoint: Annotated[
        str | None, Parameter("--from", help="Checkpoint to go back to: step-N.")
    ] = None,
    detach: Annotated[bool, Parameter(help="Restart in the background, return at once.")] = False,
    home: RunsFolder = None,
    as_json: AsJson = False,
    host: CommandHost = HOST,
) -> int:
    """Lift the pause of a run, or restart one that has ended from its last checkpoint."""
    run = find_run(name, home)
    follower = Follower(run.events, from_end=True)
    last_words("The run is as it was.")
    resumed = resume_run(
        run,
        checkpoint=checkpoint,
        changes=changes,
        detach=detach,
        module=host.trainer,
        timeout_seconds=_patience_seconds(run),
    )
    last_words("")
    if resumed.ack:
        _require_done(run, resumed.ack)
    if resumed.process and not detach:
        exit_status = watch_to_end(run, resumed.process, follower, host.make_watch())
        if exit_status:
            if not as_json:
                print_lines(state_lines(run))
            return exit_status
    _answer(run, "resume", summarize(run).status.capitalize(), as_json)
    return 0


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
        "rows": summary.rows,
        "rows_left_out": summary.rows_left_out,
        "path": str(run.path),
    }


def _print_now(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

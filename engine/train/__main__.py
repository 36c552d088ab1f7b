"""`python -m engine.train run FOLDER [--resume] [--from step-N]`: one trainer process.

The lock is taken before anything heavy is imported, and whatever happens ends in an `ended` event
with three sentences: a run is never just gone. `ranks FOLDER --count N` starts it so many times,
under one lock. `generate FOLDER` and `merge FOLDER OUT` use what a run left, and `fit FOLDER`
measures what one would take; they take no lock, and print lines of JSON on stdout.
"""

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.child import TRAINER
from engine.errors import UserError, WorkError
from engine.events import Ended, EventWriter, Phase
from engine.hardware.packages import install_command, installed, version_problem
from engine.interrupt import interruptible
from engine.pace import every
from engine.runs import ControlReader, RunFolder, RunLock, StopAsked, StopSignals, summarize
from engine.runs.listing import keep_history
from engine.runs.rank import is_rank, is_restarted, join_ranks, rank_number, report_failure


def main(arguments: list[str] | None = None) -> int:
    """Run one trainer; returns its exit status: 0 ended as asked, 1 failed, 2 wrong request."""
    parser = argparse.ArgumentParser(prog="python -m engine.train")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what a run folder's config.yml says")
    run.add_argument("folder", type=Path)
    ranks = commands.add_parser("ranks", help="the same in several processes")
    ranks.add_argument("folder", type=Path)
    ranks.add_argument("--count", type=int, required=True, help="processes on this computer")
    ranks.add_argument("--nodes", type=int, default=1, help="computers with as many each")
    ranks.add_argument("--rendezvous", default="", help="where they meet: HOST:PORT")
    ranks.add_argument("--max-restarts", type=int, default=0, help="after one has died")
    ranks.add_argument("--module", default=TRAINER, help="what each process runs")
    for each in (run, ranks):
        each.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        each.add_argument("--from", dest="checkpoint", help="go on from this one: step-N")
    questions = commands.add_parser("generate", help="answer requests, a line of JSON each")
    questions.add_argument("folder", type=Path)
    merging = commands.add_parser("merge", help="put a run's adapter into its base's weights")
    merging.add_argument("folder", type=Path)
    merging.add_argument("target", type=Path)
    fitting = commands.add_parser("fit", help="measure a few steps on random weights")
    fitting.add_argument("folder", type=Path)
    fitting.add_argument("--steps", type=int, required=True)
    options = parser.parse_args(arguments)
    if options.command not in ("run", "ranks"):
        return interruptible(lambda: use(options))
    folder = RunFolder(options.folder.resolve())
    try:
        if options.command == "ranks":
            return lead(folder, options)
        return train(folder, options.resume, options.checkpoint)
    except UserError as error:  # the lock is another process's: its events are not ours to write
        print(error, file=sys.stderr)
        return error.exit_status


def lead(run: RunFolder, options: argparse.Namespace) -> int:
    """Hold the run's lock for several processes, each of which trains; several computers first find
    out which of them holds it."""
    command = [sys.executable, "-m", options.module, "run", str(run.path)]
    command += ["--resume"] * options.resume
    command += ["--from", options.checkpoint] if options.checkpoint else []
    with StopSignals() as signals, contextlib.ExitStack() as held:
        if options.nodes == 1:
            held.enter_context(RunLock(run))
        try:
            require_stack()
            from engine.train.supervisor import Team, supervise

            team = Team(options.count, options.nodes, options.rendezvous, options.max_restarts)
            return supervise(run, team, command, signals, held)
        except Exception as error:
            reason = explain(error)
            if options.nodes > 1:
                raise reason from error
            traceback.print_exc()
            with EventWriter(run.events) as events:
                step = summarize(run).step
                events.emit(Ended("failed", step, reason.what, reason.why, reason.fix))
            return reason.exit_status


def train(run: RunFolder, resume: bool, checkpoint: str | None) -> int:
    """Hold the run's lock for life and carry the run out; a rank leaves the lock to its supervisor,
    and the events to the first of them."""
    lock = contextlib.nullcontext() if is_rank() else RunLock(run)
    events_path = Path(os.devnull) if rank_number() else run.events
    if is_rank():
        join_ranks(run)
    if is_restarted():
        resume, checkpoint = True, None
    control = ControlReader(run.control)
    # Signals first: one that comes between the two would kill without a word.
    with StopSignals() as signals, lock, EventWriter(events_path) as events:
        signals.leaving = lambda: events.emit(Ended("stopped", summarize(run).step))
        try:
            events.emit(Phase("import"))
            require_stack()
            from engine.train.out_of_memory import shortage_of
            from engine.train.run import run as carry_out
            from engine.train.session import Session

            carry_out(Session(run, events, control, signals), resume=resume, checkpoint=checkpoint)
        except StopAsked:
            signals.leaving()
        except Exception as error:
            reason = explain(error)
            traceback.print_exc()
            if is_rank():
                report_failure(error, reason, shortage_of(error))
            else:
                step = summarize(run).step
                events.emit(Ended("failed", step, reason.what, reason.why, reason.fix))
            return reason.exit_status
        finally:
            if not rank_number():
                keep_history(run)
    return 0


def use(options: argparse.Namespace) -> int:
    """Carry out `generate`, `merge` or `fit`; an error becomes a line with its sentences."""
    run = RunFolder(options.folder.resolve())
    try:
        require_stack()
        if options.command == "generate":
            from engine.train.generate import serve

            serve(run, sys.stdin, _emit)
        elif options.command == "fit":
            from engine.train.fitcheck import check

            check(run, options.steps, _emit)
        else:
            from engine.train.merge import merge

            due = every(0.1)

            def report(done: int, total: int) -> None:
                if due() or done == total:
                    _emit({"done": done, "total": total})

            target = options.target.resolve()
            made = merge(run, target, report, say=lambda text: _emit({"note": text}))
            _emit({"merged": str(made)})
    except Exception as error:
        reason = explain(error)
        if not isinstance(error, UserError):
            traceback.print_exc()
        sentences = {"what": reason.what, "why": reason.why, "fix": reason.fix}
        _emit({"error": sentences | {"exit_status": reason.exit_status}})
        return reason.exit_status
    return 0


def require_stack() -> None:
    """Raise WorkError for a package of another version than is asked for.

    One that is missing is reported by its import: not every run needs all of them.
    """
    if problem := version_problem():
        raise WorkError(problem.what, problem.why, problem.fix)


def _emit(record: Mapping[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def explain(error: Exception) -> UserError:
    """The three sentences for whatever ended the run."""
    if isinstance(error, UserError):
        return error
    from engine.files import said, way_out
    from engine.train.out_of_memory import is_out_of_memory, message_of
    from engine.visible import first_line

    if isinstance(error, ImportError):
        return _not_imported(error, first_line(error))
    if is_out_of_memory(error):
        return WorkError(
            "There is not as much memory as this needs.",
            f"The system says: {message_of(error)}.",
            "Close other programs, or use a larger machine; `windtunnel estimate` shows what each "
            "part takes.",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return WorkError(
            "A file could not be read or written.",
            f"The system says: {said(error)}.",
            f"{way_out(error)}; the run resumes from its last checkpoint.",
        )
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return WorkError(
            "A file could not be read or written.",
            f"The system says: {first_line(error)}.",
            "See that the file is whole and that the disk has space; the run resumes from its "
            "last checkpoint.",
        )
    return WorkError(
        "The trainer stopped at an error that it does not know.",
        f"{type(error).__name__}: {first_line(error)}.",
        "engine.log in the run's folder has the details; the run resumes from its last checkpoint.",
    )


def _not_imported(error: ImportError, message: str) -> WorkError:
    """The sentences for a package that is not there, or of which a part is not."""
    package, _, inner = (error.name or "training stack").partition(".")
    command = install_command("train")
    if isinstance(error, ModuleNotFoundError) and not inner:
        return WorkError(
            f"Training needs the package {package}, which is not installed.",
            "The base install plans and previews; the training stack is an extra of its own.",
            f"Install it: {command}",
        )
    return WorkError(
        f"A part of the installed {package} {installed(package) or ''}".rstrip()
        + " cannot be imported.",
        f"The system says: {message}.",
        f"Install the versions that Windtunnel needs: {command}",
    )


if __name__ == "__main__":
    sys.exit(main())

"""Every headless command, each a thin layer over the function that the wizard calls too.

Here is what all share: how a request becomes an exit status, and how an error becomes three lines.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import cyclopts
from cyclopts import CycloptsError

from engine.cli import config, dataset, demo, machine, planning, runs, use
from engine.cli.runs import PlainWatch, Watch
from engine.errors import UserError, WorkError
from engine.interrupt import INTERRUPTED, interrupted
from engine.visible import visible

WORK_FAILED, WRONG_REQUEST = 1, 2
_COMMANDS: Mapping[str, Callable[..., int | None]] = {
    "probe": machine.probe,
    "doctor": machine.doctor,
    "models": machine.print_models,
    "check": dataset.check_data,
    "preview": dataset.preview_data,
    "prepare": dataset.prepare_data,
    "recommend": planning.print_recommendation,
    "estimate": planning.print_estimate,
    "schema": config.print_schema,
    "explain": config.print_explanation,
    "push": use.push,
    "serve-hint": use.serve_hint,
    "compare": use.compare,
}
"""The others are made with what shows a run or asks a person."""


def build_app(
    make_watch: Callable[[], Watch],
    open_run: runs.OpenRun | None = None,
    ask_new: config.AskNew | None = None,
) -> cyclopts.App:
    """All commands; `make_watch` makes what shows a run in the foreground, `open_run` is the screen
    of `watch`, `ask_new` asks the questions of `new`."""
    app = cyclopts.App(
        name="windtunnel",
        help="Fine-tune Mistral models: see what is learned, train it, never lose a run.",
        version=lambda: version("windtunnel"),
        version_flags=["--version"],
        help_format="plaintext",
        default_parameter=cyclopts.Parameter(negative=(), show_default=False),
    )
    for name, command in _COMMANDS.items():
        app.command(command, name=name)
    config.register_new(app, ask_new)
    planning.register_fit(app)
    demo.register(app, make_watch)
    runs.register(app, make_watch, open_run)
    use.register(app)
    return app


def main(
    arguments: Sequence[str] | None = None,
    make_watch: Callable[[], Watch] | None = None,
    open_run: runs.OpenRun | None = None,
    ask_new: config.AskNew | None = None,
    more_help: str = "",
) -> int:
    """Carry out one command line; returns its exit status and never shows a traceback.

    `more_help` is printed below the list of commands.
    """
    _print_any_letter()
    app = build_app(make_watch or PlainWatch, open_run, ask_new)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(given, exit_on_error=False, print_error=False, result_action="return_value")
        if more_help and given in (["--help"], ["-h"]):
            print(more_help)
        if sys.stdout:  # now, where a reader that left is no error
            sys.stdout.flush()
    except UserError as error:
        print_sentence(error)
        return error.exit_status
    except CycloptsError as error:
        print_sentence(
            UserError(
                visible(" ".join(str(error).split()), one_line=True),
                "The command line could not be understood.",
                "`windtunnel --help` lists the commands; `windtunnel COMMAND --help` explains one.",
            )
        )
        return WRONG_REQUEST
    except BrokenPipeError:
        # The reader of our output left; Python would fail a second time when it closes stdout.
        with contextlib.suppress(OSError):  # a stand-in for stdout has no descriptor
            descriptor = sys.stdout.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        return 0
    except OSError as error:
        print_sentence(
            WorkError(
                "The command could not read or write a file.",
                f"The system says: {error}.",
                "See that the disk has space and that the file may be used.",
            )
        )
        return WORK_FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return status if isinstance(status, int) else 0


def _print_any_letter() -> None:
    """Where the output's encoding lacks a letter, print its number instead of failing on it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it was closed before we began
            stream.reconfigure(errors="backslashreplace")


def print_sentence(error: UserError) -> None:
    """What, why and what to do, a line each, on stderr; nothing after ctrl+c."""
    if interrupted():
        return
    for line in (error.what, error.why, error.fix):
        if line:
            print(visible(line), file=sys.stderr)

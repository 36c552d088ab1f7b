"""Every headless command, each a thin layer over the function that the wizard calls too.

Here is what all share: how a request becomes an exit status, and how an error becomes three lines.
"""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version

import cyclopts
from cyclopts import CycloptsError

from engine.cli import config, dataset, demo, export, machine, planning, runs, use
from engine.cli.terminal import HOST, Host
from engine.errors import WORK_FAILED, WRONG_REQUEST, UserError, WorkError
from engine.files import said, way_out
from engine.interrupt import INTERRUPTED, interrupted, last_words, say_last_words
from engine.visible import visible

_COMMANDS: Mapping[str, Callable[..., int | None]] = {
    "probe": machine.probe,
    "doctor": machine.doctor,
    "models": machine.print_models,
    "check": dataset.check_data,
    "preview": dataset.preview_data,
    "prepare": dataset.prepare_data,
    "recommend": planning.print_recommendation,
    "estimate": planning.print_estimate,
    "fit": planning.fit,
    "new": config.new,
    "schema": config.print_schema,
    "explain": config.print_explanation,
    "help": config.print_help,
    "train": runs.train,
    "demo": demo.demo,
    "runs": runs.show_runs,
    "watch": runs.watch,
    "pause": runs.pause,
    "resume": runs.resume,
    "stop": runs.stop,
    "generate": use.generate,
    "chat": use.chat,
    "merge": use.merge,
    "push": use.push,
    "serve-hint": use.serve_hint,
    "compare": use.compare,
    "export": export.export,
}


def build_app(host: Host = HOST) -> cyclopts.App:
    app = cyclopts.App(
        name="windtunnel",
        help="Fine-tune Mistral models: see what is learned, train it, never lose a run.",
        version=lambda: version("windtunnel"),
        version_flags=["--version"],
        help_format="plaintext",
        default_parameter=cyclopts.Parameter(negative=(), show_default=False),
        suppress_keyboard_interrupt=False,
    )
    for name, command in _COMMANDS.items():
        bound = command
        if "host" in (command.__kwdefaults__ or ()):
            bound = partial(command, host=host)
            bound.__doc__ = command.__doc__
        app.command(bound, name=name)
    return app


def main(arguments: Sequence[str] | None = None, host: Host = HOST) -> int:
    """Carry out one command line; returns its exit status and never shows a traceback."""
    _print_any_letter()
    last_words("")
    given = list(sys.argv[1:] if arguments is None else arguments)
    status = _carry_out(given, host)
    if status == INTERRUPTED or interrupted():
        say_last_words(visible(shlex.join(("windtunnel", *given)), one_line=True))
    return status


def _carry_out(given: list[str], host: Host) -> int:
    app = build_app(host)
    try:
        status = app(given, exit_on_error=False, print_error=False, result_action="return_value")
        if host.more_help and given in (["--help"], ["-h"]):
            print(host.more_help)
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
                f"The system says: {said(error)}.",
                f"{way_out(error)}, and try again.",
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

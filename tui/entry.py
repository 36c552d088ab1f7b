"""What a command line opens: the wizard, the screen of a run, or a command of the engine's.

It decides what a command line without a command asks for, and whether there is a terminal to ask
on. Textual would write its escapes into a pipe and wait for keys from /dev/null, so that is found
out here, before anything of it is imported.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.errors import UserError
from engine.interrupt import INTERRUPTED, leave_at_once, wanted
from engine.visible import visible

if TYPE_CHECKING:
    from engine.cli.terminal import NewRequest, Watch
    from engine.runs import RunFolder
    from engine.wizard.draft import Draft
    from tui.app import WindtunnelApp

_STARTING_SECONDS: Final = 0.05
_CONFIG_ENDINGS: Final = (".yml", ".yaml")
_HELP: Final = """
Without a command: windtunnel [CONFIG] [--plain] [--ascii] [--assume GPU]
  The wizard: machine, model, data, preview, plan, review, in six questions.
  CONFIG    open it on that config file, at the review
  --plain   numbered questions on plain lines instead of a screen
  --ascii   draw with ASCII alone
  --assume  plan for GPUs that are not here, such as 'H100 x2' or '24 GB'\
"""


@dataclass(frozen=True, slots=True)
class WizardRequest:
    """What a command line without a command asks for."""

    config: Path | None = None
    plain: bool = False
    ascii_only: bool = False
    assumed: str | None = None
    """The GPUs to plan for."""


def carry_out() -> int:
    arguments = sys.argv[1:]
    try:
        request = read_request(arguments)
        return run_command(arguments) if request is None else open_wizard(request)
    except UserError as error:
        from engine.cli import print_sentence

        print_sentence(error)
        return error.exit_status


def read_request(arguments: Sequence[str]) -> WizardRequest | None:
    """What the wizard is asked for; None where the arguments are a command of the engine's.

    Raises UserError for a wizard's command line that cannot be understood.
    """
    flags: set[str] = set()
    config: Path | None = None
    assumed: str | None = None
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if word in ("--plain", "--ascii"):
            flags.add(word)
        elif name == "--assume":
            assumed = value if equals else next(words, "")
        elif config is None and word.lower().endswith(_CONFIG_ENDINGS) and word[:1] != "-":
            config = Path(word)
        elif config is None:
            return None
        else:
            raise UserError(
                f"{visible(word, one_line=True)} has no meaning behind a config.",
                "The wizard takes one config, --plain, --ascii and --assume GPU.",
                "To train without questions: windtunnel train config.yml key=value",
            )
    return WizardRequest(config, "--plain" in flags, "--ascii" in flags, assumed)


def run_command(arguments: list[str]) -> int:
    from engine.cli import main as run
    from engine.cli.terminal import Host, PlainWatch

    host = Host(
        make_watch=_draw if _is_screen(sys.stderr) else PlainWatch,
        open_run=_open_run if _has_screen() else None,
        ask_new=_ask_new if _has_keys() else None,
        more_help=_HELP,
    )
    return run(arguments, host)


def open_wizard(request: WizardRequest) -> int:
    """The wizard, on a screen where the terminal has one; returns its exit status.

    Raises UserError where no answers can be asked, for a config that cannot be read, a GPU that is
    not known, and a run that failed.
    """
    if not _has_keys():
        raise UserError(
            "No answers can be asked here.",
            "The wizard needs a terminal to write to and keys to read.",
            "Give a config: `windtunnel train config.yml`; `windtunnel --help` lists all commands.",
        )
    if request.plain or not _has_screen():
        from tui.plain import run_plain, stream_dialogue

        run_plain(make_draft(request), stream_dialogue(ascii_only=request.ascii_only))
        return 0
    # Without a word of the person's the draft is empty: the first frame does not wait for it.
    draft = make_draft(request) if request.config or request.assumed else None
    from tui.app import WindtunnelApp

    start = "Review" if request.config else "Machine"
    return show(WindtunnelApp(draft, start=start, ascii_only=request.ascii_only))


def make_draft(request: WizardRequest) -> "Draft":
    """The answers that the command line gives. Raises UserError for one that cannot be taken."""
    from engine.wizard.draft import Draft, draft_from

    draft = Draft()
    if request.config is not None:
        from engine.config import read_config
        from engine.wizard.start import run_name

        draft = draft_from(read_config(request.config), request.config.absolute().parent)
        draft.path, draft.name = request.config, run_name(request.config)
    if request.config is not None or request.assumed is not None:
        from engine.plan import best_device
        from engine.wizard.start import find_machine

        draft.machine = find_machine(request.assumed)
        draft.device = best_device(draft.machine)
    return draft


def show(app: "WindtunnelApp") -> int:
    """Run the app to its end, then print its parting line; returns the exit status."""
    import asyncio

    leave_at_once()  # nothing is open until the app minds ctrl+c itself
    status = asyncio.run(_run(app))
    if app.parting:
        print(visible(app.parting, one_line=True))
    return status or app.return_code or 0


async def _run(app: "WindtunnelApp") -> int | None:
    import asyncio

    loop = asyncio.get_running_loop()

    # In raw mode ctrl+c is a key; signals still come from other processes. Raised between two lines
    # of Textual's one would end in a traceback on a screen that is not given back.
    def leave() -> None:
        if app.is_running:
            app.exit(return_code=INTERRUPTED)
        else:
            loop.call_later(_STARTING_SECONDS, leave)

    for each in wanted():
        loop.add_signal_handler(each, leave)
    status: int | None = await app.run_async()
    return status


def _has_keys() -> bool:
    """Whether a person can read questions and answer them."""
    return _is_terminal(sys.stdin) and _is_terminal(sys.stdout)


def _has_screen() -> bool:
    """Whether a person can see a screen and answer it."""
    return _is_screen(sys.stdout) and _is_terminal(sys.stdin)


def _is_screen(stream: object) -> bool:
    return _is_terminal(stream) and os.environ.get("TERM", "dumb") != "dumb"


def _is_terminal(stream: object) -> bool:
    # A standard stream is None where it was closed before we began.
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty())


def _draw() -> "Watch":
    # Imported here: most commands draw nothing, and rich takes 0.1 s.
    from tui.progress import Progress

    return Progress()


def _open_run(run: "RunFolder", ascii_only: bool) -> int:
    from tui.app import WindtunnelApp

    return show(WindtunnelApp(run=run, ascii_only=ascii_only))


def _ask_new(request: "NewRequest") -> int:
    from tui.plain import stream_dialogue

    dialogue = stream_dialogue(ascii_only=request.ascii_only)
    draft = make_draft(WizardRequest(assumed=request.assumed))
    if request.plain or not _has_screen():
        from tui.plain import run_plain

        run_plain(draft, dialogue, new=True, out=request.out)
    else:
        from tui.inline import run_inline

        run_inline(draft, dialogue, out=request.out)
    return 0

"""The console script `windtunnel`: the engine's commands, with a run's progress drawn."""

import os
import sys

from engine.cli import main as run_command
from engine.cli.watch import Watch


def main() -> None:
    """Carry out the command line and leave with its exit status."""
    arguments = sys.argv[1:] or ["--help"]
    sys.exit(run_command(arguments, make_watch=_draw if _can_draw() else None))


def _can_draw() -> bool:
    # stderr is None where it was closed before we began.
    return (
        sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    )


def _draw() -> Watch:
    # Imported here: most commands draw nothing, and rich takes 0.1 s.
    from tui.progress import Progress

    return Progress()


if __name__ == "__main__":
    main()

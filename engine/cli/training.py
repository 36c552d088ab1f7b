"""`train`: a run in the foreground, or one that is started and left alone."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from engine.cli.dry_run import try_dry
from engine.cli.printing import AsEvents, AsJson, RunsFolder, print_lines
from engine.cli.watch import Watch, watch_to_end
from engine.events import Recorded, format_line
from engine.launch import launch
from engine.report.results import read_results
from engine.report.run import state_lines
from engine.runs import Follower
from engine.wizard.request import plan_run
from engine.wizard.start import Created, create


class EventLines:
    """Events as they are in events.jsonl, on stdout."""

    def show(self, recorded: Recorded) -> None:
        sys.stdout.buffer.write(format_line(recorded))
        sys.stdout.buffer.flush()

    def close(self) -> None:
        sys.stdout.buffer.flush()


def _register_train(app: cyclopts.App, make_watch: Callable[[], Watch]) -> None:
    """Add the command; `make_watch` makes what shows a run that stays in the foreground."""

    @app.command
    def train(
        config: Annotated[Path, Parameter(help="YAML file with Axolotl's keys.")],
        /,
        *changes: Annotated[str, Parameter(help="Changes, such as learning_rate=1e-4.")],
        detach: Annotated[
            bool, Parameter(negative="", help="Start it and return; it outlives the terminal.")
        ] = False,
        max_steps: Annotated[
            int | None, Parameter(help="Stop after so many optimizer steps.")
        ] = None,
        anyway: Annotated[
            bool, Parameter(negative="", help="Start even where the estimate does not fit.")
        ] = False,
        as_json: AsJson = False,
        as_events: AsEvents = False,
        home: RunsFolder = None,
    ) -> int:
        """Train what a config says. Exit status 3: it does not fit this machine.

        With --max-steps 0 nothing is trained or loaded: config, plan and rows are checked.
        """
        if max_steps == 0:
            lines = try_dry(config, changes)
            print(json.dumps({"run": None, "dry_run": lines}) if as_json else "\n".join(lines))
            return 0
        if max_steps is not None:
            changes = (*changes, f"max_steps={max_steps}")
        plan = plan_run(config, changes, anyway=anyway)
        created = create(config, changes, home)
        run = created.run
        watch = None if detach else EventLines() if as_events else make_watch()
        status = start(created, watch, plan)
        if as_json:
            print(json.dumps({"run": str(run.path)}))
        elif not as_events:
            if not detach:
                print_lines(read_results(run))
            print_lines(state_lines(run))
        return status


def start(created: Created, watch: Watch | None, plan: Mapping[str, object] | None = None) -> int:
    """Launch a created run, detached where nobody watches; returns the exit status."""
    follower = Follower(created.run.events, from_end=True)
    process = launch(
        created.run,
        detach=watch is None,
        config=created.config,
        plan=plan,
        resume=created.resume,
        checkpoint=created.checkpoint,
    )
    return watch_to_end(created.run, process, follower, watch) if watch else 0

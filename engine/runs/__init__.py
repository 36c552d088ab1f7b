"""Run folders: where they live, who works in one, what happened, and how to ask for something.

A run is a folder and a process that may or may not be alive; this package is the only one that
tells which. It sits below everything that starts or shows a run, and holds nothing heavy, so that
the trainer, the commands and the wizard share one set of rules.

`folder` has the paths and finds runs by name; `lock` says whether a trainer lives, and takes a run
away; `summary` decides a run's status and follows its events; `history` adds them up to curves and
to a list of runs; `comparison` puts two side by side; `control` carries commands and signals to the
trainer. What a trainer does with them:

    control = ControlReader(run.control)
    with StopSignals() as signals, RunLock(run), EventWriter(run.events) as events:
        events.emit(Phase("load"))  # then Started, then at each step boundary:
        for command in control.read():
            events.emit(Ack(command.id, command.command, "done"))
        if signals.requested:
            ...  # save
        events.emit(Ended("stopped", step))  # always the last event, before the lock is given back

The lock is taken before anything heavy is imported: the launcher waits for it.
"""

from engine.runs.control import Command, ControlReader, Request, StopAsked, StopSignals, ask, send
from engine.runs.folder import RunFolder, create_run, find_run, list_runs, run_home
from engine.runs.lock import RunLock, is_locked
from engine.runs.summary import Follower, Status, Summary, follow, status, summarize

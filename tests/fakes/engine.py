"""A trainer without a model: `python -m tests.fakes.engine run FOLDER [--resume] [--from step-N]`.

It locks, tells, listens, saves and dies by the same code as the real one; only its steps are naps.
What it does is set in its environment: FAKE_STEPS, FAKE_STEP_SECONDS, FAKE_SAVE_SECONDS,
FAKE_LAST_WORDS (die with them and FAKE_EXIT_STATUS before the lock), FAKE_SILENT (never lock),
FAKE_FAILS_AT (a step), FAKE_LEAVES_A_WORKER (fork a child that outlives a kill), FAKE_REFUSES (a
command), FAKE_FORGETS (what is added to a loss after a resume), FAKE_FILE_SIZE (the largest file,
in bytes, that the system lets it write), FAKE_RANK_FAILS (a rank that ends with an error, while
the others wait). Of several ranks the first one naps, and the others wait for its end.
"""

import contextlib
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

from msgspec.structs import replace

from engine.errors import UserError
from engine.events import Ack, Ended, EventWriter, Phase, Saved, Started, Step
from engine.runs import ControlReader, Follower, RunFolder, RunLock, StopSignals
from engine.runs.rank import is_rank, is_restarted, join_ranks, rank_number, report_failure

STEPS = int(os.environ.get("FAKE_STEPS", 10**9))
STEP_SECONDS = float(os.environ.get("FAKE_STEP_SECONDS", 0.01))


def loss_at(step: int) -> float:
    """The loss of a step: whoever resumes right has the same one again."""
    return 2.0 * math.exp(-step / 500) + 0.5


def save(run: RunFolder, step: int) -> None:
    """A checkpoint that tells only its step, in the order that the real one has."""
    time.sleep(float(os.environ.get("FAKE_SAVE_SECONDS", 0)))
    (run.checkpoints / f"step-{step}").mkdir(parents=True, exist_ok=True)
    beside = run.checkpoints / ".LATEST"
    beside.write_text(f"step-{step}", "utf-8")
    beside.replace(run.checkpoints / "LATEST")


def first_step(run: RunFolder, arguments: list[str]) -> int:
    """The step to go on from."""
    if "--from" in arguments:
        name = arguments[arguments.index("--from") + 1]
    elif "--resume" in arguments and (run.checkpoints / "LATEST").exists():
        name = (run.checkpoints / "LATEST").read_text("utf-8")
    else:
        return 0
    return int(name.removeprefix("step-"))


def step_event(step: int) -> Step:
    return Step(
        step=step,
        epoch=step / 100,
        loss=loss_at(step),
        learned_tokens=40,
        tokens=100,
        lr=2e-4,
        grad_norm=1.0,
        seconds=STEP_SECONDS,
        tokens_per_second=100 / max(STEP_SECONDS, 1e-9),
        peak_memory_bytes=1 << 20,
        total_steps=STEPS,
    )


def obey(
    run: RunFolder, control: ControlReader, events: EventWriter, step: int, paused: bool
) -> tuple[bool, bool]:
    """Act on the commands that came; whether it is paused and whether it shall stop."""
    stopping = False
    for command in control.read():
        if command.command == os.environ.get("FAKE_REFUSES"):
            events.emit(Ack(command.id, command.command, "refused"))
            continue
        if command.command == "save":
            save(run, step)
            events.emit(Phase("save"))
            events.emit(Saved(step, f"checkpoints/step-{step}"))
        stopping = stopping or command.command == "stop"
        paused = {"pause": True, "resume": False}.get(command.command, paused)
        events.emit(Ack(command.id, command.command, "done"))
    return paused, stopping


def train(
    run: RunFolder, arguments: list[str], control: ControlReader, signals: StopSignals
) -> None:
    """Nap through the steps until the end, a stop or a failure."""
    step, size = first_step(run, arguments), int(os.environ.get("WORLD_SIZE", 1))
    with EventWriter(run.events) as events:
        signals.leaving = lambda: events.emit(Ended("stopped", step))
        events.emit(Phase("load"))
        events.emit(Started(run.name, "fake", "lora", ("cpu",), size, STEPS, 8))
        paused = stopping = False
        while step < STEPS and not stopping:
            paused, stopping = obey(run, control, events, step, paused)
            stopping = stopping or signals.requested
            if paused or stopping:
                time.sleep(0.005)
                continue
            time.sleep(STEP_SECONDS)
            step += 1
            made = step_event(step)
            if "--resume" in arguments:
                made = replace(made, loss=made.loss + float(os.environ.get("FAKE_FORGETS", 0)))
            events.emit(made)
            if step == int(os.environ.get("FAKE_FAILS_AT", -1)):
                events.emit(Ended("failed", step, "The loss is NaN.", "It diverged.", "Lower lr."))
                sys.exit(1)
        save(run, step)
        events.emit(Saved(step, f"checkpoints/step-{step}"))
        events.emit(Ended("stopped" if stopping else "finished", step))


def wait_for_first(run: RunFolder) -> None:
    """What every rank but the first does: it obeys no signal of its own, and fails if told to."""
    ended = Follower(run.events, from_end=True)
    print(f"rank {rank_number()} of {os.environ['WORLD_SIZE']} is here", flush=True)
    while not any(isinstance(each.event, Ended) for each in ended.read()):
        time.sleep(0.01)
        if rank_number() == int(os.environ.get("FAKE_RANK_FAILS", 0)) and not is_restarted():
            error = UserError("The row is bad.", "It has no end.", "Mend it.", exit_status=1)
            report_failure(error, error)
            sys.exit(1)


def main(arguments: list[str]) -> None:
    if words := os.environ.get("FAKE_LAST_WORDS"):
        print(words, file=sys.stderr)
        sys.exit(int(os.environ.get("FAKE_EXIT_STATUS", 1)))
    if "FAKE_SILENT" in os.environ:
        time.sleep(60)
    if size := os.environ.get("FAKE_FILE_SIZE"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    run = RunFolder(Path(arguments[1]))
    lock = contextlib.nullcontext() if is_rank() else RunLock(run)
    if is_rank():
        join_ranks(run)
    if is_restarted():
        arguments = [*arguments, "--resume"]
    try:
        control = ControlReader(run.control)
        with StopSignals() as signals, lock:
            if rank_number():
                wait_for_first(run)
                return
            if "FAKE_LEAVES_A_WORKER" in os.environ and os.fork() == 0:
                os.close(2)  # or whoever reads what the trainer prints would wait for the worker
                signal.alarm(20)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.pause()
                os._exit(0)
            train(run, arguments, control, signals)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main(sys.argv[1:])

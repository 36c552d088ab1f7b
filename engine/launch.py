"""Starts the trainer as a process of its own, and knows whether it began.

The trainer is started by module name and never imported: the caller stays light, and a run that is
detached outlives the terminal and the wizard. It stands above `runs`, which knows folders, and
below the commands.
"""

import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from engine.child import TRAINER, child_environment, last_lines
from engine.errors import UserError, WorkError
from engine.events import Ack
from engine.files import PRIVATE, write_whole
from engine.hardware import Machine, cuda_environment, read_machine, torch_problem
from engine.runs.control import ask, post
from engine.runs.folder import RunFolder, list_checkpoints
from engine.runs.lock import LAUNCH_VARIABLE, in_use, is_locked, read_claim
from engine.runs.summary import Status, status
from engine.visible import visible

if TYPE_CHECKING:
    from engine.config import RunConfig

_GRACE_SECONDS: Final = 5.0
_GATHERING_SECONDS: Final = 600.0
"""That torch gives the computers of a run to find each other."""
_POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Nodes:
    """The computers of a run, on each of which the same command is started."""

    count: int = 1
    rendezvous: str = ""
    """HOST:PORT of one of them, at which they find each other."""


ALONE: Final = Nodes()


def find_nodes(count: int, rendezvous: str, *, verify: bool = False) -> Nodes:
    """The computers that are asked for in words. Raises UserError where they could not meet."""
    if count == 1 and not rendezvous:
        return ALONE
    fix = "Write --nodes 2 --rendezvous HOST:29500, with the name of the first, on each of them."
    if count < 2:
        raise UserError(f"--nodes is {count}.", "A rendezvous is of two computers or more.", fix)
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal():
        shown = visible(rendezvous, one_line=True) or "empty"
        raise UserError(f"--rendezvous is {shown}.", "Computers meet at a host and a port.", fix)
    if verify:
        raise UserError(
            f"--verify-resume is for one computer, and --nodes is {count}.",
            "It starts, kills and resumes a run where it is.",
            "Leave --nodes out, with a dp_shard_size that one computer has.",
        )
    return Nodes(count, rendezvous)


@dataclass(frozen=True, slots=True)
class Resumed:
    """What it took to go on: exactly one of the two is set."""

    ack: Ack | None = None
    """The run was paused: its answer to `resume`."""
    process: "subprocess.Popen[bytes] | None" = None
    """The run was dead: its trainer, which has taken the lock."""


def launch(
    run: RunFolder,
    *,
    detach: bool,
    config: str | None = None,
    plan: Mapping[str, object] | None = None,
    resume: bool = False,
    checkpoint: str | None = None,
    environment: Mapping[str, str] | None = None,
    module: str = TRAINER,
    nodes: Nodes = ALONE,
    timeout_seconds: float = 120.0,
) -> "subprocess.Popen[bytes]":
    """Start the trainer of a run and wait until it holds the run's lock.

    `config` is the text of config.yml and `plan` the content of plan.json; None leaves what is
    there, and a config that differs from it is kept beside as config-1.yml. The trainer sees the
    GPUs that the plan names, and is called with `run FOLDER`, then `--resume` and `--from step-N`
    where asked for; a config for several starts our supervisor, which calls it so once each.
    `environment` is added to ours. Detached, the trainer leads a session of its own; otherwise it
    stays in our process group, and what kills the group kills it. Either way its output goes to
    engine.log.

    Raises UserError where the run is already running, where this computer has not the cards that
    the config is for, and where the trainer leaves with exit status 2 or 3 before it took the lock;
    WorkError with the end of engine.log where it dies otherwise before that, or has not taken the
    lock in `timeout_seconds`, of `nodes` after ten minutes more (it is then ended).
    """
    if is_locked(run):
        raise in_use(run)
    token = uuid.uuid4().hex
    before = read_claim(run)
    added = {**(environment or {}), LAUNCH_VARIABLE: token}
    try:
        _fill(run, config, plan)
        command, cards = _command(run, nodes, module)
        command += ["--resume"] if resume or checkpoint else []
        command += ["--from", checkpoint] if checkpoint else []
        log_start = run.log.stat().st_size if run.log.exists() else 0
        process = _start(command, run.log, child_environment({**cards, **added}), detach)
    except OSError as error:
        raise WorkError(
            f"The run {visible(run.name, one_line=True)} could not be started.",
            f"The system says: {error}.",
            f"See that {visible(str(run.path), one_line=True)} can be written and has space.",
        ) from error

    def has_begun() -> bool:
        claim = read_claim(run)  # another computer's, where the first rank is there
        return claim.launch == token or (nodes.count > 1 and claim != before)

    timeout_seconds += _GATHERING_SECONDS if nodes.count > 1 else 0
    try:
        _wait_for_lock(run, process, has_begun, timeout_seconds, log_start)
    except BaseException:  # an interrupt here must not leave a trainer that nobody knows of
        _end(process)
        raise
    return process


def resume_run(
    run: RunFolder,
    *,
    checkpoint: str | None = None,
    changes: Sequence[str] = (),
    detach: bool = True,
    environment: Mapping[str, str] | None = None,
    module: str = TRAINER,
    timeout_seconds: float = 120.0,
) -> Resumed:
    """Go on with a run: a paused one is sent `resume`, a dead one is started again.

    `changes` of its config, as `change_config` takes them, are for a dead one.

    A dead one goes on from its last checkpoint, or from `checkpoint` (a name in checkpoints/); one
    that was never started begins. Waits for the answer or for the lock. Raises UserError where
    there is nothing to resume, and what `ask` and `launch` raise.
    """
    word = status(run)
    if word == "paused" and checkpoint is None and not changes:
        return Resumed(ack=ask(run, "resume", timeout_seconds=timeout_seconds))
    _require_resumable(run, word, checkpoint)
    if changes:
        change_config(run, changes)
    process = launch(
        run,
        detach=detach,
        resume=word != "waiting",
        checkpoint=checkpoint,
        environment=environment,
        module=module,
        timeout_seconds=timeout_seconds,
    )
    return Resumed(process=process)


@contextmanager
def forwarded_signals(run: RunFolder, process: "subprocess.Popen[bytes]") -> Iterator[list[str]]:
    """While a trainer runs in the foreground: SIGTERM and SIGINT go to it and not to us.

    The trainer saves and ends, or leaves at once at the second; it takes a signal that its process
    group also got from the keyboard for one. SIGUSR1, by which Slurm warns of a job's time limit,
    is written down as `stop`: a command reaches all ranks at the same step, and torchrun would die
    of the signal. Yields the names of the signals that came.
    """
    received: list[str] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        process.send_signal(number)

    def stop(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        with suppress(WorkError):  # a full disk: the run goes on to the limit
            post(run, "stop")

    before = {each: signal.signal(each, forward) for each in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, stop)
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _require_resumable(run: RunFolder, word: Status, checkpoint: str | None) -> None:
    shown = visible(run.name, one_line=True)
    if word in ("running", "paused"):
        if checkpoint is None:
            why, fix = "There is no pause to lift and nothing to restart.", "Let it run."
        else:
            why = "Only a run that has ended can go back to a checkpoint."
            fix = f"Stop it first: windtunnel stop {shown}"
        raise UserError(f"The run {shown} is {word}.", why, fix)
    if checkpoint is not None:
        _require_checkpoint(run, checkpoint)
    elif word == "finished":
        raise UserError(
            f"The run {shown} has finished.",
            "All of its steps are done.",
            f"Go back with `windtunnel resume {shown} --from step-N`, or start another run.",
        )


def _require_checkpoint(run: RunFolder, checkpoint: str) -> None:
    there = list_checkpoints(run.checkpoints)
    if checkpoint not in there:
        shown = visible(run.name, one_line=True)
        raise UserError(
            f"The run {shown} has no checkpoint {visible(checkpoint, one_line=True)!r}.",
            f"It has {', '.join(there)}." if there else "It has saved none.",
            f"{'Name one of these, or leave' if there else 'Leave'} --from out:"
            f" windtunnel resume {shown}",
        )


def _fill(run: RunFolder, config: str | None, plan: Mapping[str, object] | None) -> None:
    run.path.mkdir(PRIVATE, parents=True, exist_ok=True)
    if config is not None:
        _keep_other(run.config, config)
        write_whole(run.config, config.encode())
    if plan is not None:
        write_whole(run.plan, json.dumps(plan, indent=2).encode() + b"\n")


def change_config(run: RunFolder, changes: Sequence[str]) -> None:
    """Change values of a run's config.yml that alter no step to come; the old file stays beside it.

    For another number of ranks gradient_accumulation_steps follows, unless it is among `changes`.
    Raises UserError for a `key=value` that cannot be read, for a key that would make another run of
    it, and for ranks that cannot share a step's rows.
    """
    # Here and not above: whoever only starts or watches a run stays without pydantic.
    from engine.config import override, read_config, write_config
    from engine.plan import SAME_RESULT
    from engine.plan.layout import RESIZED

    given, may_change = read_config(run.config), SAME_RESULT | RESIZED
    for change in changes:
        key = change.partition("=")[0]
        if key not in may_change | {"auto_fit"}:
            raise UserError(
                f"{visible(key, one_line=True)} cannot change while a run goes on.",
                "The steps to come would no longer be those of the run that was begun.",
                f"What can change: {', '.join(sorted(may_change))}; or start a new run.",
            )
    config = override(given.config, (*changes, *_same_rows(given.config, changes)))
    text = write_config(config, document=given.document)
    _keep_other(run.config, text)
    write_whole(run.config, text.encode())


def _same_rows(before: "RunConfig", changes: Sequence[str]) -> list[str]:
    """What has to change with the number of ranks, so that each step learns the same rows."""
    from engine.config import override
    from engine.plan.layout import RESIZED, layout_of

    keys = {change.partition("=")[0] for change in changes}
    if not keys & RESIZED or keys & {"gradient_accumulation_steps", "micro_batch_size"}:
        return []
    old, new = layout_of(before), layout_of(override(before, changes))
    if old is None or new is None:  # as many as there are cards
        return []
    micros = before.gradient_accumulation_steps * old.readers
    sums, rest = divmod(micros, new.readers)
    if rest:
        raise UserError(
            f"{new.readers} ranks cannot share the {micros} micro-batches of an optimizer step.",
            "A run that goes on learns the same rows in each step, on any number of ranks.",
            f"Choose a number of ranks that divides {micros}, or change micro_batch_size and"
            " gradient_accumulation_steps with it, for as many sequences a step.",
        )
    return [f"gradient_accumulation_steps={sums}"]


def _keep_other(path: Path, text: str) -> None:
    """Put a file with other content aside under the first free number."""
    if not path.exists() or path.read_bytes() == text.encode():
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    write_whole(kept, path.read_bytes())


def _command(run: RunFolder, nodes: Nodes, module: str) -> tuple[list[str], dict[str, str]]:
    # Here and not above: whoever only watches a run stays without pydantic.
    from engine.config import read_config
    from engine.plan.crew import crew_of

    machine = read_machine()
    require_planned(run, machine)
    start = [sys.executable, "-m"]
    one = [*start, module, "run", str(run.path)], planned_gpu(run, machine)
    try:
        config = read_config(run.config).config
    except UserError:  # the trainer says what is wrong with it
        return one
    crew = crew_of(config, machine, nodes.count, planned_cards(run))
    if crew.count == nodes.count == 1:
        return one
    command = [*start, TRAINER, "ranks", str(run.path), "--module", module]
    command += ["--count", str(crew.count), "--max-restarts", str(config.max_restarts)]
    if nodes.count > 1:
        command += ["--nodes", str(nodes.count), "--rendezvous", nodes.rendezvous]
    return command, cuda_environment(crew.gpus)


def planned_gpu(run: RunFolder, machine: Machine) -> dict[str, str]:
    """What makes CUDA show the trainer the card that plan.json names, and no other.

    By UUID: CUDA's own order need not be the driver's. Empty where the plan names none, and where
    that card is not here, as when a run goes on on another computer.
    """
    first = planned_cards(run)[:1]
    here = [gpu for gpu in machine.gpus if gpu.uuid in first and gpu.state == "ready"]
    return cuda_environment(here) if here else {}


def planned_cards(run: RunFolder) -> tuple[str, ...]:
    """UUIDs of the cards that plan.json is for, the first rank's first; none where it has none."""
    found = _planned(run).get("devices") or [planned_device(run)]
    named = (each.get("uuid") for each in found if isinstance(each, dict))
    return tuple(uuid for uuid in named if isinstance(uuid, str))


def planned_device(run: RunFolder) -> Mapping[str, Any]:
    """The device in plan.json, of several the first; empty where there is none."""
    found = _planned(run).get("device")
    return found if isinstance(found, dict) else {}


def _planned(run: RunFolder) -> Mapping[str, Any]:
    try:
        found = json.loads(run.plan.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def require_planned(run: RunFolder, machine: Machine) -> None:
    """Raises UserError with the cure where a run that is planned for a card would miss it.

    PyTorch would train it on the processor without a word. Another usable card than the planned one
    will do: a run may go on on another computer. Without a plan, as for a model that has to be
    fetched first, it is the card that is here.
    """
    planned = planned_device(run)
    if planned.get("kind") == "cpu":
        return
    if planned and not machine.usable_gpus:
        errors = [problem.what for problem in machine.problems if problem.severity == "error"]
        raise without_its_card(planned, " ".join(errors[:1]))
    ready = [gpu for gpu in machine.gpus if gpu.state == "ready"]
    here = [gpu for gpu in ready if gpu.uuid == planned.get("uuid")]
    for gpu in here or machine.usable_gpus[:1]:
        require_torch(machine, gpu.uuid)


def require_torch(machine: Machine, uuid: str | None) -> None:
    """Raises UserError with the cure where the installed torch cannot use the card of this UUID."""
    for gpu in machine.gpus:
        if gpu.uuid == uuid and (problem := torch_problem(machine, gpu)):
            raise UserError(problem.what, problem.why, problem.cure)


def without_its_card(planned: Mapping[str, Any], why: str = "") -> UserError:
    """A run that is planned for a card and finds none that it can use."""
    name = visible(str(planned.get("name") or "a GPU"), one_line=True)
    return UserError(
        f"The run is planned for {name}, and no GPU can be used here.",
        why or "On the processor it would be another run: far slower, and in another precision.",
        "`windtunnel doctor` says what is missing. To train on the processor, start a new run with"
        " CUDA_VISIBLE_DEVICES set to nothing.",
    )


def _start(
    arguments: list[str], log: Path, environment: Mapping[str, str], detach: bool
) -> "subprocess.Popen[bytes]":
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=detach,
        )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for_lock(
    run: RunFolder,
    process: "subprocess.Popen[bytes]",
    has_begun: Callable[[], bool],
    timeout_seconds: float,
    log_start: int,
) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        ended = process.poll()  # asked first: a trainer that took the lock and ended has signed it
        if has_begun():
            return
        if ended is not None:
            raise _early_death(run, ended, _last_lines(run, log_start))
        if time.monotonic() > deadline:
            raise WorkError(
                f"The trainer has not begun for {timeout_seconds:.0f} seconds and was ended.",
                _last_lines(run, log_start),
                f"Read {visible(str(run.log), one_line=True)}, then start again.",
            )
        time.sleep(_POLL_SECONDS)


def _early_death(run: RunFolder, exit_status: int, said: str) -> UserError:
    how = f"signal {-exit_status}" if exit_status < 0 else f"exit status {exit_status}"
    what = f"The trainer ended before it began ({how})."
    fix = f"All that it printed is in {visible(str(run.log), one_line=True)}."
    if exit_status in (2, 3):
        return UserError(what, said, fix, exit_status=exit_status)
    return WorkError(what, said, fix)


def _last_lines(run: RunFolder, start: int) -> str:
    with run.log.open("rb") as log:
        lines = last_lines(log, start)
    return "Its last words: " + " / ".join(lines) if lines else "It printed nothing."

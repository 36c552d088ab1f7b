"""Several processes as one run: this one holds the lock and starts them by torch's elastic agent.

The agent decides which rank is who and gathers the computers of a run; what it leaves open is
decided here: a rank that dies ends the others within seconds and not after a collective's timeout,
a signal asks the ranks to save and never ends the agent, and the failure that came first is the one
that the run ends with. No rank outlives this process: see `join_ranks`.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from engine.child import last_lines
from engine.errors import UserError, WorkError
from engine.events import Ended, EventWriter, Note, Shortage
from engine.runs import RunFolder, RunLock, StopSignals, is_locked, send, summarize
from engine.runs.rank import SUPERVISOR_VARIABLE, Failure, print_into, read_failure
from engine.train.out_of_memory import take_rung
from engine.visible import visible

_POLL_SECONDS: Final = 0.1
_GRACE_SECONDS: Final = 2.0
"""For a rank whose peer died, to say what it lost; then it is killed, as it may wait for ever."""
_SHARED_SECONDS: Final = 30.0
"""Until a lock that another computer took has to be seen through a network's disk."""
_LATE_SECONDS: Final = 30.0
_TOLD_SECONDS: Final = 1.0
"""Until the other computers have read of a failure."""


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks of a run: `count` on this computer and on each of `nodes`."""

    count: int
    nodes: int = 1
    rendezvous: str = ""
    """HOST:PORT at which several computers find each other."""
    max_restarts: int = 0


class _Stopped(BaseException):
    """A signal came before there was a rank to pass it on to."""


def supervise(
    run: RunFolder,
    team: Team,
    command: Sequence[str],
    signals: StopSignals,
    held: contextlib.ExitStack,
) -> int:
    """Start `command` once for each rank and stay until all have ended; returns the exit status.

    `held` has the run's lock, where the run is on one computer; of several, the first rank's takes
    it. Raises WorkError where they do not share the folder.
    """
    os.environ[SUPERVISOR_VARIABLE] = str(os.getpid())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are `signals`'
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // team.count)))
    # It would say in a rank's log that the rank has failed, as the rank's last words.
    logging.getLogger(SubprocessContext.__module__).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="windtunnel-ranks-") as scratch:
        return Agent(run, team, command, scratch, signals, held).carry_out()


class Agent(LocalElasticAgent):
    """The elastic agent of one computer."""

    _pcontext: SubprocessContext | None

    def __init__(
        self,
        run: RunFolder,
        team: Team,
        command: Sequence[str],
        scratch: str,
        signals: StopSignals,
        held: contextlib.ExitStack,
    ) -> None:
        host = "localhost" if team.nodes == 1 else None
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=team.rendezvous or "localhost:0",
            run_id=_meeting(run) if team.rendezvous else uuid.uuid4().hex,
            min_nodes=team.nodes,
            max_nodes=team.nodes,
            local_addr=host,
        )
        spec = WorkerSpec(
            role="rank",
            local_world_size=team.count,
            entrypoint=command[0],
            args=tuple(command[1:]),
            rdzv_handler=get_rendezvous_handler(parameters),
            max_restarts=team.max_restarts,
            monitor_interval=_POLL_SECONDS,
            local_addr=host,
        )
        logs = DefaultLogsSpecs(log_dir=scratch)
        super().__init__(spec, logs, shutdown_timeout=int(_GRACE_SECONDS))
        self._run, self._team, self._signals, self._held = run, team, signals, held
        self._log_starts: dict[int, int] = {}
        self._failure: Failure | None = None
        self._done = False
        """Whether the first rank is here and has ended as it should, with the run's last event."""
        self._done_at = 0.0
        signals.arrived, signals.leaving = self._ask_to_stop, self._leave

    def carry_out(self) -> int:
        """Run the ranks to their end; writes the end of a run that failed or was stopped early."""
        handler = self._worker_group.spec.rdzv_handler
        try:
            if self._signals.requested:
                raise _Stopped
            result = self.run()
            failed = result is None or result.is_failed()
        except _Stopped:
            failed = True
        except (RendezvousError, DistError) as error:
            self._failure = _not_met(self._team, error)
            failed = True
        finally:
            handler.shutdown()
        if not failed:
            return 0
        return self._end()

    def _end(self) -> int:
        failure = self._failure
        if failure is None and self._done:
            return 0
        if failure is None:
            self._emit(Ended("stopped", summarize(self._run).step))
            return 0
        step = summarize(self._run).step
        self._emit(Ended("failed", step, failure.what, failure.why, failure.fix))
        print(f"{failure.what} {failure.why} {failure.fix}", file=sys.stderr)
        return failure.exit_status

    @property
    def _leads(self) -> bool:
        """Whether the first rank is on this computer, and with it the run's lock."""
        return self._team.nodes == 1 or self._worker_group.group_rank == 0

    def _emit(self, event: Ended | Note | Shortage) -> None:
        """Write an event; only while no rank lives, since the first one writes there too."""
        if self._leads:
            with EventWriter(self._run.events) as events:
                events.emit(event)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        if self._team.nodes > 1:
            self._take_lock(worker_group)
        for each in worker_group.workers:
            log = self._run.rank_log(each.global_rank)
            self._log_starts[each.global_rank] = log.stat().st_size if log.exists() else 0

    def _take_lock(self, worker_group: WorkerGroup) -> None:
        """On the first rank's computer; the others see that it is held: they share the folder."""
        computer: Any = worker_group.group_rank
        if computer == 0:
            if not is_locked(self._run):
                self._held.enter_context(RunLock(self._run))
            return
        print_into(self._run.rank_log(worker_group.workers[0].global_rank))
        deadline = time.monotonic() + _SHARED_SECONDS
        while not is_locked(self._run):
            if time.monotonic() > deadline:
                raise WorkError(
                    "The computers of this run do not share its folder.",
                    f"{visible(str(self._run.path), one_line=True)} is not locked here, though the"
                    " first rank's computer has locked its own.",
                    "Set output_dir to a folder on a disk that all of them see.",
                )
            time.sleep(_POLL_SECONDS)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        if self._signals.requested:  # it came while there was nobody to pass it on to
            self._ask_to_stop()
        return started

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if self._failure:
            most = self._team.max_restarts
            done = most - self._remaining_restarts
            again = f"restart {done} of {most}, from the last checkpoint"
            self._emit(Note("warning", f"{self._failure.what} {self._failure.why} Now: {again}."))
        self._failure = None
        super()._restart_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        told = self._told()
        left = self._left()
        self._done = self._leads and left.get(0) == 0
        if told is None and not any(left.values()) and not (self._done and self._is_late()):
            watched: RunResult = super()._monitor_workers(worker_group)
            return watched
        deadline = time.monotonic() + _GRACE_SECONDS
        while len(left := self._left()) < self._team.count and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self._kill()
        result: RunResult = super()._monitor_workers(worker_group)
        by_rank = {worker_group.workers[each].global_rank: how for each, how in left.items()}
        self._failure = told or self._first(result, by_rank)
        if told is None and self._failure and self._team.nodes > 1:
            self._tell(self._failure)
        if self._failure is None or self._signals.requested or self._failure.exit_status != 1:
            self._remaining_restarts = 0
        elif self._failure.shortage:
            self._make_room(self._failure.shortage)
        return result

    def _make_room(self, facts: Shortage) -> None:
        """Say that memory ran out on a rank; where that is taken, let all begin anew with what
        makes room, whatever restarts are left."""
        self._emit(facts)
        if facts.taken:
            if self._leads:
                self._emit(Note("warning", take_rung(facts, self._run)))
            self._failure = None
            self._worker_group.spec.max_restarts += 1
            self._remaining_restarts += 1

    def _is_late(self) -> bool:
        """Whether the others still live long after the first rank, which ends last, has ended."""
        self._done_at = self._done_at or time.monotonic()
        return time.monotonic() - self._done_at > _LATE_SECONDS

    def _handlers(self) -> Mapping[int, SubprocessHandler]:
        """The processes of this computer's ranks, by their local numbers."""
        return self._pcontext.subprocess_handlers if self._pcontext else {}

    def _left(self) -> dict[int, int]:
        """The ranks of this computer that ended, by their local numbers, with their exit status."""
        polled = {local: handler.proc.poll() for local, handler in self._handlers().items()}
        return {local: status for local, status in polled.items() if status is not None}

    def _first(self, result: RunResult, left: Mapping[int, int]) -> Failure | None:
        """The failure that the others follow from; None where a stop came before a rank began."""
        failed = {rank: status for rank, status in left.items() if status}
        if self._signals.requested and set(failed.values()) == {-signal.SIGTERM}:
            return None
        found: list[tuple[tuple[bool, bool, int], Failure]] = []
        for rank, status in sorted(failed.items()):
            reported = result.failures[rank]
            failure = read_failure(reported.error_file_data) or self._silent(rank, status)
            found.append(((failure.lost_peer, status > 0, reported.timestamp), failure))
        first = min(found, key=lambda each: each[0], default=None)
        return None if first is None or (self._done and first[1].lost_peer) else first[1]

    def _silent(self, rank: int, status: int) -> Failure:
        """What is known of a rank that left no sentence."""
        size = self._worker_group.workers[0].world_size
        log = self._run.rank_log(rank)
        lines: Sequence[str] = ()
        with contextlib.suppress(FileNotFoundError), log.open("rb") as printed:  # it died at once
            lines = last_lines(printed, self._log_starts.get(rank, 0))
        said = "Its last words: " + " / ".join(lines) if lines else "It printed nothing"
        how = "left without a word"
        if status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        memory = ", as the system does where memory runs out" if status == -signal.SIGKILL else ""
        shown = visible(str(self._run.path), one_line=True)
        return Failure(
            f"Rank {rank} of {size} {how}{memory}.",
            f"{said}.",
            f"Read {visible(str(log), one_line=True)}, then go on: windtunnel resume {shown}",
        )

    def _failed_key(self) -> str:
        begun = self._worker_group.spec.max_restarts - self._remaining_restarts
        return f"windtunnel/failed/{begun}"

    def _tell(self, failure: Failure) -> None:
        """Let the other computers know: their ranks may wait for ours without end."""
        store: Any = self._worker_group.store
        with contextlib.suppress(DistError):
            store.set(self._failed_key(), msgspec.json.encode(failure).decode())
        time.sleep(_TOLD_SECONDS)  # the store may be this process's own

    def _told(self) -> Failure | None:
        """What another computer told, where there are others."""
        store: Any = self._worker_group.store
        if self._team.nodes == 1 or store is None or not store.check([self._failed_key()]):
            return None
        return msgspec.json.decode(store.get(self._failed_key()), type=Failure)

    def _kill(self) -> None:
        for handler in self._handlers().values():
            if handler.proc.poll() is None:
                handler.close(signal.SIGKILL)
                handler.proc.wait()

    def _ask_to_stop(self) -> None:
        """Let the first rank save and end the run with all others; called from a signal handler."""
        if not self._handlers():
            raise _Stopped
        if not self._leads:
            with contextlib.suppress(UserError):
                send(self._run, "stop")
            return
        for handler in self._handlers().values():
            if handler.proc.poll() is None:
                handler.proc.send_signal(signal.SIGTERM)

    def _leave(self) -> None:
        """The second signal: nothing is saved."""
        self._kill()
        self._emit(Ended("stopped", summarize(self._run).step))


def _meeting(run: RunFolder) -> str:
    """What the computers of a run call their meeting: in a job of Slurm's, by its number and how
    often it was queued again, so that nobody joins that of another."""
    job, again = (os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "RESTART_COUNT"))
    return f"{run.name}-{job}-{again or 0}" if job else run.name


def _not_met(team: Team, error: Exception) -> Failure:
    """Why the computers of a run could not begin together, or lost each other."""
    if team.nodes == 1:
        what = "The processes of the run could not be brought together."
    else:
        what = f"The {team.nodes} computers of the run are not together at {team.rendezvous}."
    said = visible(str(error).partition("\n")[0] or type(error).__name__, one_line=True)
    return Failure(
        what,
        f"The system says: {said}.",
        "Start the same command on each of them within ten minutes, with the address of one that"
        " the others reach.",
    )

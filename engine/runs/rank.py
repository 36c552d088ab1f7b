"""One of several processes that train one run: under a supervisor, which holds the run's lock.

A rank takes no lock, and no failure of it is an event: which of several came first is only seen
from above. It dies with its supervisor, whatever kills that one.
"""

import ctypes
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from msgspec import convert, to_builtins

from engine.errors import UserError, WorkError
from engine.events import Shortage
from engine.files import write_whole
from engine.runs.folder import RunFolder

SUPERVISOR_VARIABLE: Final = "WINDTUNNEL_SUPERVISOR"
"""Environment variable with the process id of the supervisor; a rank is who finds it."""

_ERROR_FILE_VARIABLE: Final = "TORCHELASTIC_ERROR_FILE"
_DIE_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG of linux/prctl.h
# What torch's communication raises where another process of the group is gone.
_LOST_PEER_TYPES: Final = ("DistBackendError", "DistNetworkError", "DistStoreError")
_LOST_PEER_WORDS: Final = (
    "/gloo/transport",
    "closed by peer",
    "Connection reset",
    "Timed out waiting",
)


class LostPeer(WorkError):
    """A rank cannot go on since another one ended: that one knows why the run does."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank ended, and with it the run."""

    what: str
    why: str
    fix: str
    exit_status: int = 1
    lost_peer: bool = False
    """Whether it is the consequence of another rank's end."""
    shortage: Shortage | None = None
    """What is known where memory ran out, and what all ranks go on with."""


def is_rank() -> bool:
    """Whether this process is one of several of a run."""
    return SUPERVISOR_VARIABLE in os.environ


def rank_number() -> int:
    """This rank's number in the whole run; 0 also where it is the only process."""
    return int(os.environ["RANK"]) if is_rank() else 0


def is_restarted() -> bool:
    """Whether the ranks of this launch were started before, and one of them died."""
    return is_rank() and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"


def join_ranks(run: RunFolder) -> None:
    """Bind this rank to its supervisor, and what it prints to a log of its own.

    Leaves at once where the supervisor is gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != int(os.environ[SUPERVISOR_VARIABLE]):
        os._exit(1)
    if number := rank_number():
        print_into(run.rank_log(number))


def print_into(log: Path) -> None:
    """Let what this process prints from here on go to the end of `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for output in (1, 2):
        os.dup2(descriptor, output)
    os.close(descriptor)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error, of ours or of torch's, says that another rank is gone or late."""
    return (
        isinstance(error, LostPeer)
        or type(error).__name__ in _LOST_PEER_TYPES
        or any(words in str(error) for words in _LOST_PEER_WORDS)
    )


def report_failure(error: Exception, reason: UserError, shortage: Shortage | None = None) -> None:
    """Leave for the supervisor why this rank ends, in the file that torch's agent reads."""
    lost_peer = any(is_lost_peer(each) for each in (error, error.__cause__) if each)
    failure = Failure(reason.what, reason.why, reason.fix, reason.exit_status, lost_peer, shortage)
    message = {"message": reason.what, "extraInfo": {"timestamp": int(time.time())}}
    record = {"message": message, "failure": to_builtins(failure)}
    write_whole(Path(os.environ[_ERROR_FILE_VARIABLE]), json.dumps(record).encode())


def read_failure(record: Any) -> Failure | None:
    """What `report_failure` left; None where a rank ended without a word."""
    found = record.get("failure") if isinstance(record, dict) else None
    return convert(found, Failure) if found else None

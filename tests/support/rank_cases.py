"""What the ranks of a `RankGroup` do, each together with the others."""

import os
import signal
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import read_config
from engine.errors import UserError
from engine.events import Event, EventWriter, Step
from engine.runs import ControlReader, RunFolder, StopSignals
from engine.runs.control import post
from engine.runs.rank import is_lost_peer
from engine.train import run as run_module
from engine.train.batches import Rows
from engine.train.loop import Training
from engine.train.ranks import LONE, Ranks, seed_apart
from engine.train.session import Session
from engine.train.shard import local_bytes
from engine.train.slice_load import load_divided
from tests.support.pictured_rows import MIXED, write_pictured
from tests.support.tiny import (
    UNEVEN,
    bytes_of,
    open_session,
    row,
    settings,
    wake_adapter,
    write_rows,
)

ROWS: dict[str, Callable[[Path], Rows]] = {
    "uneven": lambda folder: write_rows(folder, UNEVEN),
    "many": lambda folder: write_rows(folder, [row(n % 19 + 1, n % 28 + 1, n) for n in range(64)]),
    "mixed": lambda folder: write_pictured(folder, MIXED),
}


def talk(ranks: Ranks) -> dict[str, Any]:
    """All that ranks tell each other."""
    own = torch.tensor([float(ranks.rank), 1.0])
    ranks.barrier()
    said: list[str] = []
    return {
        "sum": ranks.sum(own.clone()).tolist(),
        "max": ranks.max(own.clone()).tolist(),
        "of copy": ranks.sum_of_copy(own.clone()).tolist(),
        "first": ranks.from_first(own.clone()).tolist(),
        "gathered": ranks.gather({"rank": ranks.rank, "longer": "x" * ranks.rank}),
        "once": ranks.once_a_node("a test's rows", lambda: ranks.rank, said.append),
        "said": len(said),
    }


def laid_out(ranks: Ranks, shards: int | None, keys: dict[str, Any]) -> Ranks:
    """All of a group, as one copy of the model or several, and as keys spread experts."""
    shards = shards or ranks.world_size
    experts = keys.get("expert_parallel_size") or 1
    return ranks.laid_out(shards, ranks.world_size // shards, experts)


def learn(ranks: Ranks, shards: int | None = None, **run: Any) -> dict[str, Any]:
    """The figures of some steps, as each rank has them."""
    training = started(laid_out(ranks, shards, run["keys"]), **run)
    with Collectives() as collectives:
        found = figures(training, run["steps"])
    return found | {"collectives": dict(collectives.counts)}


class Collectives(TorchDispatchMode):
    """Counts the collectives inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.__name__.partition(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def started(
    ranks: Ranks = LONE, *, home: str, folder: str, keys: dict[str, Any], rows: str, **_: Any
) -> Training:
    """A run before step 1, its adapter awake, sharded as `ranks` are laid out."""
    config, base_folder = settings(folder, **keys), Path(folder)
    own = Path(home) / f"{ranks.rank} of {ranks.world_size}"
    base, model = load_divided(base_folder, config, ranks)
    wake_adapter(model)
    seed_apart(config.seed, ranks)
    session = Listening(open_session(own, ranks))
    session.base_folder = base_folder
    model.train()
    given = ROWS[rows](own / "rows")
    return Training(base, model, given, {}, config, session, tokenizer=None)  # type: ignore[arg-type]


class Listening(Session):
    """A session whose events are heard on every rank."""

    def __init__(self, session: Session) -> None:
        self.__dict__.update(session.__dict__)
        self.heard: list[Event] = []

    def emit(self, event: Event) -> None:
        """Keep one event."""
        self.heard.append(event)


def figures(run: Training, steps: int) -> dict[str, Any]:
    """Losses and gradient norms of a run's first steps, and the rows that this rank learned."""
    rows = []
    for number, batch in islice(run.order.steps(0), steps):
        run.step(number, batch)
        rows.append(list(batch.rows))
    assert isinstance(run.session, Listening)
    taken = [event for event in run.session.heard if isinstance(event, Step)]
    return {
        "losses": [event.loss for event in taken],
        "norms": [event.grad_norm for event in taken],
        "tokens": [(event.tokens, event.learned_tokens) for event in taken],
        "peaks": [event.rank_peak_bytes for event in taken],
        "slowest": [event.slowest_rank for event in taken],
        "imbalance": [event.imbalance for event in taken],
        "rows": rows,
        "trained": sum(zlib.crc32(bytes_of(p.detach())) for p in run.parameters),
    }


def told(ranks: Ranks) -> bool:
    """Whether this rank ends since another one did, where what is done once a node fails."""

    def fail() -> None:
        raise UserError("There are no rows.", "The file is empty.", "Name another.")

    try:
        ranks.once_a_node("a test's failure", fail, lambda text: None)
    except UserError as error:
        return is_lost_peer(error)
    raise AssertionError("nothing failed")


def carry_out(ranks: Ranks, folder: str, shards: int | None = None, resume: bool = False) -> None:
    """The whole run of a folder, as each of its processes does."""
    run = RunFolder(Path(folder))
    with EventWriter(run.events if ranks.is_first else Path(os.devnull)) as events:
        control = ControlReader(run.control)
        own = laid_out(ranks, shards, read_config(run.config).config.model_dump())
        session = Session(run, events, control, StopSignals(), ranks=own)
        run_module.run(session, resume=resume)


def asked(ranks: Ranks, folder: str) -> list[int]:
    """A run that is asked to save after step 2, by a command, and to stop after step 4, by a signal
    to the last rank alone; the steps that this rank took."""
    run, taken = RunFolder(Path(folder)), list[int]()

    class Asked(Session):
        def emit(self, event: Event) -> None:
            super().emit(event)
            if not isinstance(event, Step):
                return
            taken.append(event.step)
            if event.step == 2 and ranks.is_first:
                post(run, "save")
            if event.step == 4 and ranks.rank == ranks.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    path = run.events if ranks.is_first else Path(os.devnull)
    with EventWriter(path) as events, StopSignals() as signals:
        run_module.run(
            Asked(run, events, ControlReader(run.control), signals, ranks=ranks), resume=False
        )
    return taken


def held(ranks: Ranks, folder: str, keys: dict[str, Any]) -> dict[str, int]:
    """Bytes that each rank holds of a model, by part, once it is sharded."""
    ranks = laid_out(ranks, None, keys)
    return local_bytes(load_divided(Path(folder), settings(folder, **keys), ranks)[1])

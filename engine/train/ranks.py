"""The processes that train one model together, and what they tell each other.

torchrun starts one process a card and says in the environment which one each is. A process that
nobody started so is alone: it runs the same code, opens no process group and waits for nobody. What
is decided between steps goes over the CPU's backend, so that no card is waited for.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from engine.config import RunConfig
from engine.errors import UserError
from engine.plan.layout import Layout, layout_among
from engine.runs.rank import LostPeer, is_lost_peer
from engine.train.device import pick_device
from engine.units import counted
from engine.visible import first_line

TIMEOUT: Final = timedelta(minutes=30)
"""How long a rank waits for another inside a collective. The slowest load of a large model from a
shared disk passes between two of them."""
REPLICATE, SHARD, EXPERT = "replicate", "shard", "expert"
"""Dimensions of a mesh: copies of the model, the ranks that hold one copy together, and those of
them that have other experts."""
_APART: Final = 1_000_003
"""Between the seeds of two ranks: further than the seeds that people choose."""
_POLL_SECONDS: Final = 0.2
_SAID_EVERY_SECONDS: Final = 30.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """This process's place among those of the run. The defaults are a lone process's."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Its place among those of its node."""
    local_world_size: int = 1
    node: int = 0
    shards: int = 1
    """Ranks that hold one copy of the model together."""
    replicas: int = 1
    """Copies of the model that learn side by side."""
    mesh: DeviceMesh | None = None
    """(replicate, shard), all ranks; None for a lone process."""
    experts: int = 1
    """Parts of a layer's experts that different ranks of a copy have while they compute."""
    expert_mesh: DeviceMesh | None = None
    """(replicate, shard, expert), where experts are spread: ranks that exchange tokens follow each
    other, since they are on one computer then."""
    _store: Store | None = None

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return pick_device()

    @property
    def is_first(self) -> bool:
        """Whether this one speaks for all: events, commands, what is written once."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this one does what is done once a node."""
        return self.local_rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to wait for."""
        return self.world_size == 1

    @property
    def shard(self) -> int:
        """Its place among the ranks of its copy of the model."""
        return self.rank % self.shards

    def of_experts(self, rank: int) -> int:
        """The place of a rank's rows in a stack of experts that are spread: ranks of one part have
        rows that follow each other."""
        place, apart = rank % self.shards, self.shards // self.experts
        return place % self.experts * apart + place // self.experts

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a small tensor over all ranks, in place; lone: as it is."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The largest of each number over all ranks, in place."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum_of_copy(self, values: Tensor) -> Tensor:
        """The sum over the ranks that hold one copy of the model together, in place."""
        if self.mesh is not None and self.shards > 1:
            dist.all_reduce(values, group=self.mesh.get_group(SHARD))
        return values

    def sum_of_copies(self, values: Tensor) -> Tensor:
        """The sum over the ranks that have this one's place in their copies, in place."""
        if self.mesh is not None and self.replicas > 1:
            dist.all_reduce(values, group=self.mesh.get_group(REPLICATE))
        return values

    def from_first(self, values: Tensor) -> Tensor:
        """The first rank's numbers, in place: one decision that all obey."""
        if not self.is_alone:
            dist.broadcast(values, 0)
        return values

    def gather(self, value: Any) -> list[Any]:
        """A small JSON value of every rank, in rank order, on all of them."""
        if self.is_alone:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        longest = int(self.max(torch.tensor([len(own)])))
        padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
        rooms = [torch.empty_like(padded) for _ in range(self.world_size)]
        padded[: len(own)] = own
        dist.all_gather(rooms, padded)
        return [json.loads(room.numpy().tobytes()) for room in rooms]

    def barrier(self) -> None:
        """Wait until all have come here, at most `TIMEOUT`."""
        self.sum(torch.zeros(1))

    def once_a_node(self, what: str, work: Callable[[], T], say: Callable[[str], None]) -> T:
        """`work`, on a node's first rank before the others, which find it done; `say` hears of the
        waiting. It may take longer than `TIMEOUT`. Each `what` is for one use.

        Raises what `work` raises, and LostPeer on the others where it failed there.
        """
        if self._store is None or self.local_world_size == 1:
            return work()
        key = f"{what} on node {self.node}"
        if self.is_first_here:
            done = "failed"
            try:
                result = work()
                done = "done"
                return result
            finally:
                self._store.set(key, done)
        began, said = time.monotonic(), 0.0
        while not self._store.check([key]):
            waited = time.monotonic() - began
            if waited >= said:
                say(f"rank {self.rank} waits while this node's first one prepares {what}")
                said = waited + _SAID_EVERY_SECONDS
            time.sleep(_POLL_SECONDS)
        if self._store.get(key) != b"done":
            raise LostPeer(
                f"Rank {self.rank} has nothing to train on.",
                f"This node's first rank could not prepare {what}.",
                "Its own message says why; mend that and start again.",
            )
        return work()

    def laid_out(self, shards: int, replicas: int, experts: int = 1) -> "Ranks":
        """The same processes as `replicas` copies of `shards` ranks each, a copy's experts in so
        many parts; all call it together."""
        kind, names = self.device.type, (REPLICATE, SHARD, EXPERT)
        mesh = init_device_mesh(kind, (replicas, shards), mesh_dim_names=names[:2])
        found = replace(self, shards=shards, replicas=replicas, experts=experts, mesh=mesh)
        if experts == 1:
            return found
        sizes = replicas, shards // experts, experts
        spread = init_device_mesh(kind, sizes, mesh_dim_names=names)
        return replace(found, expert_mesh=spread)

    def close(self) -> None:
        """Leave the process group."""
        if not self.is_alone:
            dist.destroy_process_group()

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if not self.is_alone:
            dist.all_reduce(values, operation)
        return values


LONE: Final = Ranks()


def open_ranks(config: RunConfig) -> Ranks:
    """Join the process group that torchrun's environment names; a lone process where it names none.

    NCCL between cards, gloo between processes on a CPU and for decisions. Raises UserError where
    the config's sizes do not make the number of processes, or ask for what is not built.
    """
    refuse_unbuilt(config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = require_started(config, world_size)
    if world_size == 1:
        return Ranks()
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shared, rank, _ = next(rendezvous("env://", timeout=TIMEOUT))
    # The supervisor's store outlives ranks that are started again (torch 2.13), and has in it where
    # those before them listened and what they had done.
    store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), shared)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    ranks = Ranks(
        rank,
        world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        node=int(os.environ.get("GROUP_RANK", "0")),
        _store=PrefixStore("windtunnel", store),
    )
    return ranks.laid_out(layout.shard, layout.replicate, layout.expert)


def require_started(config: RunConfig, world_size: int) -> Layout:
    """How the processes that were started share the run. Raises UserError where the config is for
    another number of them."""
    found = layout_among(config, world_size)
    if found.cards != world_size:
        raise UserError(
            f"The config is for {counted(found.cards, 'rank')}, and {world_size} started.",
            f"dp_shard_size {found.shard} times dp_replicate_size {found.replicate} is the number "
            "of ranks, one process a GPU each.",
            f"Start {found.cards}, or write dp_shard_size: {world_size} and remove "
            "dp_replicate_size.",
        )
    return found


def refuse_unbuilt(config: RunConfig) -> None:
    """Raises UserError for ways of sharing a model that this trainer does not have."""
    if (config.tensor_parallel_size or 1) > 1:
        raise UserError(
            f"tensor_parallel_size: {config.tensor_parallel_size} cannot be trained.",
            "This trainer shards whole layers over GPUs (FSDP2), not each matrix of a layer while "
            "it computes.",
            "Remove it and write its number as dp_shard_size, times the one there.",
        )


def seed_apart(seed: int, ranks: Ranks) -> None:
    """Let each rank draw random numbers of its own from here on, such as for dropout; the first
    one's go on as if it were alone."""
    if not ranks.is_first:
        torch.manual_seed(seed + _APART * ranks.rank)


def lost_rank(error: BaseException) -> LostPeer | None:
    """The sentences for a collective that failed since another rank is gone or late; else None."""
    if isinstance(error, UserError) or not is_lost_peer(error):
        return None
    return LostPeer(
        "Another process of this run is gone, or did not answer in "
        f"{TIMEOUT.total_seconds() / 60:.0f} minutes.",
        f"The system says: {first_line(error)[:200]}.",
        "The logs of the other ranks say why; the run resumes from its last checkpoint.",
    )

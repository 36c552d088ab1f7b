"""Ranks that save together, and what is in their checkpoints whoever wrote them."""

import os
import signal
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from engine.config import RunConfig
from engine.errors import WorkError
from engine.events import Step
from engine.runs import RunFolder
from engine.train.checkpoint import Checkpoints, export_trained, trained_parameters
from engine.train.forward import Model
from engine.train.moments import OPTIMIZER, optimizer_slices
from engine.train.optim import build_optimizer
from engine.train.ranks import SHARD, Ranks
from engine.train.seal import Position
from engine.train.shard import local_parameters
from engine.train.slice_load import load_divided
from engine.train.slices import Whole, list_wholes, slice_of, write_slices
from tests.support.rank_cases import Listening, laid_out, started
from tests.support.tiny import files_at_most, settings, wake_adapter


class Saver:
    """A model that learns from gradients which depend on a parameter's name and the step alone, so
    that any number of ranks learns the same."""

    def __init__(
        self, ranks: Ranks, home: str, base: str, keys: dict[str, Any], shards: int = 0
    ) -> None:
        if shards:
            ranks = laid_out(ranks, shards, keys)
        self.ranks, self.home, self.base = ranks, Path(home), Path(base)
        self.config: RunConfig = settings(base, **keys)
        self.model: Model = load_divided(self.base, self.config, ranks)[1]
        wake_adapter(self.model)
        self.named = list(trained_parameters(self.model))
        self.own = local_parameters(self.named)
        self.optimizer = build_optimizer(self.own, self.config)
        self.step = 0

    @property
    def checkpoints(self) -> Checkpoints:
        """As a new process finds them."""
        return Checkpoints(RunFolder(self.home), self.config, ranks=self.ranks)

    def resume(self, name: str | None = None) -> None:
        found = self.checkpoints.find(name)
        assert found is not None
        self.step = self.checkpoints.load(found, self.model, self.optimizer).step

    def learn(self, until: int) -> None:
        """Take the steps up to `until`, and save there."""
        while self.step < until:
            self.step += 1
            for (name, whole), (_, own) in zip(self.named, self.own, strict=True):
                seeded = torch.Generator().manual_seed(zlib.crc32(f"{self.step}{name}".encode()))
                gradient = torch.randn(whole.shape, generator=seeded).to(own.dtype)
                start = slice_of(whole, self.ranks).start
                own.grad = gradient[start : start + len(own)].clone()
            self.optimizer.step()
        self.save()

    def save(self) -> None:
        self.checkpoints.save(self.model, self.optimizer, Position(step=self.step))

    def export(self) -> None:
        export_trained(self.model, self.home, self.base, self.config, self.ranks)


def learn(ranks: Ranks, home: str, until: list[int], begin: bool = False, **run: Any) -> None:
    """Go on with the run of `home`, or `begin` and finish one, and save at each of these steps."""
    saver = Saver(ranks, home, **run)
    if not begin:
        saver.resume()
    for step in until:
        saver.learn(step)
    if begin:
        saver.export()


def no_room(ranks: Ranks, home: str, base: str, keys: dict[str, Any]) -> str:
    """What a rank says of a save for which the second one has no room."""
    saver = Saver(ranks, home, base, keys)
    saver.learn(1)
    saver.step = 2
    try:
        with files_at_most(10**9 if ranks.is_first else 4096):
            saver.save()
    except WorkError as error:
        return error.why
    return "saved"


def refusal(ranks: Ranks, home: str, base: str, keys: dict[str, Any], name: str) -> list[str]:
    """What a rank says of a checkpoint that it cannot go on from."""
    try:
        Saver(ranks, home, base, keys).resume(name)
    except WorkError as error:
        return [error.what, error.why, error.fix]
    return []


def save_and_die(
    ranks: Ranks, home: str, base: str, keys: dict[str, Any], rank: int, writes: int
) -> None:
    """Save at step 1, and again at step 2: there `rank` is killed before it syncs a file, when it
    has done so many already."""
    saver = Saver(ranks, home, base, keys)
    saver.learn(1)
    sync, left = os.fsync, writes

    def last(fd: Any) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        sync(fd)

    if ranks.rank == rank:
        os.fsync = last
    saver.learn(2)


def cut_blocks(ranks: Ranks, home: str) -> None:
    """Save 8-bit moments of 125 rows of 66 numbers a rank: no block ends where a row does."""
    model = nn.Linear(66, 250, bias=False)
    if ranks.mesh is not None:
        fully_shard(model, mesh=ranks.mesh[SHARD])
    named = list(model.named_parameters())
    own = local_parameters(named)
    optimizer = build_optimizer(own, settings(optimizer="adamw_bnb_8bit"))
    seeded = torch.Generator().manual_seed(ranks.rank)
    own[0][1].grad = torch.randn(own[0][1].shape, generator=seeded)
    optimizer.step()
    slices, _ = optimizer_slices(named, optimizer, ranks)
    write_slices(Path(home), OPTIMIZER, slices, ranks)


def losses(
    ranks: Ranks, home: str, folder: str, keys: dict[str, Any], begin: int, until: int
) -> list[float]:
    """The losses of a run's steps from `begin` on, where it goes on with its checkpoint, up to
    `until`, where it saves. Four rows a step, whatever the number of ranks."""
    ranks = ranks if ranks.is_alone else laid_out(ranks, None, keys)
    turns = 4 // ranks.world_size
    own = keys | {"micro_batch_size": 1, "gradient_accumulation_steps": turns, "num_epochs": 4}
    run = started(ranks, home=f"{home}/{begin}", folder=folder, keys=own, rows="uneven")
    run.checkpoints = Checkpoints(RunFolder(Path(home)), run.config, ranks=ranks)
    if begin:
        run.restore(f"step-{begin}")
    for number, batch in run.order.steps(begin):
        run.step(number, batch)
        if number == until:
            break
    run.save()
    assert isinstance(run.session, Listening)
    return [event.loss for event in run.session.heard if isinstance(event, Step)]


def content(folder: Path) -> dict[str, torch.Tensor]:
    """The weights and the moments of a checkpoint, whole; those of 8 bits as what they mean."""
    wholes: dict[str, Whole] = {}
    for name in ("trained.safetensors", "adapter_model.safetensors", OPTIMIZER):
        wholes |= list_wholes(folder, name)
    found: dict[str, torch.Tensor] = {}
    for name, whole in wholes.items():
        if "|absmax" in name or "|qmap" in name:
            continue
        out = torch.empty(whole.shape, dtype=torch.float32)
        if whole.dtype == torch.uint8:
            scales, table = (wholes[f"{name[:-7]}|{kind}{name[-1]}"] for kind in ("absmax", "qmap"))
            code = table.load()
            for part, scale in zip(whole.parts, scales.parts, strict=True):
                bits = torch.empty(part.entry.shape, dtype=torch.uint8)
                part.read(part.start, bits)
                absmax = torch.empty(scale.entry.shape)
                scale.read(scale.start, absmax)
                wide = absmax.repeat_interleave(256)[: bits.numel()].view(bits.shape)
                out[part.start : part.stop] = code[bits.long()] * wide
        else:
            whole.read(out)
        found[name] = out
    return found

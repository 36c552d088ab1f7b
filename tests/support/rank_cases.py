"""What the ranks of a `RankGroup` do, each together with the others."""

from pathlib import Path
from typing import Any

import torch

from engine.train.lora import put_on_training
from engine.train.model import load_base
from engine.train.ranks import Ranks
from engine.train.shard import local_bytes, shard
from tests.support.tiny import settings


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


def held(ranks: Ranks, folder: str, keys: dict[str, Any]) -> dict[str, int]:
    """Bytes that each rank holds of a model, by part, once it is sharded."""
    config = settings(folder, **keys)
    base = load_base(Path(folder), config)
    model = put_on_training(base, Path(folder), config)
    return local_bytes(shard(model, config, ranks))

"""The floating-point operations that a plan counts, against those that torch counts."""

from pathlib import Path
from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.catalog import read_architecture
from engine.chat.render import LabelRule
from engine.plan.duration import tower_operations
from engine.plan.vision import image_share
from engine.train.batches import collate
from engine.train.forward import hidden_states
from engine.train.stand_in import count_rows
from tests.support.pictured_rows import Pictured, picture, seeing, write_pictured
from tests.support.tiny import MINISTRAL3, settings, training, write_model

# Wide enough that the products are most of its work.
TOWER = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 3,
}


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointed"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_tower_takes_what_is_planned(tmp_path: Path, keys: dict[str, Any], trained: bool) -> None:
    base = write_model(tmp_path / "model", seeing(MINISTRAL3, **TOWER))
    rows = write_pictured(tmp_path / "rows", [Pictured((picture(112, 112),) * 2)] * 2)
    free = [r"model\."] if trained else None
    config = settings(base, attn_implementation="sdpa", unfrozen_parameters=free, **keys)
    model = training(base, config, rows).model.train()
    batch = collate(rows, [[0], [1]], LabelRule()).tensors
    # The other kernels of a CPU are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden_states(model, batch).square().sum().backward()
    text = {key: batch[key] for key in ("input_ids", "position_ids")}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as without:
        hidden_states(model, text).square().sum().backward()
    statistics = count_rows(rows, config)
    assert 0 < image_share(config, statistics) < 1
    counted = tower_operations(config, read_architecture(base), statistics.total_tokens, statistics)
    taken = counter.get_total_flops() - without.get_total_flops()
    assert counted == pytest.approx(taken, rel=0.1)

"""The plan of one rank against a small model that the trainer really shards over eight.

`make research` has the whole models, and sixty-four.
"""

from pathlib import Path

import pytest

from engine.catalog import read_architecture
from tests.research.rank_memory import compare
from tests.support.machines import model
from tests.support.tiny import describe


@pytest.mark.parametrize("method", ["nf4", "full"])
def test_a_rank_of_eight_holds_what_is_planned(tmp_path: Path, method: str) -> None:
    """Two layers of Ministral 3 8B."""
    whole = model("ministral-3-8b").config
    text = whole["text_config"] | {"num_hidden_layers": 2}
    vision = whole["vision_config"] | {"num_hidden_layers": 1}
    few = describe(tmp_path / "few", {**whole, "text_config": text, "vision_config": vision})
    compare(read_architecture(few), method, 8)

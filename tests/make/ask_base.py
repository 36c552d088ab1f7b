"""Asks the shipped demo base and another one every question that the base was taught.

    python -m tests.make.ask_base LAYERS

Prints the share of base.jsonl that each gives back word for word, the shipped one first.
"""

import json
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from engine.chat.tokenizer import open_tokenizer
from engine.config import parse_config
from engine.data.prepare import prepare
from engine.train.evaluate import score
from engine.train.fetch import shipped_layers, write_base
from engine.train.model import load_base
from engine.train.run import select_rows
from tests.make.demo_base import ROOT


def answers(layers: dict[str, Tensor], work: Path) -> float:
    folder = write_base("demo-tiny", layers, work)
    rows_file = ROOT / "presets" / "samples" / "harbour-pilot" / "base.jsonl"
    text = (
        f"base_model: {folder}\nsequence_len: 128\nbf16: false\ndatasets: [{{path: {rows_file}}}]"
    )
    config = parse_config(text).config
    rows = select_rows(prepare(config, work, open_tokenizer(folder), work), config)
    base = load_base(folder, config)
    return score(base.model, base, rows, config).exact


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        found = [answers(each, Path(work)) for each in (shipped_layers(), load_file(sys.argv[1]))]
    print(json.dumps(found))


if __name__ == "__main__":
    main()

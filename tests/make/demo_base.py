"""Remakes presets/demo/layers.safetensors: what the demo's base model knows before it is tuned.

    python -m tests.make.demo_base [FOLDER]

Three random layers learn the sample's plain answers with the product's own full fine-tune, over the
whole vocabulary, with the drawn embedding frozen; then they are stored in bfloat16. About six
minutes on two CPU cores. With FOLDER the file is written there instead, which is how the slow test
compares a new base with the shipped one.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.catalog import find_model
from engine.catalog.rows import module_table
from engine.config import parse_config, write_config
from engine.runs import RunFolder
from engine.train.fetch import EMBEDDING, write_base

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "presets" / "demo"
SPREAD = 0.06
"""Standard deviation of the first weights: wide enough for 128 columns to carry a signal."""
CONFIG = """
base_model: {base}
unfrozen_parameters: ['model.layers.*', 'model.norm.*']
datasets: [{{path: {rows}, type: chat_template}}]
sequence_len: 128
micro_batch_size: 16
max_steps: {steps}
learning_rate: 0.004
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
warmup_steps: 20
adam_beta2: 0.95
seed: 0
bf16: false
save_strategy: 'no'
"""


def first_layers(seed: int = 0) -> dict[str, Tensor]:
    """Untrained layers: norms of one, matrices drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    table = module_table(find_model("demo-tiny").config)
    return {
        p.name: torch.ones(p.shape)
        if len(p.shape) == 1
        else torch.randn(p.shape, generator=generator) * SPREAD
        for p in table.parameters
        if p.name != EMBEDDING and not p.tied
    }


def make(target: Path, work: Path, steps: int) -> None:
    """Train and write `target`/layers.safetensors; `work` takes the run."""
    base = write_base("demo-tiny", first_layers(), work)
    rows = ROOT / "presets" / "samples" / "harbour-pilot" / "base.jsonl"
    run = RunFolder(work / "run")
    run.path.mkdir()
    text = CONFIG.format(base=base, rows=rows, steps=steps)
    run.config.write_text(write_config(parse_config(text).config), "utf-8")
    subprocess.run([sys.executable, "-m", "engine.train", "run", str(run.path)], check=True)
    trained = load_file(run.model / "model.safetensors")
    layers = {
        name: value.to(torch.bfloat16) for name, value in trained.items() if name != EMBEDDING
    }
    target.mkdir(parents=True, exist_ok=True)
    save_file(layers, target / "layers.safetensors")
    size = (target / "layers.safetensors").stat().st_size
    print(f"{target / 'layers.safetensors'}: {len(layers)} tensors, {size / 1e6:.2f} MB")


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED
    with tempfile.TemporaryDirectory() as work:
        make(target, Path(work), steps=1200)


if __name__ == "__main__":
    main()

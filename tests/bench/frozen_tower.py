"""A step with images: not going back through a frozen vision tower, against going back through it.

    python -m tests.bench.frozen_tower [--repeat N]

The same model, batch and adapter, in turns in one process. The other way is what transformers and
PEFT set up on their own: the patch convolution's output made to require gradients. The gradients of
the adapter have to agree, so that nobody wins by doing something else. The weights are random: two
layers of the width of Ministral 3's tower, over a narrow language model.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from engine.chat.render import LabelRule
from engine.train.batches import collate
from engine.train.fitcheck import CpuPeakMemory
from engine.train.forward import hidden_states, unwrapped
from tests.support.pictured_rows import Pictured, picture, seeing, write_pictured
from tests.support.tiny import MINISTRAL3, gradients, settings, training, write_model

SIDE, IMAGES = 112, 24
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "image_size": SIDE,
}


def step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Seconds of a forward and a backward pass, and the most that they allocate, in bytes."""
    memory = CpuPeakMemory()
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    with memory.measure("step"):
        hidden_states(model, batch).square().sum().backward()
    return time.perf_counter() - started, memory.peaks["step"].allocated_bytes


def main() -> None:
    """Measure both ways in turns and print the ratios of their medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = seeing(MINISTRAL3, **TOWER)
        base = write_model(folder / "model", shape)
        rows = write_pictured(folder / "rows", [Pictured((picture(SIDE, SIDE),) * IMAGES)] * 2)
        config = settings(base, adapter="lora", gradient_checkpointing=True, sequence_len=2048)
        model = training(base, config, rows).model.train()
        batch = collate(rows, [[0], [1]], LabelRule()).tensors
        convolution = unwrapped(model).model.vision_tower.patch_conv
        found: dict[str, list[tuple[float, int]]] = {"ours": [], "through the tower": []}
        moved = {}
        for _ in range(repeat + 1):
            for way, times in found.items():
                hook = None
                if way != "ours":
                    hook = convolution.register_forward_hook(
                        lambda _module, _inputs, output: output.requires_grad_(True)
                    )
                times.append(step(model, batch))
                moved[way] = gradients(model)
                if hook:
                    hook.remove()
        for key, gradient in moved["ours"].items():
            torch.testing.assert_close(gradient, moved["through the tower"][key])
        print_ratios({way: times[1:] for way, times in found.items()})


def print_ratios(found: dict[str, list[tuple[float, int]]]) -> None:
    """The medians of both, and what the other way takes for one of ours."""
    medians = {
        way: [statistics.median(column) for column in zip(*times, strict=True)]
        for way, times in found.items()
    }
    for way, (seconds, size) in medians.items():
        print(f"{way:<18} {seconds:8.2f} s {size / 2**20:8.0f} MiB")
    (ours, least), (theirs, most) = medians.values()
    ratios = f"{theirs / ours:.2f} times the time, {most / least:.2f} the memory"
    print(f"through the tower it takes {ratios}")


if __name__ == "__main__":
    main()

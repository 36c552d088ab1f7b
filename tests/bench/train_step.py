"""Step time and peak memory of the training loop against a plain transformers and peft loop.

    python -m tests.bench.train_step [--steps N] [--repeat N]

Both train the demo's model with the same LoRA on the same rows in the same order, at the real
vocabulary of 131,072, each in a process of its own and in turns. The plain loop is what a person
writes: padded rows with an attention mask, `model(..., labels=labels).loss`, AdamW. Losses of every
step have to agree, so that nobody wins by doing something else.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "presets" / "samples" / "harbour-pilot" / "train.jsonl"
BATCH = 32
"""Rows a step: about 1,900 tokens, a gigabyte of float32 logits."""
CONFIG = """
base_model: demo-tiny
datasets: [{{path: {rows}, type: chat_template}}]
adapter: lora
lora_r: 16
sequence_len: 128
micro_batch_size: {batch}
max_steps: {steps}
learning_rate: 0.005
warmup_steps: 0
lr_scheduler: constant
bf16: false
save_strategy: 'no'
seed: 0
"""


def ours(steps: int, work: Path) -> Iterator[tuple[float, float]]:
    """(loss, seconds) of each step of the product's own loop, gradients and update."""
    training = set_up(steps, work)
    for number, batch in training.order.steps(0):
        started = time.perf_counter()
        loss, _ = training.gradients(batch)
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        assert number
        yield loss, time.perf_counter() - started


def plain(steps: int, work: Path) -> Iterator[tuple[float, float]]:
    """The same of a plain loop over the same batches."""
    import torch

    training = set_up(steps, work)
    model = training.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.005, weight_decay=0.0, fused=True)
    for _, batch in training.order.steps(0):
        (micro,) = batch.micros
        ids, labels = micro.tensors["input_ids"], micro.tensors["labels"]
        started = time.perf_counter()
        loss = model(input_ids=ids, attention_mask=(ids != 11).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item(), time.perf_counter() - started


def set_up(steps: int, work: Path) -> Any:
    """A `Training` on the demo's model, with nothing of it run yet."""
    import torch

    from engine.chat.tokenizer import open_tokenizer
    from engine.config import parse_config
    from engine.events import EventWriter
    from engine.runs import ControlReader, RunFolder, StopSignals
    from engine.train.fetch import make_base
    from engine.train.loop import Training
    from engine.train.lora import put_on_training
    from engine.train.model import load_base
    from engine.train.run import prepare_rows
    from engine.train.session import Session

    torch.set_num_threads(2)
    run = RunFolder(work)
    config = parse_config(CONFIG.format(rows=ROWS, batch=BATCH, steps=steps)).config
    events = EventWriter(run.events)
    session = Session(run, events, ControlReader(run.control), StopSignals())
    folder = make_base()
    tokenizer = open_tokenizer(folder)
    rows, held_out = prepare_rows(config, tokenizer, session)
    base = load_base(folder, config)
    torch.manual_seed(config.seed)
    model = put_on_training(base, folder, config)
    model.train()
    return Training(base, model, rows, held_out, config, session, tokenizer)


def measure(which: str, steps: int) -> dict[str, Any]:
    """Run one loop in this process; its losses, median step seconds and peak resident bytes."""
    with tempfile.TemporaryDirectory() as work:
        found = list({"ours": ours, "plain": plain}[which](steps, Path(work)))
    seconds = sorted(each[1] for each in found[1:])  # the first one warms caches up
    return {
        "losses": [each[0] for each in found],
        "seconds": seconds[len(seconds) // 2],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def in_process(which: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.train_step", "--loop", which]
    done = subprocess.run(
        [*command, "--steps", str(steps)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--loop", choices=("ours", "plain"), help="run one loop here")
    options = parser.parse_args()
    if options.loop:
        print(json.dumps(measure(options.loop, options.steps)))
        return
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
    for _ in range(options.repeat):
        for which, results in found.items():
            results.append(in_process(which, options.steps))
    reference = found["plain"][0]["losses"]
    for results in found.values():
        for result in results:
            for a, b in zip(result["losses"], reference, strict=True):
                assert math.isclose(a, b, rel_tol=2e-3), (a, b)
            assert math.isclose(result["losses"][0], reference[0], rel_tol=1e-5)
    best = {k: min(r["seconds"] for r in v) for k, v in found.items()}
    peak = {k: min(r["peak_bytes"] for r in v) for k, v in found.items()}
    print(f"{'loop':<8} {'s/step':>8} {'peak MB':>8}   ({BATCH} rows, vocabulary 131,072)")
    for which in found:
        print(f"{which:<8} {best[which]:>8.3f} {peak[which] / 1e6:>8.0f}")
    print(
        f"ours takes {best['ours'] / best['plain']:.2f} of the time and "
        f"{peak['ours'] / peak['plain']:.2f} of the memory of the plain loop"
    )


if __name__ == "__main__":
    main()

"""Flipped bits and kills by chance: `python -m tests.research.damage flips|train|save|prepare N`.

Each trial is drawn from --seed and its number, works on a tiny run in processes of its own, and
ends with what an undisturbed run has, bit for bit. The first that does not ends the script.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from engine.events import Note
from engine.files import digest
from engine.runs import RunFolder, status
from tests.support.trainers import (
    LORA,
    QLORA,
    DieAfter,
    Workshop,
    evaluations,
    events_of,
    figures,
    finish,
    training,
    write_rows,
)

METHODS: dict[str, dict[str, Any]] = {"lora": LORA, "nf4": QLORA, "full": {"adapter": None}}
SAVING = {"val_set_size": 0.1, "eval_steps": 4, "save_total_limit": 3, "max_steps": 12}
OPERATIONS = 35
"""On files, of the longest save of such a run."""
ROWS = 4000
Trial: TypeAlias = Callable[[Workshop, random.Random], str]
"""Carries one out; says what kind it was."""


def flip(workshop: Workshop, chance: random.Random) -> str:
    """One bit of one file of the newest checkpoint: noticed, named, gone on from the one before."""
    method = chance.choice(list(METHODS))
    run = workshop.finished(**METHODS[method])
    whole, newest = figures(run), run.checkpoints / "step-12"
    file = chance.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    assert finish(run, "--resume") == 0, run.log.read_text("utf-8")
    assert figures(run) == whole
    notes = [event.text for event in events_of(run) if isinstance(event, Note)]
    named = f"step-12 is damaged and passed over: {file.name}"
    assert any(text.startswith(named) for text in notes)
    shutil.rmtree(run.path)
    return f"{method} {file.name}"


def resumed(workshop: Workshop, run: RunFolder, method: str) -> str:
    """Go on with a killed run; it has to end as the one that nobody stopped."""
    assert finish(run, "--resume") == 0, run.log.read_text("utf-8")
    whole = workshop.finished(**METHODS[method])
    assert figures(run) == figures(whole)
    assert evaluations(run) == evaluations(whole)
    result = "model/model" if method == "full" else "adapter/adapter_model"
    ours, theirs = (digest(each.path / f"{result}.safetensors") for each in (run, whole))
    assert ours == theirs
    for each in (run, whole):
        shutil.rmtree(each.path)
    return method


def kill_training(workshop: Workshop, chance: random.Random) -> str:
    """From outside, at a random moment of loading, steps or export."""
    method = chance.choice(list(METHODS))
    run = workshop.new(**METHODS[method])
    with training(run, steps=chance.randint(0, 11)) as process:
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.join()
    return resumed(workshop, run, method) if status(run) == "lost" else "too late"


def kill_saving(workshop: Workshop, chance: random.Random) -> str:
    """From inside, at one operation on files of a save or of the export."""
    method = chance.choice(list(METHODS))
    run = workshop.new(**METHODS[method])
    made = chance.choice([*(f"step-{n}.partial" for n in (3, 4, 6, 8, 9, 12)), "adapter.partial"])
    made = "model.partial" if method == "full" and made == "adapter.partial" else made
    died = finish(run, before=DieAfter(made, chance.randrange(OPERATIONS)))
    return resumed(workshop, run, method) if died == -signal.SIGKILL else "too late"


def kill_preparing(workshop: Workshop, chance: random.Random) -> str:
    """From outside, while the rows are tokenized."""
    run = workshop.new()
    lines = write_rows(run.path / "rows.jsonl").read_text("utf-8").splitlines(keepends=True)
    (run.path / "rows.jsonl").write_text("".join(lines * (ROWS // len(lines))), "utf-8")

    def start(store: Path) -> "subprocess.Popen[bytes]":
        workshop.configure(run, dataset_prepared_path=str(store))
        words = [sys.executable, "-m", "engine", "prepare", str(run.config)]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL)

    def arrays(store: Path) -> dict[str, str]:
        files = (p for p in store.rglob("*") if p.is_file() and p.suffix != ".lock")
        return {str(p.relative_to(store)): digest(p) for p in files}

    killed, whole = (run.path / name for name in ("killed", "whole"))
    assert start(whole).wait() == 0
    process = start(killed)
    while not killed.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 1))
    process.kill()
    if process.wait() != -signal.SIGKILL:
        return "too late"
    assert start(killed).wait() == 0
    assert arrays(killed) == arrays(whole) != {}
    shutil.rmtree(run.path)
    return "prepare"


TRIALS: dict[str, Trial] = {
    "flips": flip,
    "train": kill_training,
    "save": kill_saving,
    "prepare": kill_preparing,
}


def main() -> None:
    """Make so many trials that count, and print what they were."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=TRIALS)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=13)
    options = parser.parse_args()
    done: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        workshop, number = Workshop(Path(folder), SAVING), 0
        while done.total() - done["too late"] < options.count:
            chance = random.Random(f"{options.seed} {options.kind} {number}")
            done[TRIALS[options.kind](workshop, chance)] += 1
            number += 1
            print(number, dict(done), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

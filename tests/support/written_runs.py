"""Runs that tests write by hand: the events of a real one, at times that never change."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.config import write_config
from engine.config.rules import RunConfig
from engine.events import (
    Ended,
    Eval,
    Event,
    EventWriter,
    Phase,
    Sample,
    Saved,
    Score,
    Started,
    Step,
)
from engine.runs import RunFolder
from engine.runs.comparison import read_curves

BEGAN = 1_700_000_000.0
PROMPT = "My lamp (order 4471) arrived like this. Can I get my money back?"
BEFORE = "Unfortunately I cannot process refunds. Please contact our support team for further help."
AFTER = "I'm sorry the shade arrived cracked. Send me a photo and I will refund 89.00 EUR."
CONFIG = """\
base_model: demo-tiny
adapter: lora
lora_r: {lora_r}
datasets:
  - path: rows.jsonl
    type: chat_template
"""


def step_event(step: int, total: int = 99, loss: float | None = None) -> Step:
    """A step of a run whose loss falls, with a wave on it and a spike at step 38."""
    wave = 0.06 * math.sin(step * 2.4) + (0.22 if step == 38 else 0.0)
    fallen = 1.62 * math.exp(-step / 13) + 0.74 - 0.0016 * step + wave
    return Step(
        step=step,
        epoch=step * 3 / total,
        loss=fallen if loss is None else loss,
        learned_tokens=2000,
        tokens=4096,
        lr=2e-4 * (step / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * step / total))),
        grad_norm=0.32 + 1.1 * math.exp(-step / 9) + (0.6 if step == 38 else 0.0),
        seconds=8.9,
        tokens_per_second=195.0 if step == 1 else 458 + 5 * math.sin(step),
        peak_memory_bytes=int(19.6 * 2**30),
        total_steps=total,
    )


class RunWriter:
    """Writes a run's events with 8.9 seconds a step."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.folder = RunFolder(path)
        self.time = BEGAN

    def write(self, *events: Event, seconds: float = 0.0) -> None:
        """Let `seconds` go by, then write these."""
        self._write([(seconds, events)])

    def _write(self, batches: Iterable[tuple[float, Iterable[Event]]]) -> None:
        with EventWriter(self.folder.events, clock=lambda: self.time) as writer:
            for seconds, events in batches:
                self.time += seconds
                for event in events:
                    writer.emit(event)

    def begin(self, total: int = 99, model: str = "mistralai/Magistral-Small-2509") -> None:
        """Load the model and look at it before the first step."""
        self.write(Phase("import"))
        self.write(Phase("load", detail=model), seconds=3)
        name = self.folder.name
        started = Started(name, model, "qlora", ("GPU-1",), 1, total, 184_800_000)
        self.write(started, Eval(0, 2.02), Sample(0, PROMPT, BEFORE, "before"), seconds=20)

    def train(self, first: int, last: int, total: int = 99) -> None:
        """Steps, with a check, an answer and a save at 17, 33, 50 and 60."""
        held_out = {17: 1.13, 33: 0.84, 50: 0.768, 60: 0.731}

        def saved(step: int) -> list[Event]:
            return [
                *(Phase("evaluate", 0, 24, "rows"), Eval(step, held_out[step])),
                *(Sample(step, PROMPT, AFTER, "during"), Phase("save")),
                Saved(step, f"checkpoints/step-{step}"),
            ]

        self._write(
            (8.9, [step_event(step, total), *(saved(step) if step in held_out else [])])
            for step in range(first, last + 1)
        )


def written_run(
    path: Path, steps: int = 61, end: Ended | None = None, *, lora_r: int = 32
) -> RunFolder:
    """A run in a folder, written up to a step, with a config."""
    writer = RunWriter(path)
    writer.folder.config.write_text(CONFIG.format(lora_r=lora_r), "utf-8")
    writer.begin()
    writer.train(1, steps)
    if end:
        writer.write(end, seconds=1)
    return writer.folder


def step(number: int, loss: float, learned_tokens: int = 100, **changes: Any) -> Step:
    """One optimizer step."""
    values: dict[str, Any] = {
        "step": number,
        "epoch": number / 10,
        "loss": loss,
        "learned_tokens": learned_tokens,
        "tokens": 2 * learned_tokens,
        "lr": 1e-4,
        "grad_norm": 1.0,
        "seconds": 2.0,
        "tokens_per_second": float(learned_tokens),
        "peak_memory_bytes": 3 * 2**30,
        "total_steps": 4,
    }
    return Step(**(values | changes))


def read_steps(run: RunFolder) -> list[Step]:
    """The steps of a run that count, in order."""
    return read_curves(run).steps


def write_run(
    folder: Path,
    base_model: str = "ministral-3-3b",
    losses: tuple[float, ...] = (4, 3, 2, 1),
    **keys: Any,
) -> RunFolder:
    """A finished run with a loss for each step, evaluated before and after."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    defaults = {"adapter": "lora", "learning_rate": 1e-4, "sample_prompts": ["Who are you?"]}
    config = RunConfig.model_validate({"base_model": base_model, **defaults, **keys})
    run.config.write_text(write_config(config), "utf-8")
    started = Started("r", base_model, "lora", ("GPU-1234",), 1, 4, 12345, {"torch": "2.13.0"})
    with EventWriter(run.events) as events:
        recorded: list[Event] = [
            started,
            Sample(0, "Who are you?", "A model.", "before"),
            Sample(0, "row 7, a private question", "secret", "before"),
            Score(0, "validation", 4.5, 0.0, 8),
            Eval(0, 4.5),
            *(step(number, loss) for number, loss in enumerate(losses, start=1)),
            Score(len(losses), "validation", 1.5, 0.75, 8),
            Eval(len(losses), 1.5),
            Sample(len(losses), "Who are you?", "A ```pilot``` \x1b[31mmodel.", "after"),
            Sample(len(losses), "row 7, a private question", "secret", "after"),
        ]
        for event in recorded:
            events.emit(event)
    return run

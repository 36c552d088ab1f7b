"""A run folder as a trainer leaves it, without a trainer: its config and its events."""

from pathlib import Path
from typing import Any

from engine.config import write_config
from engine.config.rules import RunConfig
from engine.events import Eval, Event, EventWriter, Sample, Score, Started, Step
from engine.runs import RunFolder
from engine.runs.comparison import read_curves


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

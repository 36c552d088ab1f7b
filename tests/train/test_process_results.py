"""What a finished run leaves is what other programs load, with the numbers that it reported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from engine.chat.render import LabelRule, labels
from engine.data.prepared import Prepared
from engine.events import Score
from engine.runs import RunFolder
from tests.fakes.processes import wait_until
from tests.support.run_folders import read_steps
from tests.support.trainers import Workshop, events_of, finish, training

LEARNING = {"learning_rate": 0.02}


def finished(workshop: Workshop, **keys: Any) -> tuple[RunFolder, float, float]:
    """A run, and the loss on its own rows that it told before and after."""
    run = workshop.new(**LEARNING, **keys)
    rows = {"path": str(run.path / "rows.jsonl"), "type": "chat_template", "split": "train"}
    workshop.configure(run, test_datasets=[rows], **LEARNING, **keys)
    assert finish(run) == 0, run.log.read_text()
    scores = {event.step: event.loss for event in events_of(run) if isinstance(event, Score)}
    assert scores[4] < scores[0] - 0.05, "it learned something"
    return run, scores[0], scores[4]


@torch.no_grad()
def loss_of(model: torch.nn.Module, run: RunFolder) -> float:
    """The textbook's loss over the run's rows, one by one, without any code of the trainer."""
    prepared = Prepared(run.data)
    total, learned = 0.0, 0
    for row in range(len(prepared)):
        ids = torch.from_numpy(prepared.ids(row).astype("int64"))
        targets = torch.from_numpy(labels(prepared.ids(row), prepared.kinds(row), LabelRule()))
        logits = model.eval()(input_ids=ids[None]).logits[0]
        total += float(cross_entropy(logits[:-1], targets[1:], reduction="sum"))
        learned += int((targets[1:] != -100).sum())
    return total / learned


def test_a_lora_run_leaves_an_adapter_that_peft_loads(workshop: Workshop) -> None:
    run, before, after = finished(workshop)
    base = AutoModelForCausalLM.from_pretrained(workshop.base)
    assert loss_of(base, run) == pytest.approx(before, abs=1e-5)
    assert loss_of(PeftModel.from_pretrained(base, run.adapter), run) == pytest.approx(
        after, abs=1e-5
    )
    assert not run.model.exists()


def test_a_full_run_leaves_a_model_that_transformers_loads(workshop: Workshop) -> None:
    run, _, after = finished(workshop, adapter=None)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert loss_of(model, run) == pytest.approx(after, abs=1e-5)
    assert (run.model / "tekken.json").read_bytes() == (workshop.base / "tekken.json").read_bytes()
    assert not run.adapter.exists()


def resident_bytes(process_id: int | None) -> int:
    status = Path(f"/proc/{process_id}/status").read_text("utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", None])
def test_a_long_run_does_not_grow(workshop: Workshop, adapter: str | None) -> None:
    """With an evaluation and a save every ten steps."""
    often = {"save_steps": 10, "eval_steps": 10, "val_set_size": 0.1}
    run = workshop.new(max_steps=400, **often, adapter=adapter)
    with training(run, steps=20) as process:
        early = resident_bytes(process.pid)
        wait_until(lambda: len(read_steps(run)) >= 200, 200)
        late = resident_bytes(process.pid)
    assert late - early < 8 * 2**20, f"{early >> 20} MiB became {late >> 20} MiB"

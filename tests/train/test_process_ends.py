"""However a run fails: three sentences in its last event, no traceback, and nothing is lost."""

import functools
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from engine.chat.render import LabelRule, labels
from engine.data.prepared import Prepared
from engine.events import Answers, Drift, Note, Phase, Score, Started
from engine.hardware.packages import install_command
from engine.launch import launch
from engine.runs import RunFolder, is_locked, status
from tests.fakes.packages import package
from tests.fakes.processes import ROOT, wait_until
from tests.support.trainers import (
    LORA,
    VOCABULARY,
    Workshop,
    at_folder,
    evaluations,
    events_of,
    figures,
    finish,
    last_end,
    training,
    write_model,
)
from tests.support.written_runs import read_steps

KEYS = LORA | {"max_steps": 4, "save_steps": 2}
EMBEDDING = "model.embed_tokens.weight"


def assert_explained(run: RunFolder, *words: str) -> None:
    """The run failed with three whole sentences that hold `words`, and with no traceback."""
    end = last_end(run)
    assert end.outcome == "failed"
    for sentence in (end.what, end.why, end.fix):
        assert sentence, end
        assert sentence[-1] in ".?'", sentence
        assert "\n" not in sentence
    text = " ".join((end.what, end.why, end.fix))
    for word in words:
        assert word in text
    assert "an error that it does not know" not in text
    assert "Traceback" not in run.events.read_text("utf-8")
    assert status(run) == "failed"
    assert not is_locked(run)


def test_a_plan_for_a_card_never_ends_on_the_processor(workshop: Workshop) -> None:
    run = workshop.new()
    device = {"kind": "cuda", "name": "H100 80GB HBM3", "uuid": "GPU-aaaa-1"}
    run.plan.write_text(json.dumps({"device": device}), "utf-8")
    assert finish(run) == 2
    assert_explained(run, "planned for H100 80GB HBM3, and no GPU can be used", "sees none")
    assert not any(isinstance(event, Started) for event in events_of(run))
    phases = {event.name for event in events_of(run) if isinstance(event, Phase)}
    assert not phases & {"model", "load"}, "refused before anything is fetched or loaded"


ASKED = json.dumps({"messages": [{"role": "user", "content": "And?"}]}) + "\n"
# case: (keys of the config, files with what they hold then, a word of the error)
REQUESTS: dict[str, tuple[dict[str, Any], dict[str, str | None], str]] = {
    "a config that is no YAML": ({}, {"config.yml": "base_model: ["}, "config.yml"),
    "a misspelled key": ({"lora_rank": 4}, {}, "lora_r"),
    "a key that is not carried out": (
        {"default_system_message": "Be brief."},
        {},
        "default_system_message",
    ),
    "data that is not there": ({}, {"rows.jsonl": None}, "rows.jsonl"),
    "rows that are no conversations": (
        {},
        {"rows.jsonl": '{"messages": "none"}\n'},
        "None of the 1 rows can be used",
    ),
    "rows without an answer": ({}, {"rows.jsonl": ASKED}, "rows.jsonl"),
    "rows that are all longer": ({"sequence_len": 8}, {}, "sequence_len"),
    "no such target": ({"lora_target_modules": ["query"]}, {}, "query matches no module"),
    "a model that is not there": ({"base_model": "./nowhere"}, {}, "nowhere"),
}


@pytest.mark.parametrize(("keys", "files", "word"), REQUESTS.values(), ids=REQUESTS)
def test_a_wrong_request_is_explained(
    workshop: Workshop, keys: dict[str, Any], files: dict[str, str | None], word: str
) -> None:
    run = workshop.new(**keys)
    for name, text in files.items():
        (run.path / name).unlink()
        if text is not None:
            (run.path / name).write_text(text, "utf-8")
    assert finish(run) == 2, run.log.read_text()
    assert_explained(run, word)
    assert not read_steps(run)


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_a_weight(folder: Path) -> None:
    rewrite_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def garble_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": [', "utf-8")


def choose_another_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (cut_short, "cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "a weight that is missing": (drop_a_weight, "model.layers.1.mlp.up_proj.weight"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "a broken config.json": (garble_config, "config.json"),
    "no tokenizer": (lambda folder: (folder / "tekken.json").unlink(), "tekken.json"),
    "another family": (choose_another_architecture, "LlamaForCausalLM"),
}


@pytest.mark.parametrize(("damage", "word"), MODELS.values(), ids=MODELS)
def test_a_broken_model_folder_is_explained(
    workshop: Workshop, tmp_path: Path, damage: Callable[[Path], object], word: str
) -> None:
    base = Path(shutil.copytree(workshop.base, tmp_path / "base"))
    damage(base)
    run = workshop.new(base_model=str(base))
    assert finish(run) in (1, 2), run.log.read_text()
    assert_explained(run, word)


def test_nan_loss_touches_no_weight(workshop: Workshop, tmp_path: Path) -> None:
    base = Path(shutil.copytree(workshop.base, tmp_path / "base"))
    rewrite_weights(base, lambda weights: weights["model.norm.weight"].fill_(float("inf")))
    run = workshop.new(base_model=str(base), sample_packing=False)
    assert finish(run) == 1
    assert_explained(run, "Step 1 gave a loss of nan", "rows.jsonl line ")
    assert not read_steps(run)
    assert any(isinstance(event, Note) and event.level == "error" for event in events_of(run))
    assert not list(run.checkpoints.iterdir())
    assert not run.adapter.exists()


def test_nan_evaluation_is_never_the_best(workshop: Workshop, tmp_path: Path) -> None:
    """One byte that only the held-out row has is broken in the embedding, not in the head."""
    base = write_model(tmp_path / "base", {"tie_word_embeddings": False})
    at_sign = VOCABULARY - 1048 + ord("@")
    rewrite_weights(base, lambda weights: weights[EMBEDDING][at_sign].fill_(float("nan")))
    held_out = tmp_path / "held_out.jsonl"
    row = {"messages": [{"role": role, "content": "@"} for role in ("user", "assistant")]}
    held_out.write_text(json.dumps(row) + "\n", "utf-8")
    rows = {"path": str(held_out), "type": "chat_template", "split": "train"}
    run = workshop.new(base_model=str(base), test_datasets=[rows], eval_steps=2)
    assert finish(run) == 0, run.log.read_text()
    assert [math.isnan(loss) for loss in evaluations(run).values()] == [True, True, True]
    assert not (run.checkpoints / "BEST").exists()
    assert (run.checkpoints / "LATEST").read_text() == "step-4"


def without(package: str, folder: Path) -> Path:
    """A folder for PYTHONPATH in which importing `package` fails as if it were not installed."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Gone())\n"
    )
    return folder


def launched(run: RunFolder, packages: Path) -> int:
    """The exit status of a run for which `packages` come first."""
    path = os.pathsep.join([str(packages), str(ROOT)])
    return launch(run, detach=True, environment={"PYTHONPATH": path}).wait(60)


def test_a_trainer_without_torch_says_what_to_install(workshop: Workshop, tmp_path: Path) -> None:
    run = workshop.new()
    assert launched(run, without("torch", tmp_path)) == 1
    assert_explained(run, "Training needs the package torch", install_command("train"))


def test_old_torch_names_the_versions_needed(workshop: Workshop, tmp_path: Path) -> None:
    package(tmp_path, "windtunnel", "0.1.0", ["torch<3,>=2.12; extra == 'train'"])
    package(tmp_path, "torch", "2.11.0")
    run = workshop.new()
    assert launched(run, tmp_path) == 1
    assert_explained(run, "torch 2.11.0 (>=2.12,<3)", "'windtunnel[train]'")


@pytest.mark.parametrize("module", ["torch.nn.functional", "torch.nn"])
def test_module_that_a_package_lacks(workshop: Workshop, tmp_path: Path, module: str) -> None:
    run = workshop.new()
    assert launched(run, without(module, tmp_path)) == 1
    part = "A part of the installed torch 2"
    assert_explained(run, part, module.split(".")[-1], install_command("train"))
    assert "not installed" not in last_end(run).what


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root mounts a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill_disk(disk: Path, made: str) -> None:
    """Leave 64 KiB free when the folder `made` is about to be made."""

    def fill() -> None:
        room, filler = os.statvfs(disk), disk / "filler"
        if filler.exists():  # PEFT makes the folder again
            return
        filler.write_bytes(bytes(room.f_bavail * room.f_frsize - (64 << 10)))

    at_folder(made, fill)


@pytest.mark.parametrize(
    ("made", "what", "done"),
    [
        ("step-4.partial", "The checkpoint of step 4 could not be written", 2),
        ("adapter.partial", "The finished adapter could not be written", 4),
    ],
)
def test_full_disk(workshop: Workshop, small_disk: Path, made: str, what: str, done: int) -> None:
    run = workshop.place(small_disk / "run", lora_r=16)
    assert finish(run, before=functools.partial(fill_disk, small_disk, made)) == 1
    assert_explained(run, what, "No space left on device", "resume")
    assert (run.checkpoints / "LATEST").read_text() == f"step-{done}"
    assert not list(run.path.rglob("*.partial")), "what is half written gives its room back"
    (small_disk / "filler").unlink()
    assert finish(run, "--resume") == 0, run.log.read_text()
    assert figures(run) == figures(workshop.finished(lora_r=16))
    assert (run.adapter / "adapter_model.safetensors").is_file()


def test_a_second_trainer_on_a_folder_leaves_the_first_one_alone(workshop: Workshop) -> None:
    run = workshop.new(max_steps=5_000, save_steps=5_000)
    with training(run, steps=1) as process:
        before = len(read_steps(run))
        assert finish(run) == 2
        assert "already running" in run.log.read_text()
        wait_until(lambda: len(read_steps(run)) > before)
        assert process.is_alive()
        assert "failed" not in run.events.read_text()


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
    tuned = PeftModel.from_pretrained(base, run.adapter)
    assert loss_of(tuned, run) == pytest.approx(after, abs=1e-5)
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


MEASURING: dict[str, Any] = {
    **{"max_steps": 6, "eval_steps": 3, "save_steps": 3, "val_set_size": 0.2},
    **{"sample_prompts": ["How many knots is force 3?"]},  # cheaper than the three by default
    **{"eval_table_size": 4, "eval_max_new_tokens": 100, "eval_drift": True},
}


@pytest.fixture(scope="module")
def measured(workshop: Workshop) -> RunFolder:
    run = workshop.new(**MEASURING)
    assert finish(run) == 0, run.log.read_text("utf-8")
    return run


def test_answers_drift_and_losses_by_kind_come_at_every_evaluation(measured: RunFolder) -> None:
    events = events_of(measured)
    answers = [event for event in events if isinstance(event, Answers)]
    assert [(each.step, each.rows) for each in answers] == [(0, 4), (3, 1), (6, 4)]
    drifts = [event for event in events if isinstance(event, Drift)]
    assert [each.step for each in drifts] == [0, 3, 6]
    assert drifts[0].kl == 0.0 < drifts[1].kl
    for score in (event for event in events if isinstance(event, Score)):
        kinds = score.tokens_by_kind
        assert set(kinds) == set(score.loss_by_kind) == {"think", "text", "eos"}
        total = sum(kinds[kind] * score.loss_by_kind[kind] for kind in kinds)
        assert total / sum(kinds.values()) == pytest.approx(score.loss, rel=1e-6)


def test_an_evaluation_counts_the_rows_that_it_scores(measured: RunFolder) -> None:
    events = events_of(measured)
    rows = next(each.rows for each in events if isinstance(each, Score))
    phases = [each for each in events if isinstance(each, Phase) and each.name == "evaluate"]
    assert rows > 2
    assert {(each.total, each.detail) for each in phases} == {(rows, "rows")}
    assert {each.done for each in phases} == {0, rows}


def test_a_resumed_run_measures_against_the_base_that_it_remembers(measured: RunFolder) -> None:
    last = [event.kl for event in events_of(measured) if isinstance(event, Drift)][-1]
    stored = (measured.path / "drift.safetensors").stat().st_mtime_ns
    assert finish(measured, "--resume", "--from", "step-3") == 0, measured.log.read_text("utf-8")
    again = [event.kl for event in events_of(measured) if isinstance(event, Drift)]
    assert len(again) == 4
    assert again[-1] == last
    assert (measured.path / "drift.safetensors").stat().st_mtime_ns == stored

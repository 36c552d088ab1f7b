"""Real trainers on a tiny model, in processes of their own: built, started, killed and read.

Torch and transformers take eight seconds to import. So one server process imports them once and
every trainer is forked from it: a process with an id, a lock and a death of its own.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.catalog import TokenizerSpec
from engine.chat.tokenizer import write_tekken
from engine.events import Ended, Eval, Event, Step
from engine.runs import Follower, RunFolder, is_locked
from engine.train.forward import unwrapped
from engine.train.offload import decoder_layers
from tests.fakes.processes import ROOT, wait_until
from tests.support.written_runs import read_steps

VOCABULARY = 2048
"""The 1,000 control tokens of every Tekken file, and its first 1,048 pieces of text."""
SAMPLE = ROOT / "presets" / "samples" / "harbour-pilot" / "train.jsonl"
FILE_OPERATIONS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"})
MODEL: dict[str, Any] = {
    "architectures": ["Ministral3ForCausalLM"],
    "model_type": "ministral3",
    "dtype": "float32",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 11,
}
CONFIG: dict[str, Any] = {
    "sequence_len": 256,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "sample_packing": True,
    "max_steps": 12,
    "save_steps": 3,
    "learning_rate": 0.01,
    "warmup_steps": 2,
    "bf16": False,
    "seed": 3,
    "eval_table_size": 0,  # answers and drift have tests of their own
    "eval_drift": False,
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_dropout": 0.1}
QLORA = LORA | {"adapter": "qlora", "load_in_4bit": True}


def write_model(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A random Ministral 3 of 200,000 weights with a small Tekken vocabulary, as a model folder."""
    import torch
    from safetensors.torch import save_file

    from engine.catalog.rows import module_table

    config = MODEL | dict(changes or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    drawn = torch.Generator().manual_seed(0)
    weights = {
        p.name: torch.ones(p.shape)
        if len(p.shape) == 1
        else torch.randn(p.shape, generator=drawn) * 0.05
        for p in module_table(config).parameters
        if not p.tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tekken.json").write_text(small_tekken(), "utf-8")
    return folder


@functools.cache
def small_tekken() -> str:
    """A whole Tekken file, only cut short: every text is still encoded, in more tokens."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tekken.json")
        write_tekken(TokenizerSpec("v13", think=True), path)
        data = json.loads(path.read_text("utf-8"))
    pieces = VOCABULARY - data["config"]["default_num_special_tokens"]
    data["vocab"] = data["vocab"][:pieces]
    data["config"] |= {"num_vocab_tokens": pieces, "default_vocab_size": VOCABULARY}
    return json.dumps(data)


def write_rows(path: Path, count: int = 40) -> Path:
    """The first conversations of the sample."""
    lines = SAMPLE.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:count]), "utf-8")
    return path


class Workshop:
    """Fresh runs on one base model; `keys` are what their configs have in common."""

    def __init__(self, folder: Path, keys: Mapping[str, Any]) -> None:
        self.base = write_model(folder / "base")
        self._folder, self._keys, self._numbers = folder, keys, itertools.count()
        self._finished: dict[str, RunFolder] = {}

    def new(self, **keys: Any) -> RunFolder:
        """A run folder with rows of its own and a config.yml."""
        return self.place(self._next(), **keys)

    def finished(self, **keys: Any) -> RunFolder:
        """A copy of a run that was trained to its end, once for all that ask with these keys."""
        name = json.dumps(keys, sort_keys=True)
        if name not in self._finished:
            run = self.new(**keys)
            assert finish(run) == 0, run.log.read_text("utf-8")
            self._finished[name] = run
        copy = RunFolder(self._next())
        shutil.copytree(self._finished[name].path, copy.path)
        self.configure(copy, **keys)
        return copy

    def _next(self) -> Path:
        return self._folder / f"run-{next(self._numbers)}"

    def place(self, folder: Path, **keys: Any) -> RunFolder:
        """The same in a folder of the test's choice."""
        folder.mkdir()
        write_rows(folder / "rows.jsonl")
        self.configure(RunFolder(folder), **keys)
        return RunFolder(folder)

    def configure(self, run: RunFolder, **keys: Any) -> None:
        """Write the run's config.yml anew; JSON is YAML."""
        fixed = {
            "base_model": str(self.base),
            "datasets": [{"path": str(run.path / "rows.jsonl"), "type": "chat_template"}],
            "dataset_prepared_path": str(self._folder / "prepared"),
        }
        run.config.write_text(json.dumps(fixed | CONFIG | dict(self._keys) | keys), "utf-8")


def start(
    run: RunFolder, *arguments: str, before: Callable[[], object] | None = None, threads: int = 1
) -> BaseProcess:
    """Fork a trainer with `run FOLDER` and `arguments`, in a session of its own as a detached one.

    `before` is called inside it first: a limit, a hook, a device that fails.
    """
    arguments = ("run", str(run.path), *arguments)
    process = _forks().Process(target=_train, args=(arguments, run.log, before, threads))
    process.start()
    return process


@functools.cache
def _forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded", __name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the server does not inherit sys.path
        forkserver.ensure_running()
    return context


def _train(
    arguments: Sequence[str], log: Path, before: Callable[[], object] | None, threads: int
) -> None:
    from engine.train.__main__ import main

    os.setsid()
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if before:
        before()
    sys.exit(main(list(arguments)))


def finish(run: RunFolder, *arguments: str, before: Callable[[], object] | None = None) -> int:
    """Run a trainer to its end; returns its exit status, negative for a signal."""
    process = start(run, *arguments, before=before)
    return wait(process)


def wait(process: BaseProcess, seconds: float = 120.0) -> int:
    """The exit status of a trainer that ends by itself; it is killed where it does not."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"the trainer has not ended for {seconds:.0f} seconds")
    return process.exitcode


@contextlib.contextmanager
def training(
    run: RunFolder, *arguments: str, steps: int = 0, before: Callable[[], object] | None = None
) -> Iterator[BaseProcess]:
    """A trainer that has done `steps` steps of this launch; killed at the end where it lives."""
    follower = Follower(run.events, from_end=True)
    process = start(run, *arguments, before=before)
    try:
        seen = 0

        def far_enough() -> bool:
            nonlocal seen
            found = [recorded.event for recorded in follower.read()]
            assert process.is_alive() or found, run.log.read_text()
            seen += sum(isinstance(event, Step) for event in found)
            return seen >= steps and (steps > 0 or is_locked(run))

        wait_until(far_enough, 60)
        yield process
    finally:
        process.kill()
        process.join()


def events_of(run: RunFolder) -> list[Event]:
    """Every event of a run, in order."""
    follower = Follower(run.events)
    found: list[Event] = []
    while events := follower.read():
        found += [recorded.event for recorded in events]
    return found


def last_end(run: RunFolder) -> Ended:
    """The last event, which must be an end."""
    last = events_of(run)[-1]
    assert isinstance(last, Ended), f"{last}\n{run.log.read_text()}"
    return last


def figures(run: RunFolder) -> list[tuple[float, ...]]:
    """What must be equal, bit for bit, however often the run was stopped."""
    steps = read_steps(run)
    return [(s.step, s.epoch, s.loss, s.grad_norm, s.lr, s.tokens, s.learned_tokens) for s in steps]


def evaluations(run: RunFolder) -> dict[int, float]:
    """Evaluation loss by step, the latest where one was repeated."""
    return {event.step: event.loss for event in events_of(run) if isinstance(event, Eval)}


def at_step(number: int, action: Callable[[], object]) -> None:
    """Do `action` in this process before the `number`-th step that it makes."""
    from engine.train.batches import StepBatch
    from engine.train.loop import Training

    counted, step = 0, Training.step

    def counting(training: Training, which: int, batch: StepBatch) -> None:
        nonlocal counted
        counted += 1
        if counted == number:
            action()
        step(training, which, batch)

    Training.step = counting  # type: ignore[assignment]


def at_folder(made: str, action: Callable[[], object]) -> None:
    """Do `action` in this process when a folder whose name ends in `made` is about to be made."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.mkdir" and str(arguments[0]).endswith(made):
            action()

    sys.addaudithook(hook)


@dataclass(frozen=True, slots=True)
class DieAfter:
    """SIGKILL from inside, so that it hits one system call: the `operation`-th one on files after
    the folder `made` was made, counted by Python's audit hooks."""

    made: str
    operation: int

    def __call__(self) -> None:
        counted = -1

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal counted
            if counted < 0:
                if event != "os.mkdir" or not str(arguments[0]).endswith(self.made):
                    return
            elif event not in FILE_OPERATIONS:
                return
            counted += 1
            if counted == self.operation:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


@dataclass(frozen=True, slots=True)
class DieBeforeStep:
    """SIGKILL from inside before the `number`-th step of this launch."""

    number: int

    def __call__(self) -> None:
        at_step(self.number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hold_at_most(tokens: int, *, from_step: int = 1) -> None:
    """From a step on, a forward and backward pass of more tokens asks torch's allocator for more
    than there is, as one on a small card does: between two layers, in the middle of the pass."""
    from engine.train import loop
    from engine.train.device import pick_device
    from engine.train.forward import hidden_states as compute

    began = False
    failed: list[weakref.ref[Any]] = []

    def ask(*_: Any) -> None:
        torch.empty(2**50, dtype=torch.uint8, device=pick_device())

    def begin() -> None:
        nonlocal began
        began = True

    def hidden_states(model: Any, batch: dict[str, torch.Tensor], *more: Any) -> torch.Tensor:
        assert not any(ref() is not model and ref() for ref in failed), "held beside the next one"
        if began and batch["input_ids"].numel() > tokens:
            failed.append(weakref.ref(model))
            decoder_layers(unwrapped(model))[-1].register_forward_pre_hook(ask)
        return compute(model, batch, *more)

    pytest.MonkeyPatch().setattr(loop, "hidden_states", hidden_states)  # this process is its own
    at_step(from_step, begin)

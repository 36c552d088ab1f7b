"""What a config's run really takes, measured in a few steps on weights that are drawn.

Nothing of it is kept, and no weight has to be downloaded first. What holds the weights, what is
trained and how a step is made are a run's own functions. It ends in the figures, or in a sentence
on where memory ran out on the way.
"""

import gc
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from engine.catalog import Architecture, read_architecture
from engine.chat.tokenizer import open_tokenizer
from engine.config import RunConfig, read_config
from engine.errors import DOES_NOT_FIT, UserError
from engine.events import Event, EventWriter, Phase, Recorded, Step, format_line
from engine.hardware import Machine, poll, read_machine
from engine.plan import (
    Device,
    Place,
    Statistics,
    best_device,
    cpu_device,
    estimate,
    estimate_document,
)
from engine.plan.measured import Measurement, key_of, step_bytes
from engine.plan.step import make_step
from engine.plan.trainer import refuse_unread
from engine.runs import ControlReader, RunFolder, StopSignals
from engine.train.attention import pick_attention
from engine.train.batches import Rows, StepBatch
from engine.train.checkpoint import trained_parameters
from engine.train.device import pick_device, pick_dtype
from engine.train.fetch import leave_hub
from engine.train.forward import Model, head_of
from engine.train.generate import Emit
from engine.train.loop import fill_gradients, update_weights
from engine.train.lora import put_on_training
from engine.train.loss import Loss, settle_loss
from engine.train.model import load_base
from engine.train.optim import build_optimizer, learning_rate, set_learning_rate
from engine.train.out_of_memory import is_out_of_memory, message_of
from engine.train.run import prepare_rows
from engine.train.session import Session
from engine.train.stand_in import (
    Built,
    as_it_is,
    count_rows,
    draw_weights,
    heaviest_step,
    reduce_for_cpu,
    run_length,
    synthetic_step,
)
from engine.units import gib


@dataclass(frozen=True, slots=True)
class Peak:
    """The worst moment of one piece of work."""

    allocated_bytes: int
    """All tensors together, with those from before."""
    reserved_bytes: int | None = None
    """What the allocator held; None on a CPU, which has no such store."""


class CpuPeakMemory:
    """The peak of each piece of work, by torch's allocator: a CPU's keeps none, but reports every
    block to torch's profiler, also those that a kernel takes and gives back inside one operation.

    It has to be there before what it shall count.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.peaks: dict[str, Peak] = {}
        """By the name of each piece of work."""
        self._live_bytes = 0
        gc.collect()  # an earlier measurement's garbage would be taken off this one's

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """One piece of work, whose peak is kept where it fails, too. Between two of them nothing
        may be given back or taken."""
        watched = profile(use_kineto=True, profile_memory=True)
        watched.__enter__()
        try:
            yield
        finally:
            watched.__exit__(None, None, None)
            results: Any = watched.kineto_results
            blocks = [event for event in results.events() if event.name() == "[memory]"]
            peak = self._live_bytes
            for block in sorted(blocks, key=lambda event: event.start_ns()):
                self._live_bytes += block.nbytes()  # negative for one that is given back
                peak = max(peak, self._live_bytes)
            self.peaks[name] = Peak(peak)

    def wait(self) -> None:
        """Return when everything that was asked of the device is done: a CPU has done it."""

    def device_bytes(self) -> int | None:
        """The most RAM that the process ever held, with Python and its libraries; None: unknown."""
        try:
            fields = Path("/proc/self/status").read_text("utf-8")
        except OSError:
            return None
        lines = (line.split() for line in fields.splitlines())
        return next((int(line[1]) * 1024 for line in lines if line[0] == "VmHWM:"), None)


class CudaPeakMemory(CpuPeakMemory):
    """The same by CUDA's allocator, which keeps its own, and by the driver."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._before = read_machine()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """One piece of work."""
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            self.peaks[name] = Peak(
                torch.cuda.max_memory_allocated(self.device),
                torch.cuda.max_memory_reserved(self.device),
            )

    def wait(self) -> None:
        """Wait for the card, which works behind Python's back."""
        torch.cuda.synchronize(self.device)

    def device_bytes(self) -> int | None:
        """What NVML says of this process; where it keeps that to itself, what the card lost."""
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        return used_by_process(self._before, poll(self._before), uuid, os.getpid())


def used_by_process(before: Machine, now: Machine, uuid: str, process: int) -> int | None:
    """Bytes that `process` takes of the card `uuid`, which torch writes without NVML's prefix."""
    for old, gpu in zip(before.gpus, now.gpus, strict=True):
        if not gpu.uuid.endswith(uuid):
            continue
        own = [each.memory_bytes for each in gpu.processes or () if each.pid == process]
        if own and own[0] is not None:
            return own[0]
        if gpu.memory_used_bytes is not None and old.memory_used_bytes is not None:
            return max(0, gpu.memory_used_bytes - old.memory_used_bytes)
    return None


def open_peak_memory(device: torch.device) -> CpuPeakMemory:
    """The memory of the device on which a run would compute."""
    return CudaPeakMemory(device) if device.type == "cuda" else CpuPeakMemory()


LOADING = "loading the model"
ATTACHING = "putting on what is trained"
OPTIMIZER = "making the optimizer"


class ReportingSession(Session):
    """A session whose events also go, as lines, to whoever started the process."""

    def __init__(self, run: RunFolder, emit: Emit) -> None:
        control = ControlReader(run.control)
        super().__init__(run, EventWriter(run.events), control, StopSignals())
        self._emit_line, self._count = emit, 0

    def emit(self, event: Event) -> None:
        """Pass one event on in the form that it has in events.jsonl."""
        self._emit_line(json.loads(format_line(Recorded(self._count, time.time(), event))))
        self._count += 1


@dataclass(frozen=True, slots=True)
class Data:
    """What the measured step is made of, and what is known of the run's length."""

    batch: StepBatch
    statistics: Statistics | None
    steps: int | None
    """Of the whole run; None where no rows and no max_steps say it."""
    tokens: int | None
    """Of the whole run; None without rows."""


@dataclass(frozen=True, slots=True)
class Pace:
    """One measured step."""

    loss: float
    gradient_seconds: float
    """Of all its forward and backward passes."""
    update_seconds: float


def check(run: RunFolder, steps: int, emit: Emit) -> None:
    """Measure the config of a folder, and emit events and, at the end, the record `fitted`.

    Raises UserError with exit status 3 where memory runs out, in the three sentences.
    """
    leave_hub()
    session = ReportingSession(run, emit)
    config = read_config(run.config).config
    # Only real weights can give an adapter to go on from.
    config = config.model_copy(update={"lora_model_dir": None})
    device = pick_device()
    machine = read_machine()
    place = best_device(machine) if device.type == "cuda" else cpu_device(machine)
    rows = _find_rows(config, session)
    statistics = count_rows(rows, config) if rows else None
    architecture = read_architecture(config.base_model)
    built = as_it_is(architecture)
    if place.kind != "cuda":
        built = reduce_for_cpu(architecture, config, place, statistics)
    session.base_folder = run.path / "model"
    session.base_folder.mkdir()
    content = json.dumps(built.architecture.config)
    (session.base_folder / "config.json").write_text(content, "utf-8")
    built = replace(built, architecture=read_architecture(session.base_folder))
    if not built.whole:
        session.note("warning", built.sentence())
    images = config.processor_type is not None
    if rows:
        images = "image" in rows.prepared.tokens_by_kind()
    attention = pick_attention(config, built.architecture, device, images=images)
    settled = config.model_copy(update={"attn_implementation": attention.backend})
    if rows:
        data = Data(heaviest_step(rows, config), statistics, *run_length(rows, config))
    else:
        data = Data(synthetic_step(built.architecture, config), None, config.max_steps, None)
    memory = open_peak_memory(device)
    model = _build(built.architecture, settled, session, memory, images=images)
    planned = estimate(config, Place(built.architecture, place, statistics))
    loss, note = settle_loss(settled, head_of(model), device, planned.loss_chunk_bytes)
    session.note("info", note)
    paces = _step(model, settled, loss, data.batch, steps, session, memory)
    emit({"fitted": _figures(built, config, place, data, memory, paces)})


def _find_rows(config: RunConfig, session: Session) -> Rows | None:
    """The person's own rows; None, with a note on why, where they or their tokenizer are not here.

    Raises UserError where the model cannot read them.
    """
    try:
        tokenizer = open_tokenizer(config.tokenizer_config or config.base_model)
        rows, _ = prepare_rows(config, tokenizer, session)
    except UserError as error:
        session.note("warning", f"Random tokens stand in for the rows. {error.what}")
        return None
    if not len(rows):
        session.note("warning", "Random tokens stand in for the rows. None can be used.")
        return None
    refuse_unread(read_architecture(config.base_model), rows.prepared.image_spec)
    return rows


def _build(
    architecture: Architecture,
    config: RunConfig,
    session: Session,
    memory: CpuPeakMemory,
    *,
    images: bool,
) -> Model:
    """The model as it trains, its weights drawn."""
    folder = session.base_folder
    session.emit(Phase("load", detail=f"{architecture.class_name}, random weights"))
    with _part(LOADING, memory):
        weights = draw_weights(architecture, pick_dtype(config, memory.device), memory.device, 0)
        base = load_base(folder, config, session.progress("load"), weights, images=images)
    session.note("info", base.report.sentence())
    with _part(ATTACHING, memory):
        torch.manual_seed(config.seed)
        model = put_on_training(base, folder, config)
        model.train()
    return model


def _step(
    model: Model,
    config: RunConfig,
    way: Loss,
    batch: StepBatch,
    steps: int,
    session: Session,
    memory: CpuPeakMemory,
) -> list[Pace]:
    """Make `steps` steps of the same batch, at the learning rate of a run's first."""
    with _part(OPTIMIZER, memory):
        named = list(trained_parameters(model))
        optimizer = build_optimizer(named, config)
    parameters = [parameter for _, parameter in named]
    set_learning_rate(optimizer, learning_rate(1, max(steps, 1), config))
    paces = []
    for number in range(1, steps + 1):
        with _part(f"step {number}", memory):
            started = time.perf_counter()
            loss, norm = fill_gradients(model, parameters, batch, memory.device, config, way)
            memory.wait()
            updating = time.perf_counter()
            update_weights(optimizer)
            memory.wait()
            ended = time.perf_counter()
        paces.append(Pace(loss, updating - started, ended - updating))
        session.emit(
            Step(
                step=number,
                epoch=0.0,
                loss=loss,
                learned_tokens=batch.learned_tokens,
                tokens=batch.tokens,
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=norm,
                seconds=ended - started,
                tokens_per_second=batch.tokens / (ended - started),
                peak_memory_bytes=memory.peaks[f"step {number}"].allocated_bytes,
                total_steps=steps,
            )
        )
    return paces


@contextmanager
def _part(name: str, memory: CpuPeakMemory) -> Iterator[None]:
    """A measured piece of work. Where memory runs out in it, the error says so."""
    try:
        with memory.measure(name):
            yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        peak = memory.peaks.get(name)
        raise UserError(
            f"It does not fit: memory ran out in {name}.",
            f"{gib(peak.allocated_bytes) if peak else 'nothing yet'} were allocated at the most; "
            f"the system says: {message_of(error)}.",
            "Set gradient_checkpointing: true or adapter: qlora, or lower micro_batch_size or "
            "sequence_len; `windtunnel estimate` shows what each part takes.",
            exit_status=DOES_NOT_FIT,
        ) from error


def _figures(
    built: Built,
    config: RunConfig,
    place: Device,
    data: Data,
    memory: CpuPeakMemory,
    paces: list[Pace],
) -> dict[str, Any]:
    """The record for whoever asked: figures, the formula's, and the measurement to be stored."""
    step = make_step(config, Place(built.architecture, place, data.statistics))
    needs = estimate(config, step.place)
    peaks = [memory.peaks[f"step {n + 1}"] for n in range(len(paces))]
    reserved = [peak.reserved_bytes for peak in peaks if peak.reserved_bytes is not None]
    loading = [memory.peaks[name].allocated_bytes for name in (LOADING, ATTACHING, OPTIMIZER)]
    later = paces[1:] or paces  # the first step makes the optimizer's state and warms up
    micros = len(data.batch.micros)
    micro_seconds = sum(p.gradient_seconds for p in later) / len(later) / micros
    update_seconds = sum(p.update_seconds for p in later) / len(later)
    step_seconds = config.gradient_accumulation_steps * micro_seconds + update_seconds
    micro_tokens = data.batch.tokens / micros
    speed = config.gradient_accumulation_steps * micro_tokens / step_seconds
    measurement = Measurement(
        key=key_of(step),
        model=built.architecture.class_name,
        peak_allocated_bytes=max(peak.allocated_bytes for peak in peaks),
        peak_reserved_bytes=max(reserved, default=None),
        device_bytes=memory.device_bytes(),
        load_peak_bytes=max(loading),
        tokens_per_second=speed,
        formula_bytes=step_bytes(needs),
        measured_at=time.strftime("%Y-%m-%d", time.gmtime()),
    )
    return {
        "measurement": asdict(measurement),
        "estimate": estimate_document(needs) | {"step_bytes": step_bytes(needs)},
        "device": place.name,
        "kind": place.kind,
        "layers": built.layers,
        "of_layers": built.of_layers,
        "widths_divided_by": built.factor,
        "whole": built.whole,
        "own_rows": data.statistics is not None,
        "tokens": int(micro_tokens),
        "losses": [pace.loss for pace in paces],
        "step_seconds": step_seconds,
        "run_seconds": _run_seconds(
            built, data, micro_seconds / micro_tokens, update_seconds, speed
        ),
        "total_steps": data.steps,
    }


def _run_seconds(
    built: Built, data: Data, token_seconds: float, update_seconds: float, speed: float
) -> float | None:
    """Of the whole run, without its evaluations; None where its length is not known."""
    if not built.whole or data.steps is None:
        return None
    if data.tokens is None:
        return data.steps * (data.batch.tokens / speed)
    return data.tokens * token_seconds + data.steps * update_seconds

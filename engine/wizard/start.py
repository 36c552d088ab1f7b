"""A machine, a config and a plan, asked for in words or by a file; why and how a run is started."""

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from engine.catalog import Architecture, UnknownModel, read_architecture
from engine.chat.tokenizer_file import check_tokenizer, tokenizer_name
from engine.child import TRAINER, torch_process
from engine.config import (
    RunConfig,
    assignment,
    parse_config,
    read_config,
    require_supported,
    write_config,
)
from engine.data.sources import with_absolute_paths
from engine.errors import DOES_NOT_FIT, UserError
from engine.events import Recorded, parse
from engine.hardware import Machine, assume, cuda_environment, missing_packages, read_machine
from engine.launch import launch, require_torch
from engine.plan import (
    Device,
    Estimate,
    Place,
    best_device,
    estimate,
    make_fit,
    plan_document,
)
from engine.plan.crew import crew_of
from engine.plan.device import devices_document
from engine.plan.layout import layout_of, refuse_spread
from engine.plan.measured import Measurement, store
from engine.plan.remarks import refuse_busy_memory
from engine.plan.trainer import refuse_bf16, refuse_other_formats
from engine.runs import RunFolder, create_run, run_home
from engine.units import gib
from engine.visible import visible
from engine.wizard.draft import Draft, count_config_rows

_NEEDED: Final = frozenset({"torch", "transformers", "peft", "safetensors"})
"""Without one of them no run begins; the others are for some methods only."""


def why_not(draft: Draft) -> UserError | None:
    """Why the draft's run cannot start on this computer, None where it can. Starts nothing."""
    try:
        _require_startable(draft)
    except UserError as error:
        return error
    return None


def start_run(draft: Draft, *, home: Path | None = None) -> RunFolder:
    """Start the draft's run, detached: it outlives the wizard and the terminal.

    Its folder is the config's `output_dir`, else one of the draft's name (with -2, -3 and so on
    where that is taken) under `run_home(home)`. Relative paths start at the working directory.
    Raises UserError for what `why_not` says and for a name that cannot be used, WorkError where
    the folder or the trainer cannot be made.
    """
    _require_startable(draft)
    config = with_absolute_paths(draft.config(), Path.cwd())
    text, plan = draft.config_text(config), draft.plan()
    run = create_run(draft.run_name(), output_dir=config.output_dir, home=home)
    launch(run, detach=True, config=text, plan=plan)
    return run


@dataclass(frozen=True, slots=True)
class Created:
    """A run that can be launched."""

    run: RunFolder
    config: str
    """Text of its config.yml."""
    resume: bool
    checkpoint: str | None
    """Name of the checkpoint to go on from, None for the newest."""


def create(
    file: Path, changes: Sequence[str], home: Path | None, name: str | None = None
) -> Created:
    """The run folder for a config file and its changes.

    Paths in the config are relative to its file; in the run folder they are absolute. Raises
    UserError where the config or the folder cannot be used.
    """
    given = read_config(file).override(changes)
    given.require_supported()
    config = with_absolute_paths(given.config, file.absolute().parent)
    start_from = config.resume_from_checkpoint
    run = create_run(
        name or run_name(file),
        output_dir=config.output_dir,
        home=home,
        resume=bool(start_from),
    )
    checkpoint = Path(start_from).name if isinstance(start_from, str) else None
    if checkpoint and not (run.checkpoints / checkpoint).is_dir():
        raise UserError(
            f"{visible(str(run.path), one_line=True)} has no checkpoint {visible(checkpoint)}.",
            "resume_from_checkpoint names one of the run's own folder.",
            "Set it to true for the newest, or to the name of one in its checkpoints folder.",
        )
    return Created(run, write_config(config, document=given.document), bool(start_from), checkpoint)


def run_name(file: Path) -> str:
    """A run's name from its config's: what a folder's name cannot hold becomes a dash."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._")[:80] or "run"


def save_config(draft: Draft, path: Path) -> Path:
    """Write the draft's config, whole or not at all, over what is there; gives the absolute path.

    Its own paths start at its folder: written elsewhere than in the working directory, they become
    absolute. Raises UserError where an answer is missing, WorkError where it cannot be written.
    """
    path = path.expanduser().absolute()
    config = draft.config()
    if path.parent != Path.cwd():
        config = with_absolute_paths(config, Path.cwd())
    file = parse_config(draft.config_text(config), path.name)
    write_config(file.config, path=path, document=file.document)
    return path


def free_config_path(draft: Draft) -> Path:
    """Where a draft's config is saved unless told otherwise: a new file of the run's name."""
    name, number = draft.run_name(), 1
    path = Path(f"{name}.yml")
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}.yml")
    return path


def _require_startable(draft: Draft) -> None:
    advice = draft.advice()
    device = draft.device
    assert device is not None
    if not advice.config.datasets:
        raise UserError(
            "No dataset is chosen.", "A run learns from rows.", "Choose one on the Data page."
        )
    if advice.not_trained:
        raise UserError(
            f"{visible(draft.architecture().name, one_line=True)} is not trained yet.",
            advice.not_trained,
            "Save the config, or choose another model.",
        )
    if device.planned:
        raise UserError(
            f"{visible(device.name, one_line=True)} is planned for and not here.",
            "A run starts on the computer that has it.",
            "Save the config, copy config.yml to the machine and run: windtunnel train config.yml",
        )
    require_supported(advice.config)
    if advice.config.resume_from_checkpoint:
        raise UserError(
            "This config goes on with a run that is there already.",
            "It sets resume_from_checkpoint, and the wizard starts new runs.",
            "Run it with: windtunnel train config.yml; or remove resume_from_checkpoint.",
        )
    refuse_bf16(advice.config, device)
    if advice.estimate.verdict == "does not fit":
        fix = "Plan has an answer that makes it fit, or choose a smaller model."
        raise _too_large(advice.estimate, device, fix)
    busy = "a smaller model or shorter rows need less"
    refuse_busy_memory(advice.estimate.host_bytes, busy)
    if draft.machine is not None:
        _require_stack(draft.machine, device)


def _too_large(needs: Estimate, device: Device, fix: str, ranks: int = 1) -> UserError:
    """`ranks`: those that share the device's memory."""
    name = visible(device.name, one_line=True)
    each = f"{ranks} ranks of " if ranks > 1 else ""
    return UserError(
        f"It does not fit: {each}{gib(needs.device_bytes)} are needed.",
        f"{name} can give {gib(needs.can_give_bytes)} of {gib(device.total_bytes)}.",
        fix,
        exit_status=DOES_NOT_FIT,
    )


def _require_stack(machine: Machine, device: Device) -> None:
    for missing in missing_packages(machine):
        absent = [package for package in missing.packages if package in _NEEDED]
        if absent:
            raise UserError(
                "The training stack is not installed.",
                f"Training needs {', '.join(absent)}; preview, plan and config work without.",
                f"Install it, then start: {missing.command}",
            )
    require_torch(machine, device.uuid)


# A driver that has to wake eight cards first takes longer than a page of the wizard waits.
_PATIENCE_SECONDS: Final = 15.0


def find_machine(planned: str | None) -> Machine:
    """This computer, or the one that `--assume` describes.

    Raises UserError for a GPU that is not known.
    """
    if planned is not None:
        return assume(planned, disk=run_home())
    return read_machine(disk=run_home(), timeout_seconds=_PATIENCE_SECONDS)


def find_device(assumed: str | None) -> Device:
    """The device that a run would use here, or the planned one.

    Raises UserError for a card that is not known.
    """
    return best_device(find_machine(assumed))


def read_planned(
    file: Path, changes: tuple[str, ...] = (), *, sharded: bool = False
) -> tuple[RunConfig, Architecture]:
    """The config of a file with its changes, and the architecture of its model.

    Raises UserError where either cannot be read, where a key would not be acted on, where the
    weights are quantized in a way that is not trained on, where experts cannot be spread as it asks
    and where the model's tokenizer is none that rows can be rendered by; with `sharded` one for
    several GPUs passes, which can be planned and not run.
    """
    given = read_config(file).override(changes)
    given.require_supported(sharded=sharded)
    config = with_absolute_paths(given.config, file.absolute().parent)
    architecture = read_architecture(config.base_model)
    refuse_other_formats(architecture.folder or Path(config.base_model), architecture.config)
    refuse_spread(layout_of(config), architecture.table)
    check_tokenizer(tokenizer_name(config), file.absolute().parent)
    return config, architecture


def is_laid_out(config: RunConfig) -> bool:
    """Whether a config says anything of the cards that it is for."""
    sizes = ("fsdp_config", "dp_shard_size", "dp_replicate_size", "tensor_parallel_size")
    return any(getattr(config, key) is not None for key in sizes)


def spread_on(config: RunConfig, device: Device) -> RunConfig:
    """A config as `spread` has it on the cards of `device`."""
    if is_laid_out(config) or device.cards == 1:
        return config
    return config.model_copy(update={"dp_replicate_size": device.cards})


def spread(file: Path, changes: tuple[str, ...], nodes: int = 1) -> tuple[str, ...]:
    """`changes` with the size that a config without any has here, as Axolotl reads it: a copy of
    the model on each card that is free, so that its run goes on with as many elsewhere.

    A run that goes on keeps what it began with.
    """
    config = read_config(file).override(changes).config
    if is_laid_out(config):
        return changes
    copies = find_device(None).count * nodes
    if config.resume_from_checkpoint and config.output_dir:
        begun = RunFolder(file.absolute().parent / config.output_dir).config
        copies = (read_config(begun).config.dp_replicate_size if begun.exists() else None) or 1
    return (*changes, f"dp_replicate_size={copies}") if copies > 1 else changes


def plan_run(
    file: Path, changes: tuple[str, ...], *, anyway: bool = False, nodes: int = 1
) -> dict[str, object] | None:
    """The plan of a config's run on this machine, one of `nodes` alike, for its folder.

    None where the model's shape is not known before it is fetched. Raises UserError where the
    installed torch cannot use the card that the plan is for, and with exit status 3 where this
    computer cannot start the config's ranks, and where the run does not fit, unless `anyway`.
    """
    machine = find_machine(None)
    device = replace(best_device(machine), nodes=nodes)
    asked = read_config(file).override(changes).config
    crew = crew_of(asked, machine, nodes)
    if nodes > 1 and asked.output_dir is None:
        raise UserError(
            "The computers need one folder for the run.",
            "Without output_dir each of them would make one of its own.",
            "Set output_dir to a folder on a disk that all of them see.",
        )
    try:
        config, architecture = read_planned(file, changes)
    except UnknownModel:
        require_torch(machine, device.uuid)
        return None
    refuse_bf16(config, device)
    statistics, _ = count_config_rows(config, architecture, file.absolute().parent)
    place = Place(architecture, device, statistics)
    needs = estimate(config, place)
    if not anyway:
        if needs.verdict == "does not fit":
            raise _too_large(needs, device, _what_fits(config, place))
        if device.kind == "cpu" and crew.count * needs.device_bytes > device.can_give_bytes:
            raise _too_large(needs, device, _ANYWAY, crew.count)
        refuse_busy_memory(needs.host_bytes, "--anyway starts it all the same")
    require_torch(machine, device.uuid)
    return plan_document(needs, device) | devices_document(device, crew.count * nodes)


_ANYWAY = "Write a smaller dp_shard_size or dp_replicate_size; --anyway starts it all the same."


def _what_fits(config: RunConfig, place: Place) -> str:
    rungs = make_fit(config, place)
    fix = "Train it on a larger GPU"
    if rungs and rungs[-1].estimate.verdict != "does not fit":
        values = " ".join(assignment(*change) for change in rungs[-1].changes.items())
        fix = f"It fits with: {values}; these can stand behind the config. Or use a larger GPU"
    return f"{fix}; --anyway starts it all the same."


STEPS: Final = 3
"""The first makes the optimizer's state and warms up; the others are timed."""


def measure(
    run: RunConfig,
    steps: int = STEPS,
    module: str = TRAINER,
    show: Callable[[Recorded], object] | None = None,
) -> dict[str, Any]:
    """The record of a process that measures `run` here; `show` gets its events.

    Paths of `run` are absolute. Raises UserError with exit status 3 where memory runs out.
    """
    with tempfile.TemporaryDirectory(prefix="windtunnel-fit-") as scratch:
        folder = RunFolder(Path(scratch).resolve())
        write_config(run, {}, folder.config)
        arguments = ["fit", str(folder.path), "--steps", str(steps)]
        with torch_process(arguments, _one_gpu(), module) as process:
            for record in process.listen(until="fitted"):
                event = parse(record)
                if event and show:
                    show(Recorded(record["seq"], record["time"], event))
    found: dict[str, Any] = record["fitted"]
    return found


def measure_and_keep(run: RunConfig) -> dict[str, Any]:
    """Measure `run` here and keep the figures, which the estimate has from then on.

    Raises what `measure` raises.
    """
    fitted = measure(run)
    store(Measurement(**fitted["measurement"]))
    return fitted


def _one_gpu() -> dict[str, str]:
    """What makes CUDA show the process the card that a run would be given."""
    machine = find_machine(None)
    uuid = best_device(machine).uuid
    require_torch(machine, uuid)
    return cuda_environment([gpu for gpu in machine.gpus if gpu.uuid == uuid] if uuid else [])

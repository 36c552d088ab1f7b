"""What is asked for in a word or a file, read and judged: a machine, a config, its run's plan."""

from pathlib import Path
from typing import Final

from engine.catalog import Architecture, UnknownModel, read_architecture
from engine.chat.tokenizer_file import check_tokenizer, tokenizer_name
from engine.config import RunConfig, assignment, read_config
from engine.data.sources import with_absolute_paths
from engine.errors import DOES_NOT_FIT, UserError
from engine.hardware import Machine, assume, read_machine
from engine.launch import require_torch
from engine.plan import Device, Statistics, best_device, estimate, make_fit, plan_document
from engine.plan.trainer import refuse_bf16
from engine.runs import run_home
from engine.units import gib
from engine.wizard.draft import count_config_rows

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

    Raises UserError where either cannot be read, where a key would not be acted on and where the
    model's tokenizer is none that rows can be rendered by; with `sharded` one for several GPUs
    passes, which can be planned and not run.
    """
    given = read_config(file).override(changes)
    given.require_supported(sharded=sharded)
    config = with_absolute_paths(given.config, file.absolute().parent)
    architecture = read_architecture(config.base_model)
    check_tokenizer(tokenizer_name(config), file.absolute().parent)
    return config, architecture


def plan_run(
    file: Path, changes: tuple[str, ...], *, anyway: bool = False
) -> dict[str, object] | None:
    """The plan of a config's run on this machine, for its folder.

    None where the model's shape is not known before it is fetched. Raises UserError where the
    installed torch cannot use the card that the plan is for, and with exit status 3 where the run
    does not fit, unless `anyway`.
    """
    machine = find_machine(None)
    device = best_device(machine)
    try:
        config, architecture = read_planned(file, changes)
    except UnknownModel:
        require_torch(machine, device.uuid)
        return None
    refuse_bf16(config, device)
    statistics, _ = count_config_rows(config, architecture, file.absolute().parent)
    needs = estimate(config, architecture, device, statistics)
    if needs.verdict == "does not fit" and not anyway:
        raise _too_large(config, architecture, device, statistics)
    require_torch(machine, device.uuid)
    return plan_document(needs, device)


def _too_large(
    config: RunConfig, architecture: Architecture, device: Device, statistics: Statistics | None
) -> UserError:
    needs = estimate(config, architecture, device, statistics)
    rungs = make_fit(config, architecture, device, statistics)
    fix = "Train it on a larger GPU"
    if rungs and rungs[-1].estimate.verdict != "does not fit":
        values = " ".join(assignment(*change) for change in rungs[-1].changes.items())
        fix = f"It fits with: {values}; these can stand behind the config. Or use a larger GPU"
    return UserError(
        f"It does not fit: {gib(needs.device_bytes)} are needed.",
        f"{device.name} can give {gib(needs.can_give_bytes)} of {gib(device.total_bytes)}.",
        f"{fix}; --anyway starts it all the same.",
        exit_status=DOES_NOT_FIT,
    )

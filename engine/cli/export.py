"""`export`: a config as a job for a cluster, or for another trainer, and its sending."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from engine.cli.terminal import AsJson, ConfigPath, print_lines
from engine.config import RunConfig, read_config
from engine.errors import UserError, WorkError
from engine.files import write_whole
from engine.plan.layout import layout_of
from engine.report import Line
from engine.wizard.start import run_name

if TYPE_CHECKING:
    from engine.cluster.job import Job
    from engine.cluster.slurm import Places

Target = Literal["slurm"]
_EXECUTABLE: Final = 0o755


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of Slurm."""

    nodes: Annotated[
        int | None, Parameter(help="Nodes; else as many as the config's GPUs fill.")
    ] = None
    gpus_per_node: Annotated[
        int | None, Parameter(help="GPUs of a node, 0 for none; else 8 at most.")
    ] = None
    partition: Annotated[str | None, Parameter(help="Slurm's partition.")] = None
    account: Annotated[str | None, Parameter(help="Slurm's account.")] = None
    time: Annotated[str | None, Parameter(help="Time limit, as 24:00:00.")] = None
    cache: Annotated[Path | None, Parameter(help="HF_HOME of the nodes; else ours.")] = None
    environment: Annotated[
        Path | None, Parameter(help="Virtual environment of the nodes; else ours.")
    ] = None


def export(
    config: ConfigPath,
    /,
    *changes: Annotated[str, Parameter(help="Changes, such as learning_rate=1e-4.")],
    to: Annotated[Target, Parameter(help="What it is written for.")],
    out: Annotated[Path, Parameter(("--out", "-o"), help="The file to write.")],
    asked: Asked | None = None,
    submit: Annotated[bool, Parameter(help="Send the job to Slurm too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a config as a job for Slurm, and with --submit send it.

    It runs in folders that all nodes see: the config's, the hub's cache, this environment. Nodes
    fetch nothing, so --submit first looks that model and rows are there, else it says what fetches
    them. The job saves before its time limit and is queued again until the run has finished.
    """
    from engine.cluster.slurm import not_there, secrets_set, send

    asked = asked or Asked()
    file, out = config.absolute(), out.expanduser().absolute()
    given = read_config(config).override(changes)
    given.require_supported(sharded=True)
    job, places = _slurm_job(given.config, file, changes, out, asked)
    missing = list(not_there(given.config, places))
    _write(out, job.script(), file)
    if submit and missing:
        raise missing[0]
    number = send(out) if submit else None
    if as_json:
        said = [str(error) for error in missing]
        document = {"to": to, "files": [str(out)], "run": str(places.run), "job": number}
        print(json.dumps(document | {"missing": said, "allocation": asdict(job.allocation)}))
        return
    print_lines(_report(job, places, out, number, missing, secrets_set()))


def _slurm_job(
    config: RunConfig, file: Path, changes: tuple[str, ...], out: Path, asked: Asked
) -> "tuple[Job, Places]":
    from engine.cluster.job import Allocation, allocate
    from engine.cluster.slurm import Places, environment_of_ours, hub_cache, train_job

    laid_out = layout_of(config)
    ranks = laid_out.cards if laid_out else (asked.nodes or 0) * (asked.gpus_per_node or 0)
    if not ranks:
        raise UserError(
            "The config is sharded, and does not say over how many GPUs.",
            "A job asks for a number of them.",
            "Add dp_shard_size=8 behind the config, or ask with --nodes and --gpus-per-node.",
        )
    allocation = Allocation(
        *allocate(ranks, asked.nodes, asked.gpus_per_node),
        asked.partition,
        asked.account,
        asked.time,
    )
    name = run_name(out)
    run = Path(config.output_dir or Path("runs") / name).expanduser()
    places = Places(
        config=file,
        run=file.parent / run,
        cache=asked.cache.expanduser().absolute() if asked.cache else hub_cache(),
        environment=(asked.environment or environment_of_ours()).expanduser().absolute(),
    )
    return train_job(name, allocation, places, out.parent, changes), places


def _write(out: Path, text: str, config: Path) -> None:
    """Write a script that may be run. Raises UserError where that would be the config itself."""
    if out.resolve() == config.resolve():
        raise UserError(
            f"{out.name} is the config itself.",
            "The script would take its place.",
            f"Name another file: -o {config.stem}.sbatch",
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text.encode())
        out.chmod(_EXECUTABLE)
    except OSError as error:
        raise WorkError(
            f"{out} could not be written.",
            f"The system says: {error.strerror}.",
            "Choose a folder that you may write to.",
        ) from error


def _report(
    job: "Job",
    places: "Places",
    out: Path,
    number: str | None,
    missing: list[UserError],
    secrets: list[str],
) -> list[Line | str]:
    found: list[Line | str] = [
        Line("✓", "", f"{out}: {job.allocation.words()}"),
        Line("·", "", f"the run: {places.run}, which every node has to see"),
        Line("·", "", f"the model: {places.cache} (HF_HOME)"),
        Line("·", "", f"programs: {places.environment}"),
        *(Line("·", "", f"{name} is set and passes through") for name in secrets),
        *(Line("!", "", str(error)) for error in missing),
    ]
    if number is None:
        return [*found, f"Send it with: sbatch {quote(str(out))}"]
    log = job.log_pattern().replace("%%", "%").replace("%j", number)
    return [
        *found,
        f"Sent as job {number}. Watch it: squeue --job {number}",
        f"  tail -f {quote(log)}",
        f"  windtunnel watch {quote(str(places.run))}",
    ]

"""`export`: a config as a job for a cluster, or for another trainer, and its sending."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from cyclopts import Parameter

from engine.catalog import read_architecture
from engine.cli.dry_run import USUAL_CARD
from engine.cli.terminal import AsJson, Assume, ConfigPath, print_lines
from engine.config import RunConfig, read_config
from engine.data.sources import with_absolute_paths
from engine.errors import UserError, WorkError
from engine.files import write_whole
from engine.plan.layout import Layout, layout_of
from engine.report import VERDICT_MARKS, Line
from engine.units import gib
from engine.wizard.start import find_device, is_laid_out, run_name

if TYPE_CHECKING:
    from engine.cluster.automodel import Grid
    from engine.cluster.job import Allocation, Job
    from engine.cluster.shares import Share
    from engine.cluster.slurm import Places

Target = Literal["slurm", "automodel"]
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
    tensor: Annotated[int | None, Parameter(help="automodel: GPUs that share each matrix.")] = None
    pipeline: Annotated[int | None, Parameter(help="automodel: stages that share the layers.")] = (
        None
    )
    partition: Annotated[str | None, Parameter(help="Slurm's partition.")] = None
    account: Annotated[str | None, Parameter(help="Slurm's account.")] = None
    time: Annotated[str | None, Parameter(help="Time limit, as 24:00:00.")] = None
    cache: Annotated[Path | None, Parameter(help="HF_HOME of the nodes; else ours.")] = None
    environment: Annotated[
        Path | None, Parameter(help="Virtual environment of the nodes; else ours.")
    ] = None


@dataclass(frozen=True, slots=True)
class Made:
    """What is written, and what is said of it."""

    job: "Job"
    places: "Places"
    files: Mapping[Path, str]
    missing: list[UserError]
    """What has to be fetched before the job is sent."""
    lines: list[Line | str] = field(default_factory=list)
    document: dict[str, Any] = field(default_factory=dict)


def export(
    config: ConfigPath,
    /,
    *changes: Annotated[str, Parameter(help="Changes, such as learning_rate=1e-4.")],
    to: Annotated[Target, Parameter(help="What it is written for.")],
    out: Annotated[Path, Parameter(("--out", "-o"), help="The file to write.")],
    asked: Asked | None = None,
    submit: Annotated[bool, Parameter(help="Send the job to Slurm too.")] = False,
    assumed: Assume = None,
    as_json: AsJson = False,
) -> None:
    """Write a config as a job for Slurm, or for NeMo AutoModel by Slurm, and with --submit send it.

    It runs in folders that all nodes see: the config's, the hub's cache, this environment. Nodes
    fetch nothing, so --submit first looks that model and rows are there, else it says what fetches
    them. The job saves before its time limit and is queued again until the run has finished.
    automodel writes AutoModel's YAML with a script beside it, and compares what a rank holds there
    and in our own run.
    """
    from engine.cluster.slurm import secrets_set, send

    asked = asked or Asked()
    file, out = config.absolute(), out.expanduser().absolute()
    changes = _spread(config, changes, asked)
    given = read_config(config).override(changes)
    given.require_supported(sharded=True)
    if to == "slurm":
        made = _for_slurm(given.config, file, changes, out, asked)
    else:
        made = _for_automodel(given.config, file, out, asked, assumed)
    for path, text in made.files.items():
        _write(path, text, file)
    if submit and made.missing:
        raise made.missing[0]
    *_, script = made.files
    number = send(script) if submit else None
    if as_json:
        said = {
            "to": to,
            "files": [str(path) for path in made.files],
            "run": str(made.places.run),
            "job": number,
            "allocation": asdict(made.job.allocation),
            "missing": [str(error) for error in made.missing],
        }
        print(json.dumps(said | made.document))
        return
    print_lines(_report(made, script, number, secrets_set()))


def _spread(file: Path, changes: tuple[str, ...], asked: Asked) -> tuple[str, ...]:
    """`changes` with a copy of the model for each GPU that is asked for, where the config says
    nothing of GPUs."""
    ranks = (asked.nodes or 1) * (asked.gpus_per_node or 1)
    config = read_config(file).override(changes).config
    if ranks < 2 or is_laid_out(config):
        return changes
    return (*changes, f"dp_replicate_size={ranks}")


def _allocate(config: RunConfig, asked: Asked) -> "Allocation":
    from engine.cluster.job import Allocation, allocate

    laid_out = layout_of(config)
    ranks = laid_out.cards if laid_out else (asked.nodes or 0) * (asked.gpus_per_node or 0)
    if not ranks:
        raise UserError(
            "The config is sharded, and does not say over how many GPUs.",
            "A job asks for a number of them.",
            "Add dp_shard_size=8 behind the config, or ask with --nodes and --gpus-per-node.",
        )
    nodes, gpus = allocate(ranks, asked.nodes, asked.gpus_per_node)
    return Allocation(nodes, gpus, asked.partition, asked.account, asked.time)


def _place(config: RunConfig, file: Path, name: str, asked: Asked, runs: Path) -> "Places":
    from engine.cluster.slurm import Places, environment_of_ours, hub_cache

    run = Path(config.output_dir or Path("runs") / name).expanduser()
    return Places(
        config=file,
        run=runs / run,
        cache=asked.cache.expanduser().absolute() if asked.cache else hub_cache(),
        environment=(asked.environment or environment_of_ours()).expanduser().absolute(),
    )


def _for_slurm(
    config: RunConfig, file: Path, changes: tuple[str, ...], out: Path, asked: Asked
) -> Made:
    from engine.cluster.slurm import not_there, train_job

    allocation, name = _allocate(config, asked), run_name(out)
    places = _place(config, file, name, asked, file.parent)
    job = train_job(name, allocation, places, out.parent, changes)
    return Made(job, places, {out: job.script()}, list(not_there(config, places)))


def _for_automodel(
    config: RunConfig, file: Path, out: Path, asked: Asked, assumed: str | None
) -> Made:
    from engine.cluster.automodel import automodel_job, automodel_yaml, choose_grid, not_there
    from engine.cluster.shares import grid_share, our_shares
    from engine.plan import Place

    allocation, name = _allocate(config, asked), run_name(out)
    architecture = read_architecture(with_absolute_paths(config, file.parent).base_model)
    ranks, gpus = allocation.nodes * allocation.gpus_per_node, allocation.gpus_per_node
    tensor = asked.tensor or config.tensor_parallel_size or 0
    grid = choose_grid(architecture, ranks, gpus, tensor, asked.pipeline or 0)
    layout = layout_of(config) or Layout(shard=ranks)
    places = _place(config, out, name, asked, out.parent)
    text = automodel_yaml(config, architecture, layout, grid, places.run)
    settled = asked.environment is not None
    job = automodel_job(name, allocation, places, out.parent, grid, settled)
    here = find_device(assumed)
    card = here if here.kind == "cuda" else find_device(USUAL_CARD)
    one = replace(card, others=())
    cards = replace(one, others=(one,) * (gpus - 1), nodes=allocation.nodes)
    place = Place(architecture, cards)
    cut = grid_share(config, place, layout, grid)
    ours = list(our_shares(config, place, layout, gpus))
    return Made(
        job,
        places,
        {out: text, out.with_suffix(".sbatch"): job.script()},
        list(not_there(config, architecture, places, settled)),
        list(_compare(grid, cut, ours, place.device.name)),
        {"automodel": asdict(cut), "windtunnel": [asdict(share) for share in ours]},
    )


def _compare(grid: "Grid", cut: "Share", ours: "list[Share]", card: str) -> Iterator[Line | str]:
    yield f"what the fullest rank holds of {card}, and how long a step takes:"
    for name, share in (("AutoModel", cut), *(("here", each) for each in ours)):
        mark = VERDICT_MARKS[share.verdict]
        pace = f", {share.step_seconds:.0f} s a step" if share.step_seconds else ""
        text = f"{gib(share.device_bytes)}, {share.verdict}{pace}"
        yield Line(mark, f"{name}: {share.name}", text)
    parts = ", ".join(f"{name} {gib(size)}" for name, size in cut.parts.items())
    yield Line("·", "", f"AutoModel's by arithmetic, not measured: {parts}")
    yield Line(
        "·", "", "times by the card's data sheet; what AutoModel's ranks send is not counted"
    )
    if grid.pipeline > 1:
        idle = f"{grid.idle_share:.0%} of a step's time its stages wait for each other"
        yield Line("·", "", f"{idle}; a larger local_batch_size in the YAML makes it less")
    yield Line("·", "", "our own run gathers each layer instead: --to slurm writes that job")


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
    made: Made, script: Path, number: str | None, secrets: list[str]
) -> Iterator[Line | str]:
    places = made.places
    for path in made.files:
        yield Line("✓", "", f"{path}: {made.job.allocation.words()}")
    yield Line("·", "", f"the run: {places.run}, which every node has to see")
    yield Line("·", "", f"the model: {places.cache} (HF_HOME)")
    for name in secrets:
        yield Line("·", "", f"{name} is set and passes through")
    for error in made.missing:
        yield Line("!", "", str(error))
    yield from made.lines
    if number is None:
        yield f"Send it with: sbatch {quote(str(script))}"
        return
    yield f"Sent as job {number}. Watch it: squeue --job {number}"
    log = made.job.log_pattern().replace("%%", "%").replace("%j", number)
    yield f"  tail -f {quote(log)}"
    yield f"  windtunnel watch {quote(str(places.run))}"

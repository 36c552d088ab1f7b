"""`windtunnel train` as a job for Slurm: its script, what the nodes will not fetch, its sending."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join, quote
from typing import Final

from engine.cluster.job import SECRETS, Allocation, Job
from engine.config import RunConfig
from engine.data.sources import locate
from engine.errors import UserError, WorkError
from engine.hub_id import MODEL_FILES
from engine.publish.card import find_base
from engine.visible import visible

MEETING: Final = (
    'host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
    "port=$((20000 + SLURM_JOB_ID % 20000))  # one a job: two that share a node do not meet",
)
"""Lines of shell that say where the nodes of a job find each other."""


def hub_cache() -> Path:
    """The hub's cache of whoever asks: $HF_HOME, else its usual folder."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME).expanduser().absolute()


def environment_of_ours() -> Path:
    """The virtual environment, or the Python, that this program runs in."""
    return Path(sys.prefix)


@dataclass(frozen=True, slots=True)
class Places:
    """Folders that every node sees under the same name."""

    config: Path
    run: Path
    cache: Path
    """The hub's: HF_HOME."""
    environment: Path
    """Holds bin/windtunnel."""

    def __post_init__(self) -> None:
        for path in (self.config, self.run, self.cache, self.environment):
            require_plain(path)


def require_plain(path: Path) -> None:
    """Raises UserError for a path that a line of #SBATCH cannot hold."""
    text = str(path)
    if not text.isprintable() or any(letter in text for letter in '"\\'):
        raise UserError(
            f"{visible(text, one_line=True)} cannot stand in a script of Slurm's.",
            "A path there holds no quotes, no backslash and no invisible characters.",
            "Rename it.",
        )


def offline(places: Places) -> dict[str, tuple[str, str]]:
    """What each node is told: where programs and models are, and what NCCL says."""
    return {
        "PATH": (f'{quote(str(places.environment / "bin"))}:"$PATH"', "the same on every node"),
        "HF_HOME": (quote(str(places.cache)), "the shared cache: one copy of the model for all"),
        "HF_HUB_OFFLINE": ("1", "nodes often reach no network, and nobody waits for a download"),
        "NCCL_DEBUG": ("WARN", "says why GPUs do not reach each other, and nothing else"),
    }


def train_job(
    name: str, allocation: Allocation, places: Places, log: Path, changes: Sequence[str] = ()
) -> Job:
    """The job of a run: its folder is on the shared disk, and goes on where it was left.

    `changes` are those of the config, key=value.
    """
    require_plain(log)
    several = allocation.nodes > 1
    return Job(
        name=name,
        title=f"Windtunnel trains {places.config.name} on {allocation.words()}.",
        allocation=allocation,
        log=log,
        saves=places.run / "checkpoints" / "LATEST",
        variables=offline(places),
        before=(
            f"config={quote(str(places.config))}",
            f"run={quote(str(places.run))}",
            "# What was begun goes on from its last save.",
            'if [ -s "$run/events.jsonl" ]; then resume=true; else resume=false; fi',
            *(MEETING if several else ()),
        ),
        command=(
            'windtunnel train "$config" "output_dir=$run" "resume_from_checkpoint=$resume"',
            *((join(changes),) if changes else ()),
            *(('--nodes "$SLURM_NNODES" --rendezvous "$host:$port"',) if several else ()),
        ),
        repeats_at='[ "$status" -ne 0 ]',
    )


def not_there(config: RunConfig, places: Places) -> Iterator[UserError]:
    """What of programs, model and rows the nodes would miss, each with what brings it.

    What is local is looked for where the config stands (raises UserError where it is missing), what
    is the hub's in the shared cache.
    """
    yield from missing_program("windtunnel", places)
    _, repository = find_base(config.base_model)
    if repository is not None:
        yield from missing_model(repository, config.revision_of_model, places)
    for dataset in (*config.datasets, *config.test_datasets):
        if locate(dataset, places.config.parent).hub_id is not None:
            yield UserError(
                f"The rows of {visible(dataset.path, one_line=True)} are on the hub.",
                "A run reads them from there, which the nodes cannot do.",
                "Fetch them here, and name the folder in the config:"
                f" hf download {quote(dataset.path)} --repo-type dataset --local-dir FOLDER",
            )


def missing_program(name: str, places: Places) -> Iterator[UserError]:
    """Why the nodes would not find a command in their environment."""
    if not (places.environment / "bin" / name).exists():
        yield UserError(
            f"{places.environment} has no bin/{name}.",
            "It is the environment that the nodes are told to use.",
            "Name one on a disk that they see: --environment DIR",
        )


def missing_model(repository: str, revision: str | None, places: Places) -> Iterator[UserError]:
    """Why the nodes would not find a model of the hub, and the command that fetches it."""
    if _is_cached(repository, revision, places):
        return
    words = ["hf", "download", repository, *(["--revision", revision] if revision else [])]
    command = join([*words, *(word for each in MODEL_FILES for word in ("--include", each))])
    yield UserError(
        f"{repository} is not in the shared cache.",
        f"{places.cache} has not all of its files, and the nodes fetch nothing.",
        f"Fetch it here first: HF_HOME={quote(str(places.cache))} {command}",
    )


def _is_cached(repository: str, revision: str | None, places: Places) -> bool:
    from huggingface_hub import try_to_load_from_cache

    def find(name: str) -> Path | None:
        hub = places.cache / "hub"
        found = try_to_load_from_cache(repository, name, cache_dir=hub, revision=revision)
        return Path(found) if isinstance(found, str) else None

    if not (config := find("config.json")) or not list(config.parent.glob("*tekken*.json")):
        return False
    index = find("model.safetensors.index.json")
    if index is None:
        return find("model.safetensors") is not None
    shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return all(find(name) for name in shards)


def send(script: Path) -> str:
    """Hand a script to Slurm; returns the job's number. Raises UserError where there is no Slurm,
    WorkError where it refuses."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise UserError(
            "There is no sbatch here.",
            "Jobs are sent from a login node of the cluster.",
            f"Copy the script there and send it: sbatch {quote(str(script))}",
        ) from error
    if done.returncode:
        said = visible(done.stderr.strip() or "no reason given", one_line=True)
        raise WorkError(
            "Slurm did not take the job.",
            f"sbatch says: {said}.",
            f"Correct the lines of #SBATCH in {script}, then: sbatch {quote(str(script))}",
        )
    return done.stdout.strip().partition(";")[0]


def secrets_set() -> list[str]:
    """Those that the job would be given, by name."""
    return [name for name in SECRETS if os.environ.get(name)]

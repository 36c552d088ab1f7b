"""Where the base model's files are: a folder, the embedded demo, or the hub's cache.

The only place of the trainer that may reach the network, and only for a model that the config
names. Once the rows are there too, `leave_hub` switches the hub off for the rest of the process.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.catalog import find_model
from engine.catalog.cards import model_names
from engine.config import RunConfig
from engine.errors import UserError, WorkError
from engine.train.weight_files import BytesProgress
from engine.units import gib

FILES = ["*.json", "model*.safetensors", "*tekken*.json", "LICENSE*"]
"""What a run needs of a repository: `consolidated*.safetensors` are the same weights once more."""
POLL_SECONDS = 0.5
"""Between two looks at how much is downloaded."""
SPARE_BYTES = 2**30
"""Room that a download leaves on the disk: a full one fails whatever else is running."""


def locate_base(
    config: RunConfig, home: Path, progress: BytesProgress = lambda done, total: None
) -> Path:
    """The folder with config.json and weights of `config.base_model`; downloads a hub model.

    A relative folder starts at `home`, the config's own. Raises UserError where the model cannot be
    had, with the way to get it, and WorkError where the download fails or the disk has no room.
    """
    name = config.base_model
    local = home / Path(name).expanduser()
    if name in model_names():
        hub_id = find_model(name).hub_id
        if hub_id is None:
            from engine.train.demo import make_base

            return make_base(name)
        name = hub_id
    elif local.is_dir():
        return local.resolve()
    return _fetch(name, config.revision_of_model, progress)


def leave_hub() -> None:
    """Switch the hub off for this process and its children: from now on asking it is an error."""
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"


def refuse_full_disk(repository: str, missing_bytes: int, cache: Path) -> None:
    """Raises WorkError where the disk of `cache` has no room for `missing_bytes`."""
    disk = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free_bytes = shutil.disk_usage(disk).free
    if missing_bytes and missing_bytes + SPARE_BYTES > free_bytes:
        raise WorkError(
            f"{repository} does not fit on the disk.",
            f"{gib(missing_bytes)} are still to be downloaded, and {gib(free_bytes)} are free "
            f"where {disk} lies.",
            "Free disk space, or set HF_HOME to a disk that has it.",
        )


def _download(repository: str, revision: str | None, progress: BytesProgress) -> Path:
    """Fetch what the cache lacks of `FILES`.

    A connection that breaks is tried again from where it broke; a new process begins with the
    first file that is not complete.
    """
    cache = Path(constants.HF_HUB_CACHE)
    try:
        planned = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=FILES, dry_run=True
        )
    except DryRunError:  # the hub cannot be asked: below, the cache answers, or the error says why
        planned = []
    missing_bytes = sum(file.file_size or 0 for file in planned if file.will_download)
    refuse_full_disk(repository, missing_bytes, cache)
    blobs = cache / f"models--{repository.replace('/', '--')}" / "blobs"
    there = {path for path in _list_files(blobs) if path.suffix != ".incomplete"}
    with ThreadPoolExecutor(1) as worker:
        download = worker.submit(
            huggingface_hub.snapshot_download,
            repository,
            revision=revision,
            allow_patterns=FILES,
            max_workers=4,
        )
        while wait([download], POLL_SECONDS).not_done:
            if missing_bytes:
                done = sum(_size_bytes(path) for path in _list_files(blobs) if path not in there)
                progress(min(done, missing_bytes), missing_bytes)
    return Path(download.result())


def _list_files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _size_bytes(path: Path) -> int:
    """0 for a file that got its final name since it was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _fetch(repository: str, revision: str | None, progress: BytesProgress) -> Path:
    """Download a model, and say in three sentences why that did not work."""
    try:
        return _download(repository, revision, progress)
    except GatedRepoError as error:
        raise UserError(
            f"{repository} may only be downloaded by people who accepted its terms.",
            "The hub refused: the repository is gated and this computer is not logged in to it.",
            f"Accept the terms on huggingface.co/{repository}, then run `hf auth login`.",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"There is no model {repository}"
            + (f" at revision {revision}." if revision else " on the hub."),
            "It is no folder here, no name of the catalog, and the hub does not know it.",
            "Check the spelling; `windtunnel models` lists the catalog. Private models need "
            "`hf auth login`.",
        ) from error
    except httpx2.TransportError as error:
        raise WorkError(
            f"{repository} could not be downloaded.",
            f"The connection to the hub broke off: {type(error).__name__}.",
            "Start again: files that are complete are not fetched twice.",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise WorkError(
            f"{repository} could not be downloaded.",
            f"The hub cannot be reached and the files are not in this computer's cache: "
            f"{type(error).__name__}.",
            "Check the connection and start again (files that are complete are not fetched twice), "
            "or point base_model at a folder.",
        ) from error
    except OSError as error:
        raise WorkError(
            f"{repository} could not be stored.",
            f"The system says: {error.strerror or error}.",
            "Free disk space, or set HF_HOME to a disk that has it.",
        ) from error

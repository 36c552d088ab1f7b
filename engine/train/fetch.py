"""Where the base model's files are: a folder, the embedded demo, or the hub's cache.

The only place of the trainer that may reach the network, and only for a model that the config
names. Once the rows are there too, `leave_hub` switches the hub off for the rest of the process.

The demo's bases are the real vocabulary on three tiny layers. Their embedding (16.8 million numbers
that nobody trained) is drawn here from a seed, by integer arithmetic that gives the same bits on
every machine; only the layers are shipped, and `make base` remakes those from the sample's plain
answers. The base that sees has the same layers, and a vision tower that has learned nothing.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import numpy as np
import platformdirs
import torch
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
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.catalog import find_model
from engine.catalog.cards import model_names
from engine.catalog.rows import module_table
from engine.chat.tokenizer import write_tekken
from engine.config import RunConfig
from engine.data.prepared import mix
from engine.errors import UserError, WorkError
from engine.files import partial_name, said, sync_all, way_out
from engine.hub_id import MODEL_FILES
from engine.train.weight_files import BytesProgress
from engine.units import gib

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
    """Fetch what the cache lacks of `MODEL_FILES`.

    A connection that breaks is tried again from where it broke; a new process begins with the
    first file that is not complete.
    """
    cache = Path(constants.HF_HUB_CACHE)
    try:
        planned = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=MODEL_FILES, dry_run=True
        )
    except DryRunError:  # the hub cannot be asked: below, the cache answers, or the error says why
        planned = []
    missing_bytes = sum(file.file_size or 0 for file in planned if file.will_download)
    refuse_full_disk(repository, missing_bytes, cache)
    blobs = cache / f"models--{repository.replace('/', '--')}" / "blobs"
    there = {path for path in blobs.glob("*") if path.suffix != ".incomplete"}
    with ThreadPoolExecutor(1) as worker:
        download = worker.submit(
            huggingface_hub.snapshot_download,
            repository,
            revision=revision,
            allow_patterns=MODEL_FILES,
            max_workers=4,
        )
        while wait([download], POLL_SECONDS).not_done:
            if missing_bytes:
                done = sum(_size_bytes(path) for path in blobs.glob("*") if path not in there)
                progress(min(done, missing_bytes), missing_bytes)
    return Path(download.result())


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
            f"The system says: {said(error)}.",
            f"{way_out(error)}, or set HF_HOME to a disk that has it.",
        ) from error


SEED = 0
SPREAD = 0.25
"""Standard deviation of the embedding. The head is the embedding again: at the usual 0.02 no logit
could reach the 11.8 nats that 131,072 words need."""
EMBEDDING = "model.embed_tokens.weight"
TOWER_SPREAD = 0.06
"""Standard deviation of an untrained tower's matrices: wide enough for 64 columns to carry what
the pixels say."""
_BLOCK_ROWS = 8192


def draw_embedding(rows: int, width: int, seed: int = SEED, spread: float = SPREAD) -> Tensor:
    """Nearly normal numbers, float32 (rows, width): sums of eight bytes of a counter's hash.

    Eight uniform bytes of one splitmix64 value have mean 1020 and variance 8 * (256^2 - 1) / 12
    (Irwin and Hall); no rounding mode, library version or thread count changes a bit of them.
    """
    out = np.empty((rows, width), np.float32)
    scale = np.float32(spread / np.sqrt(8 * (256**2 - 1) / 12))
    for start in range(0, rows, _BLOCK_ROWS):
        stop = min(rows, start + _BLOCK_ROWS)
        counters = np.arange(start * width, stop * width, dtype=np.uint64)
        bytes_ = mix(counters, seed).astype("<u8").view(np.uint8).reshape(-1, 8)
        sums: NDArray[np.int32] = bytes_.sum(axis=1, dtype=np.int32) - 1020
        out[start:stop] = (sums.astype(np.float32) * scale).reshape(-1, width)
    return torch.from_numpy(out)


def shipped_layers() -> dict[str, Tensor]:
    """The trained layers, bfloat16, by their names in the model."""
    with as_file(files("presets") / "demo" / "layers.safetensors") as path:
        return load_file(path)


def make_base(name: str = "demo-tiny") -> Path:
    """The base of that name as a folder like any model's, made once in the user's cache.

    Raises WorkError where the cache cannot be written.
    """
    layers = shipped_layers()
    if "vision_config" in find_model(name).config:
        layers = with_tower(layers, find_model(name).config)
    return write_base(name, layers, platformdirs.user_cache_path("windtunnel") / "models")


def with_tower(layers: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The language model's layers by their names in `config`'s model, and its tower untrained."""
    named = {_in_vision_model(key): value for key, value in layers.items()}
    for seed, parameter in enumerate(module_table(config).parameters, start=1):
        if parameter.group in ("vision", "projector"):
            rows, width = parameter.shape[0], math.prod(parameter.shape[1:])
            drawn = draw_embedding(rows, width, seed, TOWER_SPREAD).view(parameter.shape)
            is_norm = len(parameter.shape) == 1
            named[parameter.name] = torch.ones(parameter.shape) if is_norm else drawn
    return named


def _in_vision_model(name: str) -> str:
    """What a language model's tensor is called inside a model that sees."""
    return f"model.language_model.{name.removeprefix('model.')}"


def write_base(name: str, layers: dict[str, Tensor], cache: Path) -> Path:
    """Write config.json, weights and tokenizer for `layers` below `cache`, unless they are there.

    The folder's name carries a hash of all that went into it, so another version makes another.
    """
    card = find_model(name)
    config = dict(card.config)
    digest = hashlib.sha256(json.dumps([config, SEED, SPREAD], sort_keys=True).encode())
    for key in sorted(layers):
        digest.update(key.encode() + layers[key].contiguous().view(torch.uint8).numpy().tobytes())
    target = cache / f"{name}-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    partial = partial_name(target)
    try:
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        weights = {key: value.float() for key, value in layers.items()}
        text, name_of = config, EMBEDDING
        if "text_config" in config:
            text, name_of = config["text_config"], _in_vision_model(EMBEDDING)
        weights[name_of] = draw_embedding(text["vocab_size"], text["hidden_size"])
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        write_tekken(card.tokenizer, partial / "tekken.json")
        sync_all(partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster: it wrote the same
                raise
    except (OSError, SafetensorError) as error:
        raise WorkError(
            f"The demo's base model could not be written to {cache}.",
            f"The system says: {getattr(error, 'strerror', None) or error}.",
            "Free 90 MB there, or point XDG_CACHE_HOME at a disk that has them.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target

"""The embedded base models of the demo: the real vocabulary on three tiny layers, made on the spot.

The embedding (16.8 million numbers that nobody trained) is drawn here from a seed, by integer
arithmetic that gives the same bits on every machine; only the layers are shipped, as
`presets/demo/layers.safetensors`. `make base` remakes those from the sample's plain answers. The
base that sees has the same layers, and a vision tower that is drawn too and has learned nothing.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.catalog import find_model
from engine.catalog.rows import module_table
from engine.chat.tokenizer import spec_of, write_tekken
from engine.data.pack import mix
from engine.errors import WorkError

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
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        weights = {key: value.float() for key, value in layers.items()}
        text, name_of = config, EMBEDDING
        if "text_config" in config:
            text, name_of = config["text_config"], _in_vision_model(EMBEDDING)
        weights[name_of] = draw_embedding(text["vocab_size"], text["hidden_size"])
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        write_tekken(spec_of(card), partial / "tekken.json")
        _put_in_place(partial, target)
    except (OSError, SafetensorError) as error:
        raise WorkError(
            f"The demo's base model could not be written to {cache}.",
            f"The system says: {getattr(error, 'strerror', None) or error}.",
            "Free 90 MB there, or point XDG_CACHE_HOME at a disk that has them.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _put_in_place(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster: it wrote the same
            raise

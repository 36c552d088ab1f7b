"""From what a person wrote (a catalog name, a folder, a hub id) to a model that may be built.

The word of a stranger's config.json is taken or refused here: the architecture has to be on the
allow-list, and the file may not choose code or kernels. Nothing is fetched: a hub id is looked up
in this computer's cache and in the catalog.
"""

import json
import os
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engine.catalog.cards import ModelCard, find_model, find_repository, model_names
from engine.catalog.modules import ModuleTable
from engine.errors import UserError
from engine.visible import visible

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Spelled with and without underscores in front, and with endings such as `_internal`.
_KERNEL_KEY = re.compile(r"_*(attn|experts)_implementation")
_CHECKPOINT_OF_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class UnknownModel(UserError):
    """A hub id whose config.json is neither here nor in the catalog: that would be a fetch."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model that may be built, and what its files say of it."""

    name: str
    """As the person wrote it."""
    class_name: str
    """The transformers class, one of the allow-list."""
    config: Mapping[str, Any]
    """config.json without the keys that choose code: build from this, never from the file."""
    table: ModuleTable
    checkpoint: str
    """How the weights are stored: bf16, fp8, or another word of the file, such as gptq."""
    folder: Path | None
    """Where config.json was found; None when it is the catalog's."""
    card: ModelCard | None
    """The catalog's card, where the model is one of its repositories."""
    notes: tuple[str, ...]
    """What was ignored or assumed, a sentence each."""


def read_architecture(model: str | Path) -> Architecture:
    """The architecture of a catalog name, a local folder, or a hub id.

    A catalog name means the catalog even where a folder has the same name; `./name` means the
    folder. Raises UserError where nothing is found, where config.json cannot be read, and where it
    describes what may not be built.
    """
    name = str(model)
    is_path = isinstance(model, Path)
    if not is_path and name in model_names():
        return _read_catalog(name)
    # os.path, unlike pathlib, answers a name that no file system can hold with False.
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return _read_folder(name, Path(folder), None)
    if not is_path and _HUB_ID.fullmatch(name):
        return _read_hub_id(name)
    if is_path or os.sep in name or name.startswith((".", "~")):
        raise UserError(
            f"There is no folder {visible(name, one_line=True)}.",
            "The model was to be read from there.",
            "Check the path, or name a model that `windtunnel models` lists.",
        )
    return _read_catalog(name)


@cache
def _read_catalog(name: str) -> Architecture:
    card = find_model(name)
    checkpoint = card.repositories[0].checkpoint if card.repositories else None
    return _check(card.name, deepcopy(dict(card.config)), None, card, checkpoint)


def _read_hub_id(repo_id: str) -> Architecture:
    # Imported here: the wizard's first frame needs no hub.
    from huggingface_hub import try_to_load_from_cache

    listed = find_repository(repo_id)
    card = listed[0] if listed else None
    cached = try_to_load_from_cache(repo_id, "config.json")
    if isinstance(cached, str):
        return _read_folder(repo_id, Path(cached).parent, card)
    if listed:
        card, repository = listed
        return _check(repo_id, deepcopy(dict(card.config)), None, card, repository.checkpoint)
    raise UnknownModel(
        f"{repo_id} is not on this computer.",
        "It is neither a folder here, nor in the hub cache, nor in the catalog; nothing is fetched "
        "unless you ask.",
        f"Fetch its description with `hf download {repo_id} config.json`, or name a folder.",
    )


def _read_folder(name: str, folder: Path, card: ModelCard | None) -> Architecture:
    config = _load_json(folder / "config.json")
    checkpoint = _checkpoint_of(config)
    assumed: tuple[str, ...] = ()
    if config.get("architectures") == ["Mistral3ForConditionalGeneration"]:
        assumed = _settle_tie(config, folder, card)
    return _check(name, config, folder, card, checkpoint, assumed)


def _check(
    name: str,
    config: dict[str, Any],
    folder: Path | None,
    card: ModelCard | None,
    checkpoint: str | None,
    assumed: tuple[str, ...] = (),
) -> Architecture:
    # Imported here so that `import engine.catalog` does not load pydantic.
    from engine.catalog.modules import module_table

    where = visible(str(folder / "config.json"), one_line=True) if folder else name
    dropped = _drop_code_choices(config, where)
    table = module_table(config, where=where)
    notes = tuple(f"`{key}` in {where} is ignored: the run decides that itself." for key in dropped)
    return Architecture(
        name=name,
        class_name=table.class_name,
        config=config,
        table=table,
        checkpoint=checkpoint or _checkpoint_of(config),
        folder=folder,
        card=card,
        notes=notes + assumed,
    )


def _drop_code_choices(config: dict[str, Any], where: str) -> tuple[str, ...]:
    """Take the keys that choose code out of `config`, and name them; refuse what fetches code."""
    dropped: list[str] = []
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if not isinstance(part, dict):
            continue
        for key, value in list(part.items()):
            if key == "auto_map" and value:
                raise UserError(
                    f"{where} wants to run code that came with the model.",
                    "Its `auto_map` names Python files; code from a model is never run here.",
                    "Use a repository of the same model without `auto_map`.",
                )
            if _KERNEL_KEY.match(key):
                shown = visible(key, one_line=True)
                if not isinstance(value, str | bool | None) or "/" in str(value):
                    raise UserError(
                        f"{where} wants to fetch compiled code from the hub.",
                        f"Its `{shown}` is more than the name of a built-in implementation; a "
                        "model may not choose the code that runs.",
                        "Take that key out; the run's own `attn_implementation` decides.",
                    )
                del part[key]
                dropped.append(shown)
    return tuple(dict.fromkeys(dropped))


def _settle_tie(config: dict[str, Any], folder: Path, card: ModelCard | None) -> tuple[str, ...]:
    """Say whether the head is tied where a Mistral 3 config.json does not; the note, if assumed.

    transformers then ties them, but keeps a head of its own that it finds among the weights: files
    from before version 5 rely on that.
    """
    if "tie_word_embeddings" in config:
        return ()
    names = _weight_names(folder)
    if names:
        config["tie_word_embeddings"] = not any(n.endswith("lm_head.weight") for n in names)
    elif card and "tie_word_embeddings" in card.config:
        config["tie_word_embeddings"] = card.config["tie_word_embeddings"]
    else:
        where = visible(str(folder), one_line=True)
        return (
            f"config.json in {where} does not say whether the head shares the embedding's weights, "
            "and the weights are not there: they are counted once.",
        )
    return ()


def _weight_names(folder: Path) -> set[str]:
    """Names in the checkpoint's index or in its only file; none where neither can be read."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        with single.open("rb") as file:
            # A safetensors file starts with the length of its JSON header, 8 bytes little endian.
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 100_000_000))
        return set(json.loads(header)) - {"__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _checkpoint_of(config: Mapping[str, Any]) -> str:
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        method = quantization.get("quant_method")
        return visible(method, one_line=True).lower() if isinstance(method, str) else "quantized"
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    for part in (config, inner):
        for key in ("dtype", "torch_dtype"):
            dtype = part.get(key)
            if isinstance(dtype, str) and dtype in _CHECKPOINT_OF_DTYPE:
                return _CHECKPOINT_OF_DTYPE[dtype]
    return "bf16"


def _load_json(path: Path) -> dict[str, Any]:
    where = visible(str(path), one_line=True)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"There is no {where}.",
            "That file says which model the weights belong to.",
            "Name the folder that holds both, or a model that `windtunnel models` lists.",
        ) from None
    except OSError as error:
        raise UserError(
            f"{where} cannot be read.",
            f"The system says: {error.strerror}.",
            "Check the file's permissions.",
        ) from None
    except (ValueError, RecursionError) as error:
        detail = visible(str(error), one_line=True)
        raise UserError(
            f"{where} is not valid JSON.",
            f"Reading stopped: {detail}.",
            "Download the file again.",
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{where} describes no model.",
            "It has to hold one JSON object.",
            "Download the file again.",
        )
    return content

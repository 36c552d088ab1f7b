"""From what a person wrote (a catalog name, a folder, a hub id) to a model that may be built.

The word of a stranger's config.json is taken or refused here: the architecture has to be on the
allow-list, and the file may not choose code or kernels. Nothing is fetched: a hub id is looked up
in this computer's cache and in the catalog. The file decides how the model is built, so that a
wrong number in it is trained with and goes unnoticed: Mistral Medium 3.5 was released with
`mscale_all_dim: 1.0`, which switches YaRN's scaling of attention off. So it is compared with the
keys that a source of the catalog's card vouches for.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from engine.catalog.cards import ModelCard, find_model, find_repository, list_models, model_names
from engine.catalog.modules import ModuleTable
from engine.errors import UserError
from engine.hub_id import is_hub_id
from engine.visible import visible

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
    if not is_path and is_hub_id(name):
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
    from engine.catalog.rows import module_table

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
            f"{where} is not valid JSON.", f"Reading stopped: {detail}.", "Download the file again."
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{where} describes no model.",
            "It has to hold one JSON object.",
            "Download the file again.",
        )
    return content


ROPE = "rope_parameters"
# What transformers 5.23 takes where a file is silent; a test holds these against its classes.
_LEFT_OUT = {f"{ROPE}.mscale_all_dim": 0.0, f"{ROPE}.llama_4_scaling_beta": 0.0}
_LEFT_OUT_BY_TYPE: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"rms_norm_eps": 1e-6, "sliding_window": 4096},
    "ministral3": {"rms_norm_eps": 1e-5, "sliding_window": None},
    "mistral4": {"rms_norm_eps": 1e-6},
}


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One value of a config.json that is not the model's."""

    key: str
    """Dotted, without `text_config`: `rope_parameters.mscale_all_dim`."""
    given: object
    """None where the file is silent, and transformers' default is not the model's."""
    official: object
    card: ModelCard


def contradictions(
    architecture: Architecture, card: ModelCard | None = None
) -> tuple[Contradiction, ...]:
    """What the file of `architecture` says otherwise than the card of its model.

    `card` is that of the name by which the folder was found. A folder that has no such name is held
    against the models of its shape, and only for what their makers have corrected: other models
    have the same shape and, rightly, other values.
    """
    if architecture.folder is None:
        return ()
    card = architecture.card or card
    if card is not None:
        return tuple(_compare(architecture.config, card))
    flat = dict(_flatten(_with_one_rope(_text(architecture.config))))
    return tuple(
        Contradiction(key, wrong, dict(_flatten(_text(like.config)))[key], like)
        for like in _cards_of_shape(architecture.table)
        for key, wrong in like.corrected.items()
        if flat.get(key) == wrong
    )


def repaired_rope(architecture: Architecture, found: Sequence[Contradiction]) -> dict[str, Any]:
    """The file's `rope_parameters` with the official value in place of each that was `found`."""
    rope: dict[str, Any] = _with_one_rope(_text(architecture.config))[ROPE]
    for each in found:
        section, _, name = each.key.rpartition(".")
        if section == ROPE:
            rope[name] = each.official
        elif each.key == ROPE and isinstance(each.official, Mapping):
            rope = dict(each.official)
    return rope


def with_overrides(architecture: Architecture, overrides: object) -> Architecture:
    """`architecture` with the `rope_parameters` of a config's `overrides_of_model_config`.

    As in transformers, they stand under `text_config` where the model reads images, and replace the
    file's as a whole.
    """
    given = overrides if isinstance(overrides, Mapping) else {}
    rope = _text(given).get(ROPE)
    if rope is None:
        return architecture
    config = deepcopy(dict(architecture.config))
    part = config.get("text_config", config)
    part.pop("rope_scaling", None)
    part[ROPE] = dict(rope)
    # Imported here as in `_check`.
    from engine.catalog.rows import check_words

    check_words(config, "overrides_of_model_config")
    return replace(architecture, config=config)


def window_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that attention sees in every layer, as transformers takes it: 4,096 where a `mistral`
    config.json is silent. None without a window."""
    text = _text(config)
    silent = _LEFT_OUT_BY_TYPE.get(str(text.get("model_type")), {})
    window = text.get("sliding_window", silent.get("sliding_window"))
    return window if isinstance(window, int) else None


def attention_factor(rope: Mapping[str, Any]) -> float:
    """What YaRN scales queries and keys by (transformers' `_compute_yarn_parameters`)."""
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return 1.0
    keys = ("attention_factor", "factor", "mscale", "mscale_all_dim")
    given = (rope.get(key) for key in keys)
    whole, factor, mscale, all_dim = (v if isinstance(v, int | float) else None for v in given)
    if whole is not None:
        return float(whole)
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float | None, mscale: float) -> float:
    return 1.0 if factor is None or factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    part = config.get("text_config", config)
    return part if isinstance(part, Mapping) else {}


def _compare(config: Mapping[str, Any], card: ModelCard) -> Iterator[Contradiction]:
    vouched = {key for s in card.sources if s.confidence == "high" for key in s.keys}
    given, official = _text(config), _text(card.config)
    if ROPE in vouched and not any(map(given.get, (ROPE, "rope_scaling", "rope_theta"))):
        yield Contradiction(ROPE, None, official[ROPE], card)
        vouched = {key for key in vouched if not key.startswith(ROPE)}
    flat = dict(_flatten(_with_one_rope(given)))
    silent = {**_LEFT_OUT, **_LEFT_OUT_BY_TYPE.get(str(official["model_type"]), {})}
    for key, value in _flatten(official):
        if not any(key == name or key.startswith(f"{name}.") for name in vouched):
            continue
        if key not in flat and key not in silent:
            continue
        here = flat.get(key, silent.get(key))
        if here != value:
            yield Contradiction(key, here, value, card)


def _with_one_rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Files from before transformers 5 spread over `rope_theta` and `rope_scaling` what is one now,
    and had no word for rotation without scaling."""
    scaling = text.get(ROPE) or text.get("rope_scaling") or {}
    rope = {key: value for key, value in dict(scaling).items() if key != "type"}
    rope.setdefault("rope_type", dict(scaling).get("type", "default"))
    if text.get("rope_theta") is not None:
        rope.setdefault("rope_theta", text["rope_theta"])
    return {**text, ROPE: rope}


def _flatten(part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in part.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# The table is of the model that a wizard shows: compared once, not at every keystroke.
@lru_cache(maxsize=32)
def _cards_of_shape(table: ModuleTable) -> tuple[ModelCard, ...]:
    def is_like(other: ModuleTable) -> bool:
        return (
            other.class_name == table.class_name
            and other.routed_share == table.routed_share
            and other.parameters == table.parameters
        )

    return tuple(c for c in list_models() if is_like(read_architecture(c.name).table))

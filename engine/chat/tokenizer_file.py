"""The tokenizer file of a model, and whether rows can be rendered by it.

Light, so that a plan is refused before anything is tokenized: mistral-common is not imported, and
of a file of 20 MB only the version is read.
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.json import decode

from engine.catalog import find_repository, model_names
from engine.config import RunConfig
from engine.errors import UserError
from engine.hub_id import is_hub_id
from engine.visible import visible

TEKKEN = "tekken.json"
VERSIONS = ("v3", "v7", "v11", "v13", "v15")
"""What `render` writes token by token as mistral-common does."""

_SENTENCEPIECE = ("tokenizer.model*", "*.model.v*")
_OTHER_FORMATS = ("tokenizer.json", "tokenizer_config.json")
# Published files begin with their config, which is shorter than this.
_HEAD_CHARACTERS = 4096
_VERSION = re.compile(r'"version"\s*:\s*"([^"]*)"')


_LARGEST_BYTES = 2**28
# Published files have 150,000 tokens, 1,000 of them special, and a pattern of 200 letters; what is
# beyond is no tokenizer, and mistral-common would count up to it.
_Tokens = Annotated[int, Meta(ge=1, le=2**21)]


class _Config(Struct):
    pattern: Annotated[str, Meta(max_length=10_000)]
    default_vocab_size: _Tokens
    default_num_special_tokens: Annotated[int, Meta(ge=1, le=2**16)]
    num_vocab_tokens: _Tokens | None = None


class _Image(Struct):
    image_patch_size: Annotated[int, Meta(ge=1, le=2**10)]
    max_image_size: Annotated[int, Meta(ge=1, le=2**14)]
    spatial_merge_size: Annotated[int, Meta(ge=1, le=2**6)] = 1


class _Sizes(Struct):
    """What of a tekken file decides how long it takes to open; the rest is mistral-common's."""

    config: _Config
    image: _Image | None = None
    multimodal: _Image | None = None


def check_sizes(path: Path) -> None:
    """Raises ValueError where a tekken file states sizes that no tokenizer has, OSError where it
    cannot be read."""
    if path.stat().st_size > _LARGEST_BYTES:
        raise ValueError(f"it has more than {_LARGEST_BYTES // 2**20} MiB")
    decode(path.read_bytes(), type=_Sizes)


def check_tokenizer(model: str | Path, folder: Path | None = None) -> None:
    """Raises UserError where the tokenizer that is here for a model is none that rows can be
    rendered by.

    `model` and `folder` are those of `open_tokenizer`. Nothing is fetched, and a model without any
    tokenizer file passes: its rows cannot be counted, and its shape can.
    """
    name = str(model)
    if not isinstance(model, Path) and name in model_names():
        return
    # os.path, unlike pathlib, answers a name that no file system can hold with False.
    path = os.path.join(folder or "", os.path.expanduser(name))
    file = Path(path) if os.path.isfile(path) else None
    if os.path.isdir(path):
        file = find_in_folder(Path(path))
    elif file is None and is_hub_id(name):
        file = _find_in_cache(name)
    if file is not None:
        check_file(file)


def tokenizer_name(config: RunConfig) -> str:
    """What names the run's tokenizer; as a path it starts at the config's folder."""
    return config.tokenizer_config or config.base_model


def find_in_folder(folder: Path) -> Path | None:
    """The tekken file of a folder; None where it holds no tokenizer at all.

    Raises UserError where it holds others only, or several.
    """
    found = sorted(path for path in folder.glob("*tekken*.json") if path.is_file())
    exact = folder / TEKKEN
    if exact in found:
        return exact
    if len(found) == 1:
        return found[0]
    where = visible(str(folder), one_line=True)
    if found:
        raise UserError(
            f"{where} has several tekken files.",
            f"They are {_list_names(found)}.",
            "Name the file instead of the folder.",
        )
    if pieces := _list_matches(folder, _SENTENCEPIECE):
        raise _sentencepiece(f"The tokenizer in {where} is {_list_names(pieces)}")
    if others := _list_matches(folder, _OTHER_FORMATS):
        raise UserError(
            f"{where} has no {TEKKEN}.",
            f"It has {_list_names(others)}, by which rows would not be what Mistral's own"
            " tokenizer makes of them.",
            f"Copy {TEKKEN} from the model's page on the hub into the folder, or name in"
            " tokenizer_config the model that it came from.",
        )
    return None


def check_file(path: Path) -> None:
    """Raises UserError for a sentencepiece file and for a tekken file of another version.

    A damaged file passes: opening it says what is wrong.
    """
    where = visible(str(path), one_line=True)
    if any(path.match(pattern) for pattern in _SENTENCEPIECE):
        raise _sentencepiece(f"The tokenizer is {where}")
    version = _read_version(path)
    if version is None or version in VERSIONS:
        return
    raise UserError(
        f"The tokenizer in {where} is {visible(version[:20], one_line=True)}.",
        f"Rows are rendered exactly for {', '.join(VERSIONS[:-1])} and {VERSIONS[-1]}; for another"
        " version they would be a guess.",
        "Choose a model that `windtunnel models` lists, or look for a newer Windtunnel.",
    )


def _sentencepiece(what: str) -> UserError:
    return UserError(
        f"{what}, a sentencepiece one.",
        "Sentencepiece tokenizers (Mistral 7B, Mixtral) are not supported: only Tekken ones are.",
        "Choose a model with a tekken.json: Mistral Nemo, Ministral 8B, or one that `windtunnel"
        " models` lists.",
    )


def _read_version(path: Path) -> str | None:
    """The version in a tekken file; None where there is none to be read."""
    try:
        with path.open(encoding="utf-8") as file:
            head = file.read(_HEAD_CHARACTERS)
            if found := _VERSION.search(head):
                return found[1]
            version = json.loads(head + file.read())["config"]["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return version if isinstance(version, str) else None


def _find_in_cache(repo_id: str) -> Path | None:
    """The tekken file of a hub id on this computer, or a sentencepiece one; a file of another
    format says nothing of what the repository has beside it."""
    from huggingface_hub import try_to_load_from_cache

    tekken, config = (try_to_load_from_cache(repo_id, name) for name in (TEKKEN, "config.json"))
    if isinstance(tekken, str):
        return Path(tekken)
    if isinstance(config, str) and find_repository(repo_id) is None:
        return next(iter(_list_matches(Path(config).parent, _SENTENCEPIECE)), None)
    return None


def _list_matches(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _list_names(paths: list[Path]) -> str:
    return ", ".join(visible(path.name, one_line=True) for path in paths)

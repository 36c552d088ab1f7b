"""A Tekken tokenizer and what a renderer and a preview need of it: opened, or made in memory.

What it can do is read from its file, never guessed from a model's name. A tekken file wins wherever
there is one: in a folder, or in the hub cache of this computer. Only a catalog name without a file
is answered from its card, and only a hub id that is neither cached nor in the catalog is fetched,
its tokenizer file alone.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mistral_common.tokens.tokenizers.base import (
    SpecialTokenPolicy,
    SpecialTokens,
    TokenizerVersion,
)
from mistral_common.tokens.tokenizers.image import ImageConfig
from mistral_common.tokens.tokenizers.model_settings_builder import ModelSettingsBuilder
from mistral_common.tokens.tokenizers.tekken import SpecialTokenInfo, Tekkenizer

from engine.catalog import ModelCard, TokenizerSpec, find_model, find_repository, model_names
from engine.chat.images import ImageSpec
from engine.chat.render import unheard
from engine.chat.tokenizer_file import TEKKEN, check_file, check_sizes, find_in_folder
from engine.errors import UserError, WorkError
from engine.hub_id import is_hub_id
from engine.visible import first_line, visible

# Long system prompts and tool lists repeat from row to row; a few hundred are enough to hold
# those of a mixed dataset and too few to matter in memory.
_REPEATED_TEXTS = 256
_IMAGE_KEYS = ("image_patch_size", "max_image_size", "spatial_merge_size")
_STRAY_BYTE = re.compile("[\udc80-\udcff]")
_CALL_TOKENS = {32: SpecialTokens.args, 33: SpecialTokens.call_id}
_THINK_TOKENS = {34: SpecialTokens.begin_think, 35: SpecialTokens.end_think}
_SETTINGS_TOKENS = {
    36: SpecialTokens.begin_model_settings,
    37: SpecialTokens.end_model_settings,
}
# As in the published tekken.json of Mistral Small 4.
_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "reasoning_effort": {
            "values": ["none", "high"],
            "accepts_none": True,
            "default": "none",
        }
    }
)


class _Tekkenizer(Tekkenizer):
    """Makes the list of all pieces only when asked: that is half of the time of opening one."""

    def id_to_piece(self, token_id: int) -> str:
        return super().id_to_piece(token_id) if "_vocab" in self.__dict__ else ""

    def vocab(self) -> list[str]:
        return list(map(self.id_to_piece, range(self.n_words)))


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of the control tokens, None where the tokenizer writes none."""

    bos: int
    eos: int
    pad: int
    inst: int
    end_inst: int
    system: int
    end_system: int
    tools: int
    end_tools: int
    results: int
    end_results: int
    result_content: int
    call: int
    args: int | None
    call_id: int | None
    think: int | None
    end_think: int | None
    settings: int | None
    end_settings: int | None
    image: int | None
    image_break: int | None
    image_end: int | None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ChatTokenizer:
    """A tokenizer for fine-tuning.

    `fingerprint` is the same for the same tokens and rules wherever they came from. A text id is
    a rank of `encode_ordinary` plus `first_text_id`; ids below that are control tokens.
    """

    tekken: Tekkenizer
    version: str
    specials: SpecialIds
    vocabulary_size: int
    first_text_id: int
    fingerprint: str
    efforts: tuple[str, ...]
    """The values of reasoning_effort that it has settings for."""
    default_effort: str | None
    image: ImageSpec | None
    """How images become tokens; None for a model that reads only text."""
    encode_ordinary: Callable[[str], list[int]]
    """Text to ranks; control tokens never come of it."""
    encode_repeated: Callable[[str], tuple[int, ...]]
    """The same for texts that many rows share: it remembers."""
    origin: TokenizerSpec | Path | None
    """What `reopen` makes the same of; None where that was only in memory."""

    @property
    def thinks(self) -> bool:
        """Whether thinking has control tokens of its own."""
        return self.specials.think is not None

    def is_control(self, token_id: int) -> bool:
        return token_id < self.first_text_id

    def size(self, rank: int) -> int:
        """Bytes of text behind a rank of `encode_ordinary`."""
        return len(self._bytes(rank + self.first_text_id))

    def piece(self, token_id: int) -> str:
        """One token for display: safe on a terminal, on one line, stray bytes as <E2>."""
        return _show(self._bytes(token_id))

    def pieces(self, token_ids: Iterable[int]) -> Iterator[str]:
        """The tokens for display; a character over several tokens is shown by the last of them."""
        held = b""
        waiting = 0
        for token_id in token_ids:
            control = self.is_control(token_id)
            held = b"" if control else held + self._bytes(token_id)
            if not control and _is_cut_off(held):
                waiting += 1
                continue
            yield from [""] * waiting
            waiting = 0
            yield _show(self._bytes(token_id) if control else held)
            held = b""
        if waiting:
            yield from [""] * (waiting - 1)
            yield _show(held)

    def _bytes(self, token_id: int) -> bytes:
        return self.tekken.id_to_byte_piece(int(token_id), SpecialTokenPolicy.KEEP)


def _show(piece: bytes) -> str:
    text = piece.decode("utf-8", errors="surrogateescape")
    text = _STRAY_BYTE.sub(lambda found: f"<{ord(found[0]) - 0xDC00:02X}>", text)
    return visible(text, one_line=True)


def _is_cut_off(piece: bytes) -> bool:
    """Whether the bytes end inside a character, which the next token may complete."""
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def assemble(tekken: Tekkenizer, origin: TokenizerSpec | Path | None = None) -> ChatTokenizer:
    """The tokenizer around a loaded vocabulary.

    Raises ValueError where it lacks a control token or the settings that its version needs.
    """
    builder = tekken.model_settings_builder
    if tekken.version.supports_model_settings and builder is None:
        raise ValueError(f"{tekken.version.value} needs a model_settings_builder")
    effort = builder.reasoning_effort if builder else None
    ranks: Callable[[str], list[int]] = tekken._model.encode_ordinary
    return ChatTokenizer(
        tekken=tekken,
        version=tekken.version.value,
        specials=_find_specials(tekken),
        vocabulary_size=tekken.n_words,
        first_text_id=tekken.num_special_tokens,
        fingerprint=_fingerprint(tekken),
        efforts=tuple(str(value) for value in effort.values) if effort else (),
        default_effort=str(effort.default) if effort else None,
        image=ImageSpec(*(getattr(tekken.image, key) for key in _IMAGE_KEYS))
        if tekken.image
        else None,
        encode_ordinary=ranks,
        encode_repeated=lru_cache(_REPEATED_TEXTS)(lambda text: tuple(ranks(text))),
        origin=origin,
    )


def _find_specials(tekken: Tekkenizer) -> SpecialIds:
    needed = tekken.get_special_token

    def optional(token: str, *, exists: bool = False) -> int | None:
        return needed(token) if exists or tekken.is_special(token) else None

    # Encoders before v13 refuse thinking, whatever tokens the file names.
    thinks = tekken.version >= TokenizerVersion.v13
    names_arguments = tekken.version >= TokenizerVersion.v11
    has_settings, sees = tekken.version.supports_model_settings, tekken.image is not None
    return SpecialIds(
        bos=tekken.bos_id,
        eos=tekken.eos_id,
        pad=tekken.pad_id,
        inst=needed(SpecialTokens.begin_inst),
        end_inst=needed(SpecialTokens.end_inst),
        system=needed(SpecialTokens.begin_system),
        end_system=needed(SpecialTokens.end_system),
        tools=needed(SpecialTokens.begin_tools),
        end_tools=needed(SpecialTokens.end_tools),
        results=needed(SpecialTokens.begin_tool_results),
        end_results=needed(SpecialTokens.end_tool_results),
        result_content=needed(SpecialTokens.begin_tool_content),
        call=needed(SpecialTokens.tool_calls),
        args=optional(SpecialTokens.args, exists=names_arguments),
        call_id=optional(SpecialTokens.call_id, exists=names_arguments),
        think=optional(SpecialTokens.begin_think) if thinks else None,
        end_think=optional(SpecialTokens.end_think) if thinks else None,
        settings=optional(SpecialTokens.begin_model_settings, exists=has_settings),
        end_settings=optional(SpecialTokens.end_model_settings, exists=has_settings),
        image=optional(SpecialTokens.img, exists=sees),
        image_break=optional(SpecialTokens.img_break, exists=sees),
        image_end=optional(SpecialTokens.img_end, exists=sees),
    )


def _fingerprint(tekken: Tekkenizer) -> str:
    builder = tekken.model_settings_builder
    rules = {
        "version": tekken.version.value,
        "pattern": tekken._model._pat_str,
        "sizes": [tekken.n_words, tekken.num_special_tokens],
        "specials": [[token["rank"], token["token_str"]] for token in tekken._all_special_tokens],
        "image": vars(tekken.image) if tekken.image else None,
        "settings": builder.model_dump(mode="json") if builder else None,
    }
    content = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
    tokens = map(
        tekken._model.decode_single_token_bytes, range(tekken.n_words - tekken.num_special_tokens)
    )
    content.update(b"".join(len(token).to_bytes(4, "little") + token for token in tokens))
    return content.hexdigest()


def build_tokenizer(spec: TokenizerSpec) -> ChatTokenizer:
    """The tokenizer of a spec, in memory, in about a second. Raises ValueError for a bad spec."""
    data = _vocabulary()
    config = data["config"]
    version = TokenizerVersion(spec.version)
    tekken = _Tekkenizer(
        data["vocab"],
        _special_tokens(spec, config["default_num_special_tokens"]),
        config["pattern"],
        config["default_vocab_size"],
        config["default_num_special_tokens"],
        version,
        image_config=ImageConfig(**_image_keys(spec.image)) if spec.image else None,
        model_settings_builder=(
            ModelSettingsBuilder.model_validate(dict(_SETTINGS)) if spec.settings else None
        ),
    )
    return assemble(tekken, spec)


def reopen(origin: TokenizerSpec | Path) -> ChatTokenizer:
    """The tokenizer of an `origin`, in another process too. Raises UserError where its file is
    damaged."""
    return _open_file(origin) if isinstance(origin, Path) else build_tokenizer(origin)


def write_tekken(spec: TokenizerSpec, path: Path) -> None:
    """Writes the tokenizer of a spec as a file that other programs open too: 11 MB.

    They know it by its name, which must hold "tekken" and end in .json; else ValueError.
    """
    if "tekken" not in path.name or path.suffix != ".json":
        raise ValueError(f"{path.name} is no name for a Tekken file")
    data = _vocabulary()
    slots = data["config"]["default_num_special_tokens"]
    data["config"]["version"] = spec.version
    data["special_tokens"] = _special_tokens(spec, slots)
    data.pop("image", None)
    if spec.image:
        data["image"] = _image_keys(spec.image)
    if spec.settings:
        data["model_settings_builder"] = dict(_SETTINGS)
    path.write_text(json.dumps(data), encoding="utf-8")


def _vocabulary() -> dict[str, Any]:
    file = resources.files("mistral_common") / "data" / "tekken_240911.json"
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def _special_tokens(spec: TokenizerSpec, slots: int) -> list[SpecialTokenInfo]:
    names: dict[int, str] = {
        token["rank"]: token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS
    }
    version = TokenizerVersion(spec.version)
    if version >= TokenizerVersion.v11:
        names |= _CALL_TOKENS
    if spec.think:
        names |= _THINK_TOKENS
    if version.supports_model_settings:
        names |= _SETTINGS_TOKENS
    filler = Tekkenizer.SPECIAL_TOKEN_TEMPLATE
    return [
        SpecialTokenInfo(
            rank=rank, token_str=str(names.get(rank, filler.format(id=rank))), is_control=True
        )
        for rank in range(slots)
    ]


def _image_keys(image: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(_IMAGE_KEYS, image, strict=True))


def open_tokenizer(model: str | Path, folder: Path | None = None) -> ChatTokenizer:
    """The tokenizer of a catalog name, a folder, a tekken file or a hub id.

    Relative paths start at `folder`, else at the working directory. A catalog name means the
    catalog even where a folder has the same name; `./name` means the folder. Raises UserError
    where there is none, where its file is damaged and where `check_tokenizer` does; WorkError
    where a hub id cannot be fetched.
    """
    name = str(model)
    if not isinstance(model, Path) and name in model_names():
        return _open_card(find_model(name))
    # os.path, unlike pathlib, answers a name that no file system can hold with False.
    path = os.path.join(folder or "", os.path.expanduser(name))
    if os.path.isdir(path):
        return _open_folder(Path(path))
    if os.path.isfile(path):
        return _open_file(Path(path))
    if isinstance(model, str) and is_hub_id(name):
        return _open_hub_id(name)
    if isinstance(model, Path) or os.sep in name or name.startswith((".", "~")):
        raise UserError(
            f"There is no {visible(name, one_line=True)}.",
            "The tokenizer was to be read from there.",
            "Check the path, or name a model that `windtunnel models` lists.",
        )
    return _open_card(find_model(name))


def _open_card(card: ModelCard) -> ChatTokenizer:
    for repository in card.repositories:
        cached = _find_in_cache(repository.id)
        if cached is not None:
            return _open_file(cached)
    return build_tokenizer(card.tokenizer)


def _open_hub_id(repo_id: str) -> ChatTokenizer:
    cached = _find_in_cache(repo_id)
    found = None if cached else find_repository(repo_id)
    return _open_card(found[0]) if found else _open_file(cached or _fetch(repo_id))


def _find_in_cache(repo_id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, TEKKEN)
    return Path(found) if isinstance(found, str) else None


def _fetch(repo_id: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    # Its warnings, one a retry, would stand before the three sentences.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download(repo_id, TEKKEN))
    except errors.GatedRepoError as error:
        raise WorkError(
            f"{repo_id} asks for a login.",
            "Its owner wants you to accept conditions before anything is downloaded.",
            f"Accept them at https://huggingface.co/{repo_id}, then run `hf auth login`.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is no model {repo_id} on the hub.",
            "It does not exist, or it is private and you are not logged in.",
            "Check the spelling, or run `hf auth login`.",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise WorkError(
            f"The tokenizer of {repo_id} is not on this computer.",
            "The hub could not be reached or did not answer, or HF_HUB_OFFLINE is set.",
            f"Try again online, or copy the model's {TEKKEN} here and name its folder.",
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{repo_id} has no {TEKKEN}.",
            "Only Tekken tokenizers are read: sentencepiece ones (Mistral 7B, Mixtral) are not"
            " supported.",
            "Choose a repository of Mistral's that has the file, or name a folder that holds it.",
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise WorkError(
            f"The tokenizer of {repo_id} could not be fetched.",
            f"{first_line(error)}.",
            f"Try again later, or copy the model's {TEKKEN} here and name its folder.",
        ) from error


def _open_folder(folder: Path) -> ChatTokenizer:
    file = find_in_folder(folder)
    if file is None:
        raise UserError(
            f"{visible(str(folder), one_line=True)} has no {TEKKEN}.",
            "It has no tokenizer file at all.",
            f"Copy {TEKKEN} from the model's page on the hub into the folder.",
        )
    return _open_file(file)


def _open_file(path: Path) -> ChatTokenizer:
    check_file(path)
    try:
        check_sizes(path)
        return _tried(assemble(_Tekkenizer.from_file(path), path.absolute()))
    # mistral-common asserts, and reads keys, of whatever JSON the file holds.
    except (
        *(AssertionError, AttributeError, IndexError, KeyError, OSError, RecursionError),
        *(TypeError, ValueError),
    ) as error:
        raise UserError(
            f"{visible(str(path), one_line=True)} is not a whole Tekken tokenizer.",
            f"Reading it ended in {type(error).__name__}: {first_line(error)[:200]}.",
            "Download the file again, or name the folder that holds the model's tekken.json.",
        ) from error


def _tried(tokenizer: ChatTokenizer) -> ChatTokenizer:
    """The tokenizer; ValueError where its pattern makes empty pieces of a text: Rust panics there,
    outside Exception and unexported."""
    try:
        with unheard():
            tokenizer.encode_ordinary("Hello,  world 12")
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError("its pattern makes empty pieces of a text") from None
    return tokenizer

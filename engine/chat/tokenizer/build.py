"""Tokenizers of named models, made without a download.

All Tekken tokenizers since v3 share one vocabulary, which mistral-common carries; they differ in
version, control tokens, image grid and settings, which a spec names. The ranks of the control
tokens are those of the published files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mistral_common.tokens.tokenizers.base import SpecialTokens, TokenizerVersion
from mistral_common.tokens.tokenizers.image import ImageConfig
from mistral_common.tokens.tokenizers.model_settings_builder import ModelSettingsBuilder
from mistral_common.tokens.tokenizers.tekken import SpecialTokenInfo, Tekkenizer

from engine.chat.tokenizer.chat_tokenizer import ChatTokenizer, assemble

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


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """What sets one model's tokenizer apart from the others."""

    version: str
    think: bool = False
    image: tuple[int, int, int] | None = None
    """Patch size and largest side in pixels, patches merged a side; None reads no images."""
    settings: bool = False


def build_tokenizer(spec: TokenizerSpec) -> ChatTokenizer:
    """The tokenizer of a spec, in memory, in about a second. Raises ValueError for a bad spec."""
    data = _vocabulary()
    config = data["config"]
    version = TokenizerVersion(spec.version)
    tekken = Tekkenizer(
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
    return assemble(tekken)


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
    return dict(
        zip(("image_patch_size", "max_image_size", "spatial_merge_size"), image, strict=True)
    )

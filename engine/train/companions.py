"""The files beside a result's weights: tokenizer, licence, and what a whole model needs."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.catalog import find_model, find_repository
from engine.chat.tokenizer import open_tokenizer, spec_of, write_tekken
from engine.config import RunConfig

TOKENIZER_FILES = (
    "*tekken*.json",
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template*",
)
"""What other programs read a tokenizer from."""
MODEL_FILES = ("generation_config.json", "*processor_config.json", "SYSTEM_PROMPT*.txt")
"""What belongs to a whole model beside its config.json, its weights and its tokenizer. Not
params.json, by which servers look for the base's own consolidated weights."""


def copy_companions(base: Path, target: Path, config: RunConfig, *, whole: bool) -> None:
    """Copy into `target` the base's licence and the tokenizer that the run used, and beside a
    `whole` model all that stock transformers reads. Raises OSError where there is no room."""
    if whole:
        _copy(base, target, MODEL_FILES)
    _copy(base, target, ("LICENSE*",))
    if not config.tokenizer_config:
        _copy(base, target, TOKENIZER_FILES)
        return
    tekken: Any = open_tokenizer(config.tokenizer_config).tekken
    try:
        shutil.copyfile(tekken.file_path, target / "tekken.json")
    except ValueError:  # it has no file: it was made from the catalog's card
        name = config.tokenizer_config
        listed = find_repository(name)
        write_tekken(spec_of(listed[0] if listed else find_model(name)), target / "tekken.json")


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)

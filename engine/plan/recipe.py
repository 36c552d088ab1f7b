"""Recipes that ship: whole configs that were tried, with a reason beside each value.

Separate from `recommend`, which follows one where it is made for the very model and dataset, and
uses its own rules otherwise.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files

from engine.catalog import Architecture
from engine.config import DatasetConfig, read_config

_REASON = re.compile(r"^(\w+):[^#\n]*#\s*(.+)$", re.MULTILINE)

_OF_THE_MODEL = (
    *("lora_r", "lora_alpha", "lora_target_linear", "optimizer", "learning_rate"),
    *("lr_scheduler", "cosine_min_lr_ratio", "adam_beta2", "weight_decay", "bf16"),
)
"""Keys that suit the model whatever it learns; whether 4 bits are needed is memory's to say."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The values of a shipped config, and the comments beside them."""

    values: Mapping[str, object]
    reasons: Mapping[str, str]
    whole: bool
    """Whether it is for the very dataset; else only what depends on the model is here."""


def find_recipe(architecture: Architecture, dataset: DatasetConfig | None) -> Recipe | None:
    """The recipe of a model that is made here; None for any other, and where it has none.

    Without a dataset, and with the recipe's own, it is whole.
    """
    card = architecture.card
    if card is None or card.repositories:
        return None
    with as_file(files("presets") / "recipes" / card.name / "lora.yml") as path:
        if not path.is_file():
            return None
        file = read_config(path)
        config, text = file.config, file.document.text
    whole = dataset is None or dataset.path == config.datasets[0].path
    values = {key: getattr(config, key) for key in config.file_values()}
    del values["base_model"]
    if not whole:
        values = {key: value for key, value in values.items() if key in _OF_THE_MODEL}
    return Recipe(values, dict(_REASON.findall(text)), whole)

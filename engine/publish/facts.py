"""What people who do not have a run's folder may know of it: figures and answers, never a row, a
path or a name of this machine.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.catalog import ModelCard, find_card
from engine.config import RunConfig, read_config, write_config
from engine.data.prepared import Prepared
from engine.errors import UserError
from engine.runs import RunFolder
from engine.runs.comparison import Curves, read_curves

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(slots=True)
class ResultFacts:
    """What a card and a server's command line are made from."""

    name: str
    config: RunConfig
    card: ModelCard | None
    """Of the base model, where the catalog has it."""
    base_id: str | None
    """The base's hub id; None where it is a folder of this computer or made on the spot."""
    rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Tokens of the training set by their kind."""
    curves: Curves = field(default_factory=Curves)

    @property
    def base_name(self) -> str:
        """What to call the base: its hub id, its catalog name or the name of its folder."""
        return self.base_id or Path(self.config.base_model).name


def read_facts(run: RunFolder) -> ResultFacts:
    """Gather a run's facts from its config, its arrays and its events; what is missing is left out.

    Raises UserError where its config cannot be read.
    """
    config = read_config(run.config).config
    card, base_id = find_base(config.base_model)
    facts = ResultFacts(run.name, config, card, base_id, curves=read_curves(run))
    try:
        prepared = Prepared(run.data)
        facts.rows, facts.kinds = len(prepared), prepared.tokens_by_kind()
    except (UserError, OSError):  # a result outlives its data
        pass
    return facts


def find_base(base_model: str) -> tuple[ModelCard | None, str | None]:
    """The catalog's card of a base model, and the hub id that stands for it."""
    if card := find_card(base_model):
        return card, card.hub_id if base_model == card.name else base_model
    is_id = _HUB_ID.fullmatch(base_model) and not Path(base_model).exists()
    return None, base_model if is_id else None


def shared_config(config: RunConfig) -> str:
    """The config as YAML without this computer's paths: of each, the last name is kept."""
    values: dict[str, Any] = _without_paths(config.model_dump(mode="json", exclude_unset=True))
    for key in ("output_dir", "dataset_prepared_path", "image_folder"):
        values.pop(key, None)
    return write_config(RunConfig.model_validate(values))


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value

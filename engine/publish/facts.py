"""What is told of a run to people who do not have its folder.

Separate from the card's words because here is decided what may leave the computer: figures and
answers, never a row, a path or a name of this machine.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.catalog import ModelCard, find_card
from engine.config import RunConfig, read_config, write_config
from engine.data.prepared import Prepared
from engine.errors import UserError
from engine.events import Eval, Sample, Score, Started, Step
from engine.runs import Follower, RunFolder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(slots=True)
class RunFacts:
    """A run's figures, in the order in which a card tells them."""

    name: str
    config: RunConfig
    card: ModelCard | None
    """Of the base model, where the catalog has it."""
    base_id: str | None
    """The base's hub id; None where it is a folder of this computer or made on the spot."""
    rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Tokens of the training set by their kind."""
    started: Started | None = None
    first: Step | None = None
    last: Step | None = None
    learned_tokens: int = 0
    """Over all steps."""
    evals: list[Eval] = field(default_factory=list)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    """By dataset: `before` and `after`."""
    answers: dict[str, dict[str, str]] = field(default_factory=dict)
    """By the config's own prompts: `before` and `after`."""

    @property
    def base_name(self) -> str:
        """What to call the base: its hub id, its catalog name or the name of its folder."""
        return self.base_id or Path(self.config.base_model).name

    @property
    def best(self) -> Eval | None:
        """The evaluation with the lowest loss."""
        real = [each for each in self.evals if math.isfinite(each.loss)]
        return min(real, key=lambda each: each.loss) if real else None


def read_facts(run: RunFolder) -> RunFacts:
    """Gather a run's facts from its config, its arrays and its events; what is missing is left out.

    Raises UserError where its config cannot be read.
    """
    config = read_config(run.config).config
    card, base_id = find_base(config.base_model)
    facts = RunFacts(run.name, config, card, base_id)
    try:
        prepared = Prepared(run.data)
        facts.rows, facts.kinds = len(prepared), prepared.tokens_by_kind()
    except (UserError, OSError):  # a result outlives its data
        pass
    _read_events(run, facts)
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


def _read_events(run: RunFolder, facts: RunFacts) -> None:
    follower = Follower(run.events)
    steps: dict[int, Step] = {}
    evals: dict[int, Eval] = {}
    asked = set(facts.config.sample_prompts)  # other prompts are rows
    while events := follower.read():
        for event in (recorded.event for recorded in events):
            match event:
                case Started():
                    facts.started = event
                case Step():
                    if event.step in steps:  # a resume went back
                        steps = {n: s for n, s in steps.items() if n < event.step}
                    steps[event.step] = event
                case Eval():
                    evals = {n: e for n, e in evals.items() if n < event.step}
                    evals[event.step] = event
                case Score():
                    when = "after" if event.step else "before"
                    facts.scores.setdefault(event.dataset, {})[when] = event
                case Sample() if event.prompt in asked and event.when != "during":
                    facts.answers.setdefault(event.prompt, {})[event.when] = event.text
    ordered = list(steps.values())
    if ordered:
        facts.first, facts.last = ordered[0], ordered[-1]
        facts.learned_tokens = sum(step.learned_tokens for step in ordered)
    facts.evals = list(evals.values())

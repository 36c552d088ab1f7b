"""From a model, a device and a dataset to a whole config, with a reason for every value.

The rules themselves are in `choice`; here is what is kept of the person's own values, and what is
said of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from engine.catalog import Architecture
from engine.config import DatasetConfig, RunConfig
from engine.errors import UserError
from engine.plan.attention import Attention, choose_attention
from engine.plan.choice import Choice
from engine.plan.device import Device
from engine.plan.ladder import Alternative, changed, list_alternatives
from engine.plan.limits import Goal, refuse_goal, why_not_trained
from engine.plan.memory import Estimate, estimate
from engine.plan.recipe import find_recipe
from engine.plan.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A config that can be saved as it is, and what speaks for it."""

    config: RunConfig
    reasons: Mapping[str, str]
    """By key of the config, for every value that was chosen."""
    recommended: Mapping[str, object]
    """The values before the person's own."""
    estimate: Estimate
    alternatives: tuple[Alternative, ...]
    attention: Attention
    not_trained: str | None
    """Why this version plans the model and cannot train it; None where it can."""


def recommend(
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
    *,
    dataset: DatasetConfig | None = None,
    goal: Goal = "text",
    fixed: Mapping[str, object] | None = None,
) -> Recommendation:
    """The config for training `architecture` on `device` with rows that `statistics` describe.

    `fixed` holds values that the person chose: they are kept, and the rest is chosen around them.
    Raises UserError where the goal cannot be met or where fixed values contradict each other.
    """
    refuse_goal(goal, architecture)
    try:
        return _recommend(architecture, device, statistics, dataset, dict(fixed or {}))
    except ValidationError as error:
        raise _contradiction(error) from None


def assess(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
    *,
    changes: Mapping[str, object] | None = None,
) -> Recommendation:
    """A person's own config with `changes`: nothing is advised, it is only looked at.

    Raises UserError where the changes contradict the rest.
    """
    try:
        kept = changed(config, changes or {})
    except ValidationError as error:
        raise _contradiction(error) from None
    text = architecture.config.get("text_config", architecture.config)
    return Recommendation(
        config=kept,
        reasons={key: "yours" for key in changes or {}},
        recommended={},
        estimate=estimate(kept, architecture, device, statistics),
        alternatives=list_alternatives(kept, architecture, device, statistics),
        attention=choose_attention(device, text.get("head_dim")),
        not_trained=why_not_trained(architecture),
    )


def _contradiction(error: ValidationError) -> UserError:
    return UserError(
        "The values that you chose contradict each other.",
        error.errors()[0]["msg"].removeprefix("Value error, "),
        "Change or leave out one of them.",
    )


def _recommend(
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None,
    dataset: DatasetConfig | None,
    fixed: dict[str, object],
) -> Recommendation:
    choice = _choose(architecture, device, statistics, dataset, _with_method(fixed))
    free = _choose(architecture, device, statistics, dataset, {}) if fixed else choice
    config = choice.config()
    reasons = {key: _own_reason(free, key, value) for key, value in choice.fixed.items()}
    return Recommendation(
        config=config,
        reasons={**choice.reasons, **reasons},
        recommended=dict(free.values),
        estimate=estimate(config, architecture, device, statistics),
        alternatives=list_alternatives(config, architecture, device, statistics),
        attention=choice.attention,
        not_trained=why_not_trained(architecture),
    )


def _with_method(fixed: dict[str, object]) -> dict[str, object]:
    """`fixed` with the adapter and the precision that follow from one another."""
    method: dict[str, object] = {}
    if "load_in_4bit" in fixed:
        method["adapter"] = "qlora" if fixed["load_in_4bit"] else "lora"
    if fixed.get("unfrozen_parameters"):
        method["adapter"] = None
    fixed = {**method, **fixed}
    return {"load_in_4bit": fixed["adapter"] == "qlora", **fixed} if "adapter" in fixed else fixed


def _choose(
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None,
    dataset: DatasetConfig | None,
    fixed: dict[str, object],
) -> Choice:
    choice = Choice(architecture, device, statistics, dataset, fixed)
    recipe = find_recipe(architecture, dataset)
    if recipe is None or not recipe.whole:
        choice.habits()
        choice.method()
        choice.rows()
        choice.adapter()
        choice.batch()
        choice.optimization()
    if recipe is not None:
        choice.follow(recipe)
    choice.fit()
    return choice


def _own_reason(free: Choice, key: str, value: object) -> str:
    """Of a value that the person chose, beside what would have been advised."""
    if key not in free.values:
        return "yours"
    advised, why = free.values[key], free.reasons[key]
    if advised == value:
        return f"yours, as recommended: {why}"
    return f"yours (recommended {_word(advised)}: {why})"


def _word(value: object) -> str:
    """A value as the config file spells it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)

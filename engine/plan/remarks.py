"""What a config does less of on its model than it seems to say, in sentences.

Separate from `targets`, which refuses what matches nothing, and from the config's own notes, which
know no model: here both are read together, before a plan is believed or a run is started.
"""

from engine.catalog import (
    Architecture,
    Contradiction,
    ModuleTable,
    attention_factor,
    contradictions,
    find_card,
    repaired_rope,
    with_overrides,
)
from engine.catalog.agreement import ROPE
from engine.config import RunConfig
from engine.plan.limits import refuse_window, why_not_trained
from engine.plan.targets import choose_targets
from engine.visible import visible


def remarks(config: RunConfig, architecture: Architecture) -> tuple[str, ...]:
    """A sentence for each surprise, empty where the model does what the config reads like.

    Raises UserError where an entry of the adapter's targets matches no module, and for rows longer
    than the model's window of attention.
    """
    refuse_window(config, architecture)
    table = architecture.table
    refused = why_not_trained(architecture)
    found = (
        refused,
        _other_than_its_makers(config, architecture),
        _narrow_adapter(config, table),
        _no_routers(config, table),
    )
    return tuple(sentence for sentence in found if sentence)


def _other_than_its_makers(config: RunConfig, architecture: Architecture) -> str | None:
    """A config.json whose numbers are not those of the model, and what repairs it."""
    built = with_overrides(architecture, config.overrides_of_model_config)
    found = contradictions(built, find_card(config.base_model))
    if not found:
        return None
    says = ", ".join(f"{each.key.removeprefix(f'{ROPE}.')}: {_shown(each)}" for each in found)
    has = ", ".join(_value(each.official) for each in found)
    sentence = f"config.json says {says}, {found[0].card.title} has {has}"
    if not all(each.key.startswith(ROPE) for each in found):
        return f"{sentence}: another model would be trained. Correct the file"
    here, right = (repaired_rope(built, each) for each in ((), found))
    factors = [f"{attention_factor(rope):.4g}" for rope in (here, right)]
    if factors[0] != factors[1]:
        sentence += f": attention is scaled by {factors[0]} instead of {factors[1]}"
    values = ", ".join(f"{key}: {_value(value)}" for key, value in right.items())
    override = f"{{{ROPE}: {{{values}}}}}"
    if "text_config" in built.config:
        override = f"{{text_config: {override}}}"
    return f"{sentence}. Correct the file, or write overrides_of_model_config: {override}"


def _shown(each: Contradiction) -> str:
    return "nothing" if each.given is None else visible(str(each.given), one_line=True)


def _value(value: object) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
    )


def _narrow_adapter(config: RunConfig, table: ModuleTable) -> str | None:
    """An expression written for another model's names may match a few of this one's, silently."""
    if not config.adapter or not isinstance(config.lora_target_modules, str):
        return None
    every = {"lora_target_modules": None, "lora_target_linear": True}
    modules = choose_targets(table, config.model_copy(update=every))
    chosen = set(choose_targets(table, config)).intersection(modules)
    if not chosen or 2 * len(chosen) >= len(modules):
        return None
    left = sorted({_ending(n) for n in modules} - {_ending(n) for n in chosen})
    reached = " and ".join(sorted({_ending(name) for name in chosen}))
    rest = f"; {', '.join(left)} get none" if left else ""
    return (
        f"the adapter sits on {reached} alone: {len(chosen)} of {len(modules)} linear layers{rest}."
        " lora_target_linear: true adapts all"
    )


def _no_routers(config: RunConfig, table: ModuleTable) -> str | None:
    overrides = config.overrides_of_model_config or {}
    if not overrides.get("output_router_logits") or table.counts_by_group()["experts"]:
        return None
    return "output_router_logits has no effect: the model has no experts whose use to balance"


def _ending(name: str) -> str:
    return name.rpartition(".")[2]

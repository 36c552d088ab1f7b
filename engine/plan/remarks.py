"""What a config does less of on its model than it seems to say, and what cannot be done at all.

The config's own notes know no model: here both are read together, before a plan is believed or a
run is started.
"""

from typing import Literal

from engine.catalog import (
    Architecture,
    Contradiction,
    ModuleTable,
    attention_factor,
    contradictions,
    find_card,
    repaired_rope,
    window_of,
    with_overrides,
)
from engine.catalog.architecture import ROPE
from engine.catalog.modules import ending
from engine.config import RunConfig
from engine.errors import DOES_NOT_FIT, UserError
from engine.hardware import reading
from engine.plan.device import Device, Place
from engine.plan.memory import moment_parts, on_device
from engine.plan.step import Stack
from engine.plan.targets import choose_targets
from engine.units import gib
from engine.visible import visible

Goal = Literal["text", "think", "tools", "vision"]
ANSWERING = Stack("answering", tower="on the device")
"""A question may come with an image, whatever the run's rows had."""


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
    left = sorted({ending(n) for n in modules} - {ending(n) for n in chosen})
    reached = " and ".join(sorted({ending(name) for name in chosen}))
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


def why_not_trained(architecture: Architecture) -> str | None:
    """Why this version cannot train the model, in one sentence; None where it can."""
    if architecture.checkpoint not in ("bf16", "fp16", "fp32", "fp8"):
        stored = architecture.checkpoint.upper()
        return (
            f"Its weights are stored as {stored}, which is not read; a folder with its BF16 or FP8"
            " weights can be trained."
        )
    return None


def refuse_window(config: RunConfig, architecture: Architecture) -> None:
    """Raises UserError for rows that are longer than the window of attention in config.json.

    There it is every layer's. The model may leave it out in some (Ministral 8B of October 2024
    does), which no key of this architecture says; up to the window there is no difference.
    """
    window = window_of(architecture.config)
    if window is None or config.sequence_len <= window:
        return
    raise UserError(
        f"sequence_len is {config.sequence_len:,}, and attention sees {window:,} tokens.",
        "By config.json sliding_window is that of all layers. Models such as Ministral 8B have"
        " layers without it, and on longer rows another model would be trained.",
        f"Set sequence_len to {window} or less.",
    )


def refuse_goal(goal: Goal, architecture: Architecture) -> None:
    """Raises UserError for a goal that the model or this version cannot meet."""
    if goal == "vision" and not architecture.table.counts_by_group()["vision"]:
        raise UserError(
            f"{architecture.name} reads no images.",
            "It has no vision tower.",
            "Choose a model that does: `windtunnel models` lists them.",
        )
    card = architecture.card
    if goal == "think" and card and card.thinking == "none":
        raise UserError(
            f"{card.title} does not think.",
            "Its tokenizer has no tokens for thinking, so a thought would be learned as an answer.",
            "Choose a model that thinks: `windtunnel models` lists them.",
        )


def answering_bytes(config: RunConfig, architecture: Architecture, device: Device) -> int:
    """What has to be free on `device` to hold the run's model, and one long answer's cache."""
    parts = moment_parts(config, Place(architecture, device), "generation", stack=ANSWERING)
    return on_device(sum(parts.values()) - parts.get("optimizer", 0), device)


def refuse_answering(config: RunConfig, architecture: Architecture, device: Device) -> None:
    """Raises UserError with exit status 3 where the run's model does not fit on `device` now."""
    needed = answering_bytes(config, architecture, device)
    if needed <= device.can_give_bytes:
        if device.kind == "cpu":
            refuse_busy_memory(needed, "--anyway tries it all the same")
        return
    four_bit = config.load_in_4bit or config.adapter is None
    smaller = "" if four_bit else ", or train with adapter: qlora, whose weights are in 4 bits"
    raise UserError(
        f"The model does not fit: {gib(needed)} are needed to ask it.",
        f"{device.name} can give {gib(device.can_give_bytes)} of {gib(device.total_bytes)}.",
        f"Ask it on a larger GPU{smaller}; --anyway tries it all the same.",
        exit_status=DOES_NOT_FIT,
    )


def refuse_busy_memory(needed_bytes: int, otherwise: str) -> None:
    """Raises UserError with exit status 3 where other programs hold the RAM that a run takes: all
    of its own on a CPU, what it keeps there for a card.

    `otherwise` is what helps beside closing them.
    """
    total_bytes, free_bytes = reading.read_memory()
    if needed_bytes <= free_bytes:
        return
    raise UserError(
        f"Too little memory is free now: {gib(needed_bytes)} of RAM are needed.",
        f"Other programs leave {gib(free_bytes)} of {gib(total_bytes)}: the run would wait"
        " for the disk at every step, or the system would end it.",
        f"Close some of them and start again; {otherwise}.",
        exit_status=DOES_NOT_FIT,
    )

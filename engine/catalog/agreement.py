"""Where a config.json beside the weights contradicts what is known of its model.

The file decides how the model is built, so that a wrong number in it is trained with and goes
unnoticed: Mistral Medium 3.5 was released with `mscale_all_dim: 1.0`, which switches YaRN's scaling
of attention off. Compared are the keys that a source of the catalog's card vouches for.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from engine.catalog.architecture import Architecture, read_architecture
from engine.catalog.cards import ModelCard, list_models
from engine.catalog.modules import ModuleTable

ROPE = "rope_parameters"
# What transformers 5.23 takes where a file is silent; a test holds these against its classes.
_LEFT_OUT = {f"{ROPE}.mscale_all_dim": 0.0, f"{ROPE}.llama_4_scaling_beta": 0.0}
_LEFT_OUT_BY_TYPE: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"rms_norm_eps": 1e-6, "sliding_window": 4096},
    "ministral3": {"rms_norm_eps": 1e-5, "sliding_window": None},
    "mistral4": {"rms_norm_eps": 1e-6},
}


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One value of a config.json that is not the model's."""

    key: str
    """Dotted, without `text_config`: `rope_parameters.mscale_all_dim`."""
    given: object
    """None where the file is silent, and transformers' default is not the model's."""
    official: object
    card: ModelCard


def contradictions(
    architecture: Architecture, card: ModelCard | None = None
) -> tuple[Contradiction, ...]:
    """What the file of `architecture` says otherwise than the card of its model.

    `card` is that of the name by which the folder was found. A folder that has no such name is held
    against the models of its shape, and only for what their makers have corrected: other models
    have the same shape and, rightly, other values.
    """
    if architecture.folder is None:
        return ()
    card = architecture.card or card
    if card is not None:
        return tuple(_compare(architecture.config, card))
    flat = dict(_flatten(_with_one_rope(_text(architecture.config))))
    return tuple(
        Contradiction(key, wrong, dict(_flatten(_text(like.config)))[key], like)
        for like in _cards_of_shape(architecture.table)
        for key, wrong in like.corrected.items()
        if flat.get(key) == wrong
    )


def repaired_rope(architecture: Architecture, found: Sequence[Contradiction]) -> dict[str, Any]:
    """The file's `rope_parameters` with the official value in place of each that was `found`."""
    rope: dict[str, Any] = _with_one_rope(_text(architecture.config))[ROPE]
    for each in found:
        section, _, name = each.key.rpartition(".")
        if section == ROPE:
            rope[name] = each.official
        elif each.key == ROPE and isinstance(each.official, Mapping):
            rope = dict(each.official)
    return rope


def with_overrides(architecture: Architecture, overrides: object) -> Architecture:
    """`architecture` with the `rope_parameters` of a config's `overrides_of_model_config`.

    As in transformers, they stand under `text_config` where the model reads images, and replace the
    file's as a whole.
    """
    given = overrides if isinstance(overrides, Mapping) else {}
    rope = _text(given).get(ROPE)
    if rope is None:
        return architecture
    config = deepcopy(dict(architecture.config))
    part = config.get("text_config", config)
    part.pop("rope_scaling", None)
    part[ROPE] = dict(rope)
    return replace(architecture, config=config)


def window_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that attention sees in every layer, as transformers takes it: 4,096 where a `mistral`
    config.json is silent. None without a window."""
    text = _text(config)
    silent = _LEFT_OUT_BY_TYPE.get(str(text.get("model_type")), {})
    window = text.get("sliding_window", silent.get("sliding_window"))
    return window if isinstance(window, int) else None


def attention_factor(rope: Mapping[str, Any]) -> float:
    """What YaRN scales queries and keys by (transformers' `_compute_yarn_parameters`)."""
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return 1.0
    keys = ("attention_factor", "factor", "mscale", "mscale_all_dim")
    given = (rope.get(key) for key in keys)
    whole, factor, mscale, all_dim = (v if isinstance(v, int | float) else None for v in given)
    if whole is not None:
        return float(whole)
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float | None, mscale: float) -> float:
    return 1.0 if factor is None or factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    part = config.get("text_config", config)
    return part if isinstance(part, Mapping) else {}


def _compare(config: Mapping[str, Any], card: ModelCard) -> Iterator[Contradiction]:
    vouched = {key for s in card.sources if s.confidence == "high" for key in s.keys}
    given, official = _text(config), _text(card.config)
    if ROPE in vouched and not _has_rope(given):
        yield Contradiction(ROPE, None, official[ROPE], card)
        vouched = {key for key in vouched if not key.startswith(ROPE)}
    flat = dict(_flatten(_with_one_rope(given)))
    silent = {**_LEFT_OUT, **_LEFT_OUT_BY_TYPE.get(str(official["model_type"]), {})}
    for key, value in _flatten(official):
        if not any(key == name or key.startswith(f"{name}.") for name in vouched):
            continue
        if key not in flat and key not in silent:
            continue
        here = flat.get(key, silent.get(key))
        if here != value:
            yield Contradiction(key, here, value, card)


def _has_rope(text: Mapping[str, Any]) -> bool:
    return any(text.get(key) for key in (ROPE, "rope_scaling", "rope_theta"))


def _with_one_rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Files from before transformers 5 spread over `rope_theta` and `rope_scaling` what is one now,
    and had no word for rotation without scaling."""
    scaling = text.get(ROPE) or text.get("rope_scaling") or {}
    rope = {key: value for key, value in dict(scaling).items() if key != "type"}
    rope.setdefault("rope_type", dict(scaling).get("type", "default"))
    if text.get("rope_theta") is not None:
        rope.setdefault("rope_theta", text["rope_theta"])
    return {**text, ROPE: rope}


def _flatten(part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in part.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# The table is of the model that a wizard shows: compared once, not at every keystroke.
@lru_cache(maxsize=32)
def _cards_of_shape(table: ModuleTable) -> tuple[ModelCard, ...]:
    def is_like(other: ModuleTable) -> bool:
        return (
            other.class_name == table.class_name
            and other.routed_share == table.routed_share
            and other.parameters == table.parameters
        )

    return tuple(c for c in list_models() if is_like(read_architecture(c.name).table))

"""Which linear layers a config holds in 4 or 8 bits.

Separate from `memory` because the trainer replaces exactly the layers that the plan counts.
"""

from engine.config import RunConfig

KEPT = ("vision_tower", "multi_modal_projector")
"""What stays in the base precision unless the config says otherwise."""


def kept_modules(config: RunConfig) -> tuple[str, ...]:
    """What of a model stays in the base precision; the head always does."""
    named = (config.bnb_config_kwargs or {}).get("llm_int8_skip_modules")
    return ("lm_head", *(map(str, named) if isinstance(named, list) else KEPT))


def is_kept(module: str, kept: tuple[str, ...]) -> bool:
    """Whether `module`, a qualified name, is one of `kept` or lies in one.

    An entry is one or more whole parts of the name, anywhere in it: `vision_tower`, `layers.0`.
    transformers 5.23 wants the start or the end of the name, so that `vision_tower` skips nothing.
    """
    return any(f".{entry}." in f".{module}." for entry in kept)

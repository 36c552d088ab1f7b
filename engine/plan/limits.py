"""What this version plans and cannot train yet, and which goals a model cannot meet.

Separate from `recommend`, whose rules are about values: a model here has a plan and no run.
"""

from typing import Literal

from engine.catalog import Architecture, window_of
from engine.config import RunConfig
from engine.errors import UserError

Goal = Literal["text", "think", "tools", "vision"]


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

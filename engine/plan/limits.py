"""What this version plans and cannot train yet, and which goals a model cannot meet.

Separate from `recommend`, whose rules are about values: a model here has a plan and no run.
"""

from typing import Literal

from engine.catalog import Architecture
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

"""The Plan page: does it fit, every value with its reason, and what would make it fit."""

from tui.screens.plan.page import PlanPage

__all__ = ["PlanPage"]

"""The Runs page, its words, and the comparison of two runs."""

from tui.screens.runs.page import RunsPage

__all__ = ["RunsPage"]

"""The Model page: which model is trained, and why that one."""

from tui.screens.model.page import ModelPage

__all__ = ["ModelPage"]

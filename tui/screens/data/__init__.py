"""Page 3, Data: where the conversations come from, what was found in them, what to know."""

from tui.screens.data.page import DataPage

__all__ = ["DataPage"]

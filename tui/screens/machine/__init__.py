"""The Machine page: what this computer has, what that is good for, and which device is used."""

from tui.screens.machine.page import MachinePage

__all__ = ["MachinePage"]

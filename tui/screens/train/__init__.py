"""The Train page, and the words, curves and parts that it is made of."""

from tui.screens.train.page import TrainPage

__all__ = ["TrainPage"]

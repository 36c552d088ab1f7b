"""Page 4, Preview: a row token by token as training reads it, and what each switch changes."""

from tui.screens.preview.page import PreviewPage

__all__ = ["PreviewPage"]

"""A bordered part of a page. Focus is a heavy border as well as a colour, for eyes without hues."""

from textual.containers import Vertical
from textual.content import Content
from textual.widget import Widget


class Pane(Vertical):
    """A border with a title above and a note below; heavy while the focus is in it, else round.

    Titles are text, never markup. `can_focus` is for a pane whose content takes no focus itself.
    """

    def __init__(
        self,
        *children: Widget,
        title: str | Content = "",
        subtitle: str | Content = "",
        can_focus: bool = False,
        id: str | None = None,  # noqa: A002 (Textual's name)
        classes: str | None = None,
    ) -> None:
        super().__init__(*children, id=id, classes=classes)
        self.can_focus = can_focus
        self.show_title(title)
        self.show_subtitle(subtitle)

    def show_title(self, text: str | Content) -> None:
        """Text on the upper border; the empty text takes it away."""
        self.border_title = _content(text)

    def show_subtitle(self, text: str | Content) -> None:
        """Text on the lower border."""
        self.border_subtitle = _content(text)


def _content(text: str | Content) -> Content | None:
    # A title is one line: Textual drops what follows a line feed.
    return (Content(text) if isinstance(text, str) else text) if text else None

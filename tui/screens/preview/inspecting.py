"""What the preview says about the token under the cursor, and about its own marks."""

from typing import Final

from textual.content import Content

from engine.chat.render import WITHHELD
from engine.data.requests import PreviewRow
from tui.widgets.tokens import TokenRow, TokenView

MARKS: Final = (
    ("┃", "tokens that are learned: underlined, counted as learned/all"),
    ("┊", "tokens that are only read: dim, counted"),
    ("bold", "a control token; no text of a dataset can become one"),
    ("[image", "one image: its pixels, and its grid of tokens; it is read, never learned"),
    ("think", "the model's thinking; answer and call are what else it writes"),
)


def describe_token(view: TokenView, entry: PreviewRow | None) -> Content:
    """The line below the row: what stands under the cursor."""
    row: TokenRow | None = view.row
    if row is None or entry is None or len(row) != len(entry.kinds):
        return Content("")
    at = view.cursor
    if tokens := row.image_tokens(at):
        return _describe_image(row, at, tokens)
    piece = row.pieces[at].replace(" ", "·") or "(part of a character)"
    is_learned, kind = view.is_learned(at), row.kinds[at]
    state = f"learned as {kind}" if is_learned else f"only read: {kind}"
    if entry.kinds[at] & WITHHELD:
        state += ", kept out by the row"
    source = row.sources[at]
    return Content.assemble(
        (f"token {at + 1:,}", "$lit"),
        ("  id ", "$muted"),
        str(row.ids[at]),
        "  ",
        (piece, "bold $accent"),
        "  ",
        (state, "bold $lit" if is_learned else "$muted"),
        ("  control token" if row.is_control(at) else "", "$muted"),
        (f"  message {source}" if source >= 0 else "", "$faint"),
    )


def _describe_image(row: TokenRow, at: int, tokens: int) -> Content:
    """The whole of an image: its grid, each row of which ends with one more token."""
    source = row.sources[at]
    return Content.assemble(
        (f"{tokens:,} tokens from {at + 2 - tokens:,}", "$lit"),
        "  ",
        (row.pieces[at].strip("[]"), "bold $accent"),
        ("  only read: image", "$muted"),
        (f"  message {source}" if source >= 0 else "", "$faint"),
    )

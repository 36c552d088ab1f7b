"""One row as a person or a program inspects it: its tokens, or why it cannot be used."""

from dataclasses import asdict
from typing import Any

from engine.chat.images import read_size
from engine.chat.render import IGNORED_LABEL, WITHHELD, Kind, LabelRule, RenderedImage
from engine.chat.tokenizer import ChatTokenizer
from engine.data.requests import ImageGrid, PreviewRow, kind_word
from engine.data.rows import RenderedRow


def preview_row(row: RenderedRow, tokenizer: ChatTokenizer) -> PreviewRow:
    """A row with the text of each token.

    An image is drawn as a whole by the last of its tokens, as a character over several tokens is;
    the others show nothing.
    """
    place, first = (row.number, row.line, row.file), tokenizer.first_text_id
    if row.problem is not None:
        return PreviewRow(*place, row.bad_row(row.problem), (), (), (), (), (), (), first)
    assert row.rendered is not None
    assert row.conversation is not None
    rendered = row.rendered
    ids, kinds = rendered.input_ids.tolist(), rendered.kinds.tolist()
    images = [_grid(image) for image in rendered.images]
    pieces = list(tokenizer.pieces(ids))
    places = [at for at, kind in enumerate(kinds) if kind & ~WITHHELD == Kind.IMAGE]
    start = 0
    for image in images:
        end = start + image.rows * (image.columns + 1)
        for at in places[start:end]:
            pieces[at] = ""
        size = f"{image.width}x{image.height}"
        pieces[places[end - 1]] = f"[image {size}: {image.columns} x {image.rows} tokens]"
        start = end
    notes = [note.text for note in row.conversation.notes]
    sources = rendered.sources.tolist()
    return PreviewRow(*place, None, ids, pieces, kinds, sources, notes, images, first)


def preview_entry(row: PreviewRow, rule: LabelRule) -> dict[str, Any]:
    """The JSON of `windtunnel preview`: `row, line, ok, error, input_ids, labels, kinds, sources`,
    and `file`, `notes`, `images`.

    Rows and lines count from 1, `labels` hold -100 where nothing is learned, `sources` -1 for
    tokens of no message. A bad row has empty lists and `error {what, why, fix, message}`.
    """
    learned = zip(row.ids, row.learned(rule), strict=True)
    bad = row.problem
    return {
        "row": row.number,
        "line": row.line,
        "file": row.file,
        "ok": bad is None,
        "error": bad and {key: getattr(bad, key) for key in ("what", "why", "fix", "message")},
        "input_ids": row.ids,
        "labels": [token if carries else IGNORED_LABEL for token, carries in learned],
        "kinds": [kind_word(kind) for kind in row.kinds],
        "sources": row.sources,
        "notes": row.notes,
        "images": [asdict(image) for image in row.images],
    }


def _grid(image: RenderedImage) -> ImageGrid:
    return ImageGrid(image.rows, image.columns, *read_size(image.content))

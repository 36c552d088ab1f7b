"""One row as a person or a program inspects it: ids, labels, kinds and sources, or the problem.

The entry is the contract of `windtunnel preview --json`; the wizard's worker answers with the same.
"""

from typing import Any

from engine.chat.images import read_size
from engine.chat.render import WITHHELD, Kind, LabelRule, RenderedImage, labels
from engine.chat.tokenizer import ChatTokenizer
from engine.data.rows import RenderedRow

KIND_WORDS = {kind.value: kind.word for kind in Kind}


def preview_entry(row: RenderedRow, rule: LabelRule) -> dict[str, Any]:
    """`row, line, ok, error, input_ids, labels, kinds, sources`, and `file`, `notes`, `images`.

    Rows and lines count from 1, `labels` hold -100 where nothing is learned, `sources` -1 for
    tokens of no message. `images` are {rows, columns, width, height} in the order of their tokens:
    the grid of tokens, and the pixels of the file. A bad row has empty lists and
    `error {what, why, fix, message}`.
    """
    entry: dict[str, Any] = {
        "row": row.number,
        "line": row.line,
        "file": row.file,
        "ok": row.problem is None,
        "error": None,
        "input_ids": [],
        "labels": [],
        "kinds": [],
        "sources": [],
        "notes": [],
        "images": [],
    }
    if row.problem is not None:
        problem = row.problem
        entry["error"] = {
            "what": problem.what,
            "why": problem.why,
            "fix": problem.fix,
            "message": problem.message,
        }
    elif row.rendered is not None and row.conversation is not None:
        rendered = row.rendered
        entry["input_ids"] = rendered.input_ids.tolist()
        entry["labels"] = labels(rendered.input_ids, rendered.kinds, rule).tolist()
        entry["kinds"] = [KIND_WORDS[kind & ~WITHHELD] for kind in rendered.kinds.tolist()]
        entry["sources"] = rendered.sources.tolist()
        entry["notes"] = [note.text for note in row.conversation.notes]
        entry["images"] = [_image_entry(image) for image in rendered.images]
    return entry


def _image_entry(image: RenderedImage) -> dict[str, int]:
    width, height = read_size(image.content)
    return {"rows": image.rows, "columns": image.columns, "width": width, "height": height}


def preview_pieces(entry: dict[str, Any], tokenizer: ChatTokenizer) -> list[str]:
    """Each token of an entry for display. An image is drawn as a whole by the last of its tokens,
    as a character over several tokens is; the others show nothing.
    """
    pieces = list(tokenizer.pieces(entry["input_ids"]))
    places = [index for index, kind in enumerate(entry["kinds"]) if kind == Kind.IMAGE.word]
    start = 0
    for image in entry["images"]:
        rows, columns = image["rows"], image["columns"]
        end = start + rows * (columns + 1)
        for place in places[start:end]:
            pieces[place] = ""
        size = f"{image['width']}x{image['height']}"
        pieces[places[end - 1]] = f"[image {size}: {columns} x {rows} tokens]"
        start = end
    return pieces

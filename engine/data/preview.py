"""One row as a person or a program inspects it: ids, labels, kinds and sources, or the problem.

The entry is the contract of `windtunnel preview --json`; the wizard's worker answers with the same.
"""

from typing import Any

from engine.chat.render import WITHHELD, Kind, LabelRule, labels
from engine.data.rows import RenderedRow

KIND_WORDS = {kind.value: kind.word for kind in Kind}


def preview_entry(row: RenderedRow, rule: LabelRule) -> dict[str, Any]:
    """`row, line, ok, error, input_ids, labels, kinds, sources`, and the `file` and `notes`.

    Rows and lines count from 1, `labels` hold -100 where nothing is learned, `sources` -1 for
    tokens of no message. A bad row has empty lists and `error {what, why, fix, message}`.
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
    return entry

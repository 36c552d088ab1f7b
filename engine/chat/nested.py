"""Objects in the columns of a row: their keys as columns, and the texts that they keep.

Published sets nest: a translation by language, passages with marks, answers with places.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from engine.chat.conversation import plain_name

_LISTED_TEXTS: Final = ("text", "texts", "inputtext", "contexts", "passagetext", "sentences")
"""Keys under which an object keeps the texts of a column."""


def open_nested(row: Mapping[str, object], names: Sequence[str]) -> Mapping[str, object]:
    """The row with the keys of objects as columns, such as translation.en, where an entry names
    one; a column of that very name stays what it is."""
    opened = dict(row)
    for name in names:
        head, *keys = name.split(".")
        for key in keys if name not in opened else ():
            value = opened.get(head)
            if isinstance(value, Mapping):
                del opened[head]
                opened |= {f"{head}.{inner}": each for inner, each in value.items()}
            head = f"{head}.{key}"
    return opened


def list_in(value: object) -> object:
    """What an object keeps under a usual key for the texts of a column, else the value itself."""
    if not isinstance(value, Mapping):
        return value
    return next((value[key] for key in value if plain_name(str(key)) in _LISTED_TEXTS), value)


def join_texts(value: object) -> str | None:
    """The texts of a context as one: a text, a list of them, or an object that keeps such a list;
    None where it is something else."""
    if isinstance(value, str):
        return value
    value = list_in(value)
    if not isinstance(value, list | tuple):
        return value if isinstance(value, str) else None
    texts = [join_texts(each) for each in value]
    return None if None in texts else "\n\n".join(text for text in texts if text)

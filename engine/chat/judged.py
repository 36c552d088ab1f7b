"""Rows whose answers are judged: preferred to another one, rated, or with a verdict.

Windtunnel learns answers and no preferences: such a row is refused by name, with the keys that
learn its good answer, and is never taught as good.
"""

import re
from collections.abc import Mapping
from typing import Final

from engine.chat.column_names import LISTS, QUESTIONS, index_of
from engine.chat.conversation import JudgedRow, RowProblem
from engine.chat.transcript import read_transcript
from engine.config import DatasetConfig

_NUMBERED: Final = re.compile(r"(response|output|answer|completion|conversation)([012abjk])")


def refuse_judged(row: Mapping[str, object], dataset: DatasetConfig) -> None:
    """Raises RowProblem for a row that holds answers which are not to be learned."""
    label = dataset.field_label
    if label is not None and label in row:
        if row[label] in (False, 0) or str(row[label]).lower() == "false":
            raise JudgedRow(
                f"The row's {label} is false.",
                f"field_label: {label} leaves out what is labelled so.",
                "Nothing has to be done; without field_label the row would be taught as good.",
            )
        return
    judged = propose_judged(row, dataset)
    if judged is None:
        return
    kind, mapping = judged
    keys = " and ".join(f"`{key}: {column}`" for key, column in mapping.items())
    if "field_label" in mapping:
        raise RowProblem(
            "The row is an answer with a verdict (KTO), and not every such answer is good.",
            f"Its {mapping['field_label']} says whether it is.",
            f"Write {keys} in the dataset's entry: rows whose label is false are left out.",
        )
    fix = f"Write {keys} in the dataset's entry: the preferred answers are learned."
    raise RowProblem(
        f"The row is a preference: {kind}.",
        "Windtunnel learns answers; it does not learn to prefer one to another.",
        fix
        if keys
        else "Write the better answer in a column of its own, and name it in field_answer.",
    )


def propose_judged(
    row: Mapping[str, object], dataset: DatasetConfig
) -> tuple[str, dict[str, str]] | None:
    """What kind of judged answers a row holds, and the keys that learn the good ones, empty where
    no key can; None where the row is of no such kind or the dataset names its columns."""
    index = index_of(tuple(row))
    label = next((index[name] for name in ("label", "ktotag") if name in index), None)
    if label is not None and _is_verdict(row, label) and dataset.field_label is None:
        return "an answer with a verdict", {"field_label": label}
    if dataset.field_answer is not None or dataset.field_messages != LISTS[0]:
        return None  # the entry says which answer is learned
    chosen, rejected = index.get("chosen"), index.get("rejected")
    has_list = isinstance(row.get("messages"), list | tuple)
    if chosen is not None and rejected is not None and not has_list:
        return "a chosen and a rejected answer", _learn_chosen(row, chosen, index)
    sides = [match for name in index if (match := _NUMBERED.fullmatch(name))]
    if len(sides) > 1 and len({side[1] for side in sides}) == 1:
        better = index.get(f"{sides[0][1]}j")
        named = {} if better is None else _learn_chosen(row, better, index)
        return "two answers that are compared", named
    several = row.get("completions")
    if isinstance(several, list) and len(several) > 1 and isinstance(several[0], Mapping):
        return "several answers that are rated", {}
    return None


def _is_verdict(row: Mapping[str, object], label: str) -> bool:
    value = row[label]
    numbered = "completion" in row and value in (0, 1)
    return isinstance(value, bool) or numbered or str(value).lower() in ("true", "false")


def _learn_chosen(
    row: Mapping[str, object], chosen: str, index: Mapping[str, str]
) -> dict[str, str]:
    value = row[chosen]
    whole = isinstance(value, str) and read_transcript(value) is not None
    if whole or (isinstance(value, list | tuple) and len(value) > 1):
        return {"field_messages": chosen}
    names = (*QUESTIONS, *LISTS)
    question = next((index[name] for name in names if name in index), None)
    return {"field_question": question, "field_answer": chosen} if question else {}

"""What a plan has to know of a dataset: a few counts, never its rows.

A checkup makes the counts; planning imports no tokenizer for them, and takes them from the worker
process as a document.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import RunConfig


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of the usable rows of a dataset, under one model's tokenizer."""

    rows: int
    usable_rows: int
    total_tokens: int
    learned_tokens: int
    thinking_tokens: int
    mean_tokens: float
    """Of a row; the next ones too."""
    p95_tokens: int
    longest_tokens: int
    longest_rows: tuple[int, ...] = ()
    """Lengths of the longest rows, the longest first."""
    prompts: tuple[str, ...] = ()
    """Opening questions of a few rows."""
    image_tokens: int = 0
    most_image_tokens: int = 0
    """Of one row."""
    p99_tokens: int = 0
    longest_row: int | None = None
    """Number of the longest row, counted from 1 over all rows; the next one likewise."""
    most_images_row: int | None = None
    most_learned_tokens: int | None = None
    """Of one row; None where they were not counted."""

    def rows_over(self, sequence_len: int) -> tuple[int, bool]:
        """Rows longer than `sequence_len`, and whether there may be more of them than counted."""
        shortest_first = self.longest_rows[::-1]
        over = len(shortest_first) - bisect_right(shortest_first, sequence_len)
        return over, over == len(shortest_first) < self.usable_rows and over > 0

    def longest_kept(self, config: RunConfig) -> int:
        """Tokens of the longest row that trains under `config`'s sequence_len, after any cut."""
        limit = config.sequence_len
        if self.longest_tokens <= limit or config.excess_length_strategy == "truncate":
            return min(limit, self.longest_tokens)
        # A list of rows that are all longer leaves the limit itself as all that is known.
        return next((length for length in self.longest_rows if length <= limit), limit)


def read_statistics(document: Mapping[str, Any] | None) -> Statistics | None:
    """The statistics that `asdict` and JSON made a document of."""
    if document is None:
        return None
    lists: dict[str, Any] = {k: tuple(v) for k, v in document.items() if isinstance(v, list)}
    return Statistics(**{**document, **lists})


def count_held_out(val_set_size: float, rows: int) -> int:
    """How many of `rows` different conversations a `val_set_size` keeps out of training."""
    if val_set_size <= 0 or rows < 2:
        return 0
    wanted = val_set_size * rows if val_set_size < 1 else val_set_size
    return min(max(1, round(wanted)), rows - 1)

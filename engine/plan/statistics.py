"""What a plan has to know of a dataset: a few counts, never its rows.

Separate from `data`, which makes the counts, so that planning imports no tokenizer: they arrive as
the document that `windtunnel check --json` prints and that the worker process sends.
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


def read_statistics(checkup: Mapping[str, Any]) -> Statistics | None:
    """The statistics in a document of `windtunnel check --json`; None without counted tokens."""
    tokens = checkup["tokens"]
    if not tokens or not checkup["usable"]:
        return None
    lengths = tokens["row_length"]
    return Statistics(
        rows=checkup["rows"],
        usable_rows=checkup["usable"],
        total_tokens=tokens["total"],
        learned_tokens=tokens["learned"],
        thinking_tokens=tokens["thinking"],
        mean_tokens=lengths["mean"],
        p95_tokens=lengths["p95"],
        longest_tokens=lengths["max"],
        longest_rows=tuple(tokens["longest_rows"]),
        prompts=tuple(checkup["prompts"]),
        image_tokens=tokens["by_kind"]["image"],
        most_image_tokens=tokens["most_image_tokens"],
        p99_tokens=lengths["p99"],
        longest_row=next(iter(checkup["odd"]["longest"]), None),
        most_images_row=tokens["most_images_row"],
        most_learned_tokens=tokens["learned_a_row"]["max"],
    )

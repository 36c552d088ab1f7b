"""What is known of a dataset once its rows were read: counts, lengths, bad and odd rows.

`checkup` makes it, the worker process sends it, and a plan takes the few counts of `Statistics`;
none of them needs a tokenizer to hold it.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from engine.chat.column_names import is_bookkeeping, is_rating
from engine.chat.conversation import Note
from engine.config import RunConfig
from engine.errors import UserError
from engine.units import counted

# Below this a first fine-tune tends to memorise instead of generalise.
FEW_ROWS = 100
_EXAMPLE = 60
NOTE_EXAMPLES = 5
"""Lines of a finding that are kept."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of the usable rows of a dataset, under one model's tokenizer."""

    usable_rows: int
    total_tokens: int
    thinking_tokens: int
    mean_tokens: float
    """Of a row; the next ones too."""
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


def count_held_out(val_set_size: float, rows: int) -> int:
    """How many of `rows` different conversations a `val_set_size` keeps out of training."""
    if val_set_size <= 0 or rows < 2:
        return 0
    wanted = val_set_size * rows if val_set_size < 1 else val_set_size
    return min(max(1, round(wanted)), rows - 1)


# Above this share the rows that are left out may well be a kind of their own.
_MANY = 0.05


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows that a run does not train on, by the first reason that holds, of the `rows` read.

    `bad` cannot be used, `judged` of them because field_label says so, `too_long` are longer than
    sequence_len, of the others `nothing_learned` hold no learned token up to it; `cut` are trained
    without their end. `image_rows` had images, of which `images_left_out` are not trained on.
    """

    rows: int
    bad: int = 0
    too_long: int = 0
    nothing_learned: int = 0
    cut: int = 0
    image_rows: int = 0
    images_left_out: int = 0
    judged: int = 0

    @property
    def count(self) -> int:
        return self.bad + self.too_long + self.nothing_learned

    @property
    def is_serious(self) -> bool:
        """Whether more than one row in twenty is left out unasked, or every row with an image."""
        no_image = 0 < self.image_rows == self.images_left_out
        return no_image or self.count - self.judged > _MANY * self.rows


def nothing_learned(rows: int, only_thinking: bool) -> UserError:
    """What is said of `rows` in which no token carries the loss."""
    return UserError(
        "Nothing would be learned from this dataset.",
        f"In {counted(rows, 'row')} no token carries the loss.",
        "Every answer is only thinking: turn train_on_thinking on."
        if only_thinking
        else "Check that the rows hold answers, and that none is marked as not to be learned.",
    )


def rows_too_long(over: int, rows: int, sequence_len: int, where: str, tokens: int) -> UserError:
    """What is said under `excess_length_strategy: raise`; the longest row is at `where`."""
    return UserError(
        f"{over} of {rows} rows are longer than sequence_len ({sequence_len}).",
        f"The longest is {where} with {tokens} tokens, and excess_length_strategy is raise.",
        f"Raise sequence_len to {tokens}, or set excess_length_strategy to drop or truncate.",
    )


def no_row_left(over: int, rows: int, sequence_len: int, longest: int) -> UserError:
    """What is said where the length limit leaves nothing that is learned."""
    return UserError(
        "No row is left to train on.",
        f"{over} of {rows} rows are longer than sequence_len ({sequence_len}); the others, and what"
        " truncation leaves of these, hold no learned token.",
        f"Raise sequence_len; the longest row has {longest} tokens.",
    )


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, as `check --json` and meta.json report it.

    `row` counts over all rows, `line` inside the file what `unit` says; `message` is the message
    at fault. `judged`: the dataset's entry leaves it out, nothing is wrong with it.
    """

    file: str
    row: int
    line: int
    message: int | None
    what: str
    why: str
    fix: str
    unit: Literal["line", "row"] = "line"
    judged: bool = False


@dataclass(frozen=True, slots=True)
class FileNote:
    """Something to know of how a file of a dataset is read, or that it is not."""

    file: str
    text: str


@dataclass(frozen=True, slots=True)
class ProblemGroup:
    """Rows with the same problem: the first of them, how many, and the numbers of the first 100.

    `lines` are those of the first five that are in the file of the first.
    """

    first: BadRow
    count: int
    rows: tuple[int, ...]
    lines: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OddRows:
    """Numbers of rows, counted from 1 over all rows, bad ones too.

    `learns_nothing` are rows without a learned token; `only_thinking` those that join them once
    thinking is not learned. The first 100 of each are listed beside their count. `longest` are
    the 1,000 longest rows, longest first; `least_learned` holds (row, tokens, learned).
    """

    learns_nothing: tuple[int, ...]
    learns_nothing_count: int
    only_thinking: tuple[int, ...]
    only_thinking_count: int
    longest: tuple[int, ...]
    least_learned: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens a row: mean, median, 95th and 99th percentile (nearest rank), longest."""

    mean: float
    p50: int
    p95: int
    p99: int
    max: int


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Tokens of the usable rows. `by_kind` uses the words of the preview.

    `kind_counts` counts the stored kinds, from which any label rule gives what is learned;
    `longest_rows` are the lengths of the rows of `OddRows.longest`; `length_counts` the
    rows in 24 equal steps of length up to the longest; `thinking_answers` and
    `call_answers` the assistant messages that think or call a tool.
    """

    total: int
    learned: int
    by_kind: dict[str, int]
    kind_counts: dict[int, int]
    length_counts: tuple[int, ...]
    thinking_answers: int
    call_answers: int
    thinking: int
    answer: int
    longest_rows: tuple[int, ...]
    row_length: Lengths
    learned_a_row: Lengths
    most_image_tokens: int = 0
    """Of one row; the next is its number, None where no row has an image."""
    most_images_row: int | None = None


@dataclass(frozen=True, slots=True)
class ImageStatistics:
    """Images of the usable rows: how many, in how many rows, and those that differ with their
    bytes in all. `largest` is (width, height) in pixels of the one with the most; `named` counts
    the paths and URLs that rows, bad ones too, give instead of bytes.
    """

    count: int
    rows: int
    different: int
    different_bytes: int
    largest: tuple[int, int]
    named: int


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know about usable rows: how many it touches, and the first few of them.

    `lines` are counted inside their files, `numbers` over all rows.
    """

    id: str
    rows: int
    text: str
    lines: tuple[int, ...]
    numbers: tuple[int, ...]


def findings_of(notes: Sequence[Note], line: int, number: int) -> dict[str, Finding]:
    """The notes of one row, by what they are of."""
    return {
        f"{note.id} {note.about}".rstrip(): Finding(note.id, 1, note.text, (line,), (number,))
        for note in notes
    }


def add_findings(counts: dict[str, Finding], more: Mapping[str, Finding]) -> None:
    """Add the findings of later rows to the counts."""
    for key, found in more.items():
        known = counts.get(key)
        if known is None:
            counts[key] = found
            continue
        lines, numbers = (*known.lines, *found.lines), (*known.numbers, *found.numbers)
        shown = (lines[:NOTE_EXAMPLES], numbers[:NOTE_EXAMPLES])
        counts[key] = Finding(found.id, known.rows + found.rows, known.text, *shown)


@dataclass(slots=True)
class Unread:
    """A column, or as messages[].KEY a key of messages, that no rule reads: in how many usable
    rows, and how the first of its values begins. `quiet` are ids, sources and the like; a `rating`
    says how good the row's answer is.
    """

    name: str
    rows: int
    example: str
    quiet: bool
    rating: bool = False


def count_unread(counts: dict[str, Unread], unread: Mapping[str, object]) -> None:
    """Add what was not read of one row to the counts, which are by name."""
    for name, value in unread.items():
        known = counts.get(name)
        if known is None:
            example = value if isinstance(value, str) else repr(value)
            example = example if len(example) <= _EXAMPLE else f"{example[: _EXAMPLE - 1]}…"
            rating = is_rating(name, value)
            quiet = not rating and is_bookkeeping(name, value)
            known = counts[name] = Unread(name, 0, example, quiet, rating)
        known.rows += 1


def add_unread(counts: dict[str, Unread], more: Mapping[str, Unread]) -> None:
    """Add what was not read of later rows to the counts."""
    for name, unread in more.items():
        if name in counts:
            counts[name].rows += unread.rows
        else:
            counts[name] = replace(unread)


_Counted = TypeVar("_Counted", Finding, Unread)


def most_frequent(counts: Mapping[str, _Counted]) -> tuple[_Counted, ...]:
    """Findings, or what was not read, in the order of their rows."""
    return tuple(sorted(counts.values(), key=lambda each: -each.rows))


@dataclass(frozen=True, slots=True)
class Checkup:
    """What was found. `problems` has the first 100,000 bad rows, and none in the answer of the
    worker: no screen takes them all. `groups` has equal ones together, the most frequent first.

    `tokens` and `odd` are None without a tokenizer, `left_out` without a sequence_len too.
    `turns` are the fewest and the most user messages of a usable row, 0 and 0 where there is none;
    `prompts` how a few rows begin; `unread` has the most frequent columns first.
    """

    rows: int
    usable: int
    problems: tuple[BadRow, ...]
    tokens: TokenStatistics | None
    duplicates: int
    nothing_learned: int
    over_sequence_len: int | None
    roles: dict[str, int]
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    turns: tuple[int, int]
    prompts: tuple[str, ...]
    odd: OddRows | None
    images: ImageStatistics
    groups: tuple[ProblemGroup, ...]
    left_out: LeftOut | None = None
    files: tuple[FileNote, ...] = ()
    unread: tuple[Unread, ...] = ()

    @property
    def bad_rows(self) -> int:
        return self.rows - self.usable

    def statistics(self) -> Statistics | None:
        """What a plan needs of it; None where no row can be used or no token was counted."""
        tokens, odd = self.tokens, self.odd
        if tokens is None or odd is None or not self.usable:
            return None
        return Statistics(
            usable_rows=self.usable,
            total_tokens=tokens.total,
            thinking_tokens=tokens.thinking,
            mean_tokens=tokens.row_length.mean,
            longest_tokens=tokens.row_length.max,
            longest_rows=tokens.longest_rows,
            prompts=self.prompts,
            image_tokens=tokens.by_kind["image"],
            most_image_tokens=tokens.most_image_tokens,
            p99_tokens=tokens.row_length.p99,
            longest_row=next(iter(odd.longest), None),
            most_images_row=tokens.most_images_row,
            most_learned_tokens=tokens.learned_a_row.max,
        )

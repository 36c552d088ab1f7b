"""The dataset doctor: what a dataset holds, what is wrong with which line, how much is learned.

It reads rows by the same path as `prepare` and keeps only counts and lengths, so that a dataset of
any size can be checked before anything is written. Without a tokenizer it reports rows and
problems alone.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from engine.chat.conversation import Image
from engine.chat.render import WITHHELD, Kind, LabelRule, Rendered, learned, truncate
from engine.chat.tokenizer import ChatTokenizer
from engine.config import RunConfig
from engine.data.arrays import content_hash
from engine.data.facts import Facts, add_counts, largest_groups
from engine.data.prepare import find_prepared, label_rule
from engine.data.prepared import Prepared
from engine.data.rows import RenderedRow, image_digest
from engine.data.shares import Task, iterate_parts
from engine.data.sources import config_notes
from engine.data.statistics import (
    FEW_ROWS,
    Checkup,
    Finding,
    ImageStatistics,
    LeftOut,
    Lengths,
    OddRows,
    TokenStatistics,
    add_findings,
    most_frequent,
)

_LENGTH_BINS = 24
LISTED_PROBLEMS = 100_000
"""Bad rows that are kept one by one, some 60 MB; beyond, they are counted."""
# As many as a person scrolls through; the counts beside the lists are whole.
_LISTED = 100
LISTED_LONGEST = 1000


def check_config(
    config: RunConfig,
    folder: Path,
    tokenizer: ChatTokenizer | None = None,
    *,
    sequence_len: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checkup:
    """Reads every row of a config's datasets as a run of it would, and reports.

    Paths start at `folder`. `progress` gets (rows, bytes read) and may raise to cancel. Raises
    what `iterate_rendered` raises.
    """
    files = config_notes(config, folder)
    task = CountRows(config=config, folder=folder, sequence_len=sequence_len)
    notebook = task.make(())
    with closing(iterate_parts(task, tokenizer)) as parts:
        for part in parts:
            notebook.add(part.made)
            if progress is not None:
                progress(notebook.facts.rows, part.read_bytes)
    return replace(notebook.report(tokenizer is not None, sequence_len), files=files)


def count_rows(
    config: RunConfig,
    folder: Path,
    tokenizer: ChatTokenizer | None,
    *,
    sequence_len: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checkup:
    """The same for what needs no list of all bad rows: rows that are prepared are not read again.

    It has the first hundred bad rows then. Raises what `check_config` raises.
    """
    prepared = find_prepared(config, folder, tokenizer) if tokenizer else None
    if prepared is None:
        return check_config(config, folder, tokenizer, sequence_len=sequence_len, progress=progress)
    meta = prepared.meta
    notebook = CountRows(config=config, folder=folder, sequence_len=sequence_len).make(())
    notebook.facts = replace(meta.facts, problems=meta.problems)
    for start, end in prepared.pieces():
        notebook.measure(_tokens_of(prepared, start, end))
    found = notebook.report(True, sequence_len)
    images = replace(found.images, different=meta.images, different_bytes=meta.image_bytes)
    return replace(found, images=images, files=config_notes(config, folder))


def _tokens_of(prepared: Prepared, start: int, end: int) -> "Tokens":
    return Tokens(
        prepared.numbers[start:end],
        prepared.lines[start:end],
        prepared.lengths[start:end],
        prepared.hashes[start:end],
        prepared.read_piece("kinds", start, end),
        prepared.read_piece("sources", start, end),
        lambda at: prepared.rendered(start + at),
    )


# Of a notebook; they are added where two become one.
_SUMS = (
    *("thinking_answers", "call_answers", "too_long", "empty", "cut", "images_left_out"),
    *("numbers", "lengths", "with_thinking", "without_thinking", "hashes"),
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Those of some usable rows: `kinds` and `sources` of all tokens one after the other; of each
    row its number, line, tokens and hash, and by its place here what the renderer made."""

    numbers: Any
    lines: Any
    lengths: Any
    hashes: Any
    kinds: Any
    sources: Any
    rendered: Callable[[int], Rendered]


@dataclass(slots=True)
class Notebook:
    """Counts of some rows in a row; 40 bytes a row, plus the bad rows and a digest for each image.

    Columns are the bytes of int64.
    """

    rule: LabelRule
    limit: int | None = None
    """sequence_len, where one is known."""
    truncates: bool = False
    facts: Facts = field(default_factory=Facts)
    image_sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each different image, by its digest."""
    numbers: bytearray = field(default_factory=bytearray)
    """A column of the usable rows; the next ones are too."""
    lengths: bytearray = field(default_factory=bytearray)
    with_thinking: bytearray = field(default_factory=bytearray)
    without_thinking: bytearray = field(default_factory=bytearray)
    hashes: bytearray = field(default_factory=bytearray)
    kind_counts: dict[int, int] = field(default_factory=dict)
    thinking_answers: int = 0
    call_answers: int = 0
    most_image_tokens: int = 0
    most_images_row: int | None = None
    too_long: int = 0
    empty: int = 0
    cut: int = 0
    images_left_out: int = 0

    def take(self, rows: Sequence[RenderedRow]) -> None:
        """Read and count the next rows."""
        self.facts.take(rows)
        for row in rows if self.facts.images else ():
            for message in row.conversation.messages if row.conversation else ():
                for part in message.parts if message.holds(Image) else ():
                    if isinstance(part, Image) and isinstance(part.content, bytes):
                        self.image_sizes[image_digest(part.content)] = len(part.content)
        measured = [(row, row.rendered) for row in rows if row.rendered is not None]
        if not measured:
            return
        usable, rendered = zip(*measured, strict=True)
        self.measure(
            Tokens(
                np.array([row.number for row in usable]),
                np.array([row.line for row in usable]),
                np.array([len(each) for each in rendered]),
                np.array([content_hash(each) for each in rendered], "<u8"),
                np.concatenate([each.kinds for each in rendered]),
                np.concatenate([each.sources for each in rendered]),
                rendered.__getitem__,
            )
        )

    def add(self, next_rows: "Notebook") -> None:
        """Take in what was counted of the rows that follow these."""
        self.facts.add(next_rows.facts, LISTED_PROBLEMS)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(next_rows, name))
        add_counts(self.kind_counts, next_rows.kind_counts)
        self.image_sizes |= next_rows.image_sizes
        if next_rows.most_image_tokens > self.most_image_tokens:
            self.most_image_tokens = next_rows.most_image_tokens
            self.most_images_row = next_rows.most_images_row

    def measure(self, tokens: Tokens) -> None:
        """Count the tokens of usable rows."""
        starts = np.cumsum(tokens.lengths) - tokens.lengths

        def count(flags: Any) -> Any:
            return np.add.reduceat(flags, starts, dtype=np.int64)

        kinds = tokens.kinds
        thinking, without = (
            count(learned(kinds, replace(self.rule, thinking=each))) for each in (True, False)
        )
        trained = thinking if self.rule.thinking else without
        counts = np.bincount(kinds, minlength=256)
        add_counts(self.kind_counts, {at: n for at, n in enumerate(counts.tolist()) if n})
        every_kind, bare = counts[:WITHHELD] + counts[WITHHELD:], kinds & ~np.uint8(WITHHELD)
        of_images = np.zeros(len(starts), np.int64)
        if every_kind[Kind.IMAGE]:
            of_images = count(bare == Kind.IMAGE)
            most = int(np.argmax(of_images))
            if of_images[most] > self.most_image_tokens:
                self.most_image_tokens = int(of_images[most])
                self.most_images_row = int(tokens.numbers[most])
        if every_kind[Kind.THINK]:
            self.thinking_answers += _count_messages(bare == Kind.THINK, tokens)
        if every_kind[Kind.CALL]:
            self.call_answers += _count_messages(bare == Kind.CALL, tokens)
        kept = self._count_kept(trained, tokens)
        self.images_left_out += int(np.count_nonzero((of_images > 0) & ~kept))
        for at in np.flatnonzero(trained == 0):
            place = (int(tokens.lines[at]),), (int(tokens.numbers[at]),)
            none = Finding("nothing_learned", 1, "No token of the row carries the loss.", *place)
            add_findings(self.facts.findings, {none.id: none})
        for column, values in (
            (self.numbers, tokens.numbers),
            (self.lengths, tokens.lengths),
            (self.with_thinking, thinking),
            (self.without_thinking, without),
            (self.hashes, tokens.hashes),
        ):
            column += values.tobytes()

    def _count_kept(self, trained: Any, tokens: Tokens) -> Any:
        """Counts why rows are not trained on; which are, as `Prepared.select` decides."""
        kept = trained > 0
        long = tokens.lengths > (self.limit or np.inf)
        self.empty += int(np.count_nonzero(~kept & ~long))
        if not self.truncates:
            self.too_long += int(np.count_nonzero(long))
            return kept & ~long
        for index in np.flatnonzero(long):
            assert self.limit is not None
            kept[index] = truncate(tokens.rendered(index), self.limit, self.rule) is not None
            self.cut += bool(kept[index])
            self.empty += not bool(kept[index])
        return kept

    @property
    def learned(self) -> bytearray:
        """Learned tokens of each row under the rule."""
        return self.with_thinking if self.rule.thinking else self.without_thinking

    def report(self, measured: bool, sequence_len: int | None) -> Checkup:
        facts = self.facts
        usable = facts.rows - facts.bad
        lengths = _column(self.lengths)
        over = int((lengths > sequence_len).sum()) if measured and sequence_len else None
        nothing = facts.findings.get("nothing_learned")
        duplicates = len(self.hashes) // 8 - len(np.unique(_column(self.hashes)))
        return Checkup(
            rows=facts.rows,
            usable=usable,
            problems=tuple(facts.problems),
            groups=largest_groups(facts.groups),
            unread=most_frequent(facts.unread),
            tokens=self._tokens(lengths) if measured else None,
            duplicates=duplicates,
            nothing_learned=nothing.rows if nothing else 0,
            over_sequence_len=over,
            roles=facts.roles,
            findings=most_frequent(facts.findings),
            warnings=_warnings(usable, facts.bad, duplicates, over, sequence_len),
            turns=facts.turns or (0, 0),
            prompts=tuple(facts.prompts),
            odd=self.odd_rows() if measured else None,
            images=ImageStatistics(
                facts.images,
                facts.image_rows,
                len(self.image_sizes),
                sum(self.image_sizes.values()),
                facts.largest_image,
                facts.named_images,
            ),
            left_out=self._left_out() if measured and sequence_len else None,
        )

    def _left_out(self) -> LeftOut:
        facts = self.facts
        return LeftOut(
            facts.rows,
            bad=facts.bad,
            judged=facts.judged,
            too_long=self.too_long,
            nothing_learned=self.empty,
            cut=self.cut,
            image_rows=facts.image_rows + facts.bad_image_rows,
            images_left_out=self.images_left_out + facts.bad_image_rows,
        )

    def _tokens(self, lengths: Any) -> TokenStatistics:
        by_kind = {
            kind.word: self.kind_counts.get(kind, 0) + self.kind_counts.get(kind | WITHHELD, 0)
            for kind in Kind
        }
        learned_here = _column(self.learned)
        return TokenStatistics(
            total=int(lengths.sum()),
            learned=int(learned_here.sum()),
            by_kind=by_kind,
            kind_counts=dict(sorted(self.kind_counts.items())),
            length_counts=_count_lengths(lengths),
            thinking_answers=self.thinking_answers,
            call_answers=self.call_answers,
            thinking=by_kind["think"],
            answer=by_kind["text"] + by_kind["call"],
            longest_rows=tuple(np.sort(lengths)[::-1][:LISTED_LONGEST].tolist()),
            row_length=length_statistics(lengths),
            learned_a_row=length_statistics(learned_here),
            most_image_tokens=self.most_image_tokens,
            most_images_row=self.most_images_row,
        )

    def odd_rows(self) -> OddRows:
        """The rows that a person should look at."""
        numbers, lengths, always, answers, learned_here = map(
            _column,
            (
                *(self.numbers, self.lengths, self.with_thinking, self.without_thinking),
                self.learned,
            ),
        )
        nothing = numbers[always == 0]
        only_thinking = numbers[(answers == 0) & (always > 0)]
        longest = np.argsort(-lengths, kind="stable")[:LISTED_LONGEST]
        shares = learned_here / np.maximum(lengths, 1)
        least = np.argsort(np.where(learned_here > 0, shares, 1.0), kind="stable")[:_LISTED]
        shown = np.stack((numbers, lengths, learned_here), axis=1)[least].tolist()
        return OddRows(
            tuple(nothing[:_LISTED].tolist()),
            len(nothing),
            tuple(only_thinking[:_LISTED].tolist()),
            len(only_thinking),
            tuple(numbers[longest].tolist()),
            tuple((number, length, kept) for number, length, kept in shown),
        )


class CountRows(Task[Notebook], tag="check", frozen=True, kw_only=True):
    """What the rows hold, counted."""

    made: ClassVar = Notebook
    sequence_len: int | None = None

    def make(self, rows: Sequence[RenderedRow]) -> Notebook:
        truncates = self.config.excess_length_strategy == "truncate"
        notebook = Notebook(label_rule(self.config), self.sequence_len, truncates)
        notebook.take(rows)
        return notebook


def _count_messages(flags: Any, tokens: Tokens) -> int:
    """How many messages of all rows hold a token that is flagged."""
    rows = np.repeat(np.arange(len(tokens.lengths)), tokens.lengths)[flags]
    sources = tokens.sources[flags]
    return int(np.count_nonzero(np.diff(rows) | np.diff(sources))) + 1


def _column(values: bytearray) -> Any:
    return np.frombuffer(values, "<i8")


def _count_lengths(lengths: Any) -> tuple[int, ...]:
    if len(lengths) == 0:
        return ()
    counts, _ = np.histogram(lengths, bins=_LENGTH_BINS, range=(0, int(lengths.max())))
    return tuple(counts.tolist())


def length_statistics(lengths: Any) -> Lengths:
    """Statistics of an int64 array; all zero where it is empty."""
    if len(lengths) == 0:
        return Lengths(0.0, 0, 0, 0, 0)
    p50, p95, p99 = np.percentile(lengths, (50, 95, 99), method="inverted_cdf")
    return Lengths(
        round(float(lengths.mean()), 1), int(p50), int(p95), int(p99), int(lengths.max())
    )


def checkup_document(found: Checkup) -> dict[str, Any]:
    """The JSON of `windtunnel check`, which lists every bad row."""
    document = asdict(found)
    del document["groups"]
    return document


def _warnings(
    usable: int, bad: int, duplicates: int, over: int | None, sequence_len: int | None
) -> tuple[str, ...]:
    found = []
    if usable == 0:
        found.append("No row can be used.")
    elif usable < FEW_ROWS:
        found.append(
            f"Few usable rows ({usable}): below {FEW_ROWS} a model tends to memorise them."
        )
    if bad:
        found.append(f"Rows that cannot be used and would be left out: {bad}.")
    if duplicates:
        found.append(f"Rows that repeat an earlier row and would weigh more: {duplicates}.")
    if over:
        found.append(f"Rows longer than sequence_len ({sequence_len}): {over}.")
    return tuple(found)

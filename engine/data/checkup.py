"""The dataset doctor: what a dataset holds, what is wrong with which line, how much is learned.

It reads rows by the same path as `prepare` and keeps only counts and lengths, so that a dataset of
any size can be checked before anything is written. Without a tokenizer it reports rows and
problems alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from engine.chat.conversation import Conversation, Image, Text
from engine.chat.render import WITHHELD, Kind, LabelRule, Rendered, learned, truncate
from engine.chat.tokenizer import ChatTokenizer
from engine.config import RunConfig
from engine.data.arrays import content_hash
from engine.data.prepare import label_rule
from engine.data.rows import RenderedRow, image_digest
from engine.data.shares import Task, iterate_parts
from engine.data.sources import config_notes
from engine.data.statistics import (
    FEW_ROWS,
    NOTE_EXAMPLES,
    BadRow,
    Checkup,
    Finding,
    ImageStatistics,
    LeftOut,
    Lengths,
    OddRows,
    ProblemGroup,
    TokenStatistics,
    Unread,
    add_findings,
    add_unread,
    count_unread,
    findings_of,
    most_frequent,
)

_LENGTH_BINS = 24
_PROMPTS, _PROMPT_CHARACTERS = 5, 300
_GROUPS, _GROUP_ROWS = 50, 100
LISTED_PROBLEMS = 100_000
"""Bad rows that are kept one by one, some 60 MB; beyond, they are counted."""
_KINDS_OF_PROBLEMS = 10_000
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
                progress(notebook.rows, part.read_bytes)
    return replace(notebook.report(tokenizer is not None, sequence_len), files=files)


# Of a notebook; they are added where two become one.
_SUMS = (
    *("rows", "images", "image_rows", "named_images", "thinking_answers", "call_answers"),
    *("bad_image_rows", "too_long", "empty", "cut", "images_left_out", "numbers", "lengths"),
    *("with_thinking", "without_thinking", "hashes"),
)


@dataclass(slots=True)
class Notebook:
    """Counts of some rows in a row; 40 bytes a row, plus the bad rows and a digest for each image.

    Columns are the bytes of int64.
    """

    rule: LabelRule
    limit: int | None = None
    """sequence_len, where one is known."""
    truncates: bool = False
    rows: int = 0
    problems: list[BadRow] = field(default_factory=list)
    """The first LISTED_PROBLEMS of those that were added, all of those that were taken."""
    bad: int = 0
    """Of those that were added; the next two likewise."""
    judged: int = 0
    groups: dict[str, ProblemGroup] = field(default_factory=dict)
    """By what is wrong; of a file with a thousand kinds, the first ones."""
    roles: dict[str, int] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    unread: dict[str, Unread] = field(default_factory=dict)
    turns: tuple[int, int] | None = None
    prompts: list[str] = field(default_factory=list)
    images: int = 0
    image_rows: int = 0
    image_sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each different image, by its digest."""
    largest_image: tuple[int, int] = (0, 0)
    named_images: int = 0
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
    bad_image_rows: int = 0
    too_long: int = 0
    empty: int = 0
    cut: int = 0
    images_left_out: int = 0

    def take(self, rows: Sequence[RenderedRow]) -> None:
        """Read and count the next rows."""
        measured = []
        for row in rows:
            self.rows += 1
            self.named_images += len(row.image_names)
            if row.problem is not None:
                self.problems.append(row.bad_row(row.problem))
                self.bad_image_rows += bool(row.image_names)
            elif row.conversation is not None:
                self._read(row, row.conversation)
                if row.rendered is not None:
                    measured.append((row, row.rendered))
        if measured:
            self.measure(measured)

    def add(self, next_rows: "Notebook") -> None:
        """Take in what was counted of the rows that follow these."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(next_rows, name))
        for counts, more in (
            (self.roles, next_rows.roles),
            (self.kind_counts, next_rows.kind_counts),
        ):
            _add_counts(counts, more)
        for row in next_rows.problems:
            self._add_problem(row)
        add_findings(self.findings, next_rows.findings)
        add_unread(self.unread, next_rows.unread)
        ends = [each for each in (self.turns, next_rows.turns) if each is not None]
        if ends:
            self.turns = (min(fewest for fewest, _ in ends), max(most for _, most in ends))
        new = [each for each in next_rows.prompts if each not in self.prompts]
        self.prompts += new[: _PROMPTS - len(self.prompts)]
        self.image_sizes |= next_rows.image_sizes
        self.largest_image = max(self.largest_image, next_rows.largest_image, key=math.prod)
        if next_rows.most_image_tokens > self.most_image_tokens:
            self.most_image_tokens = next_rows.most_image_tokens
            self.most_images_row = next_rows.most_images_row

    def _read(self, row: RenderedRow, conversation: Conversation) -> None:
        asked, shown = 0, list[Image]()
        for message in conversation.messages:
            role = message.role
            self.roles[role] = self.roles.get(role, 0) + 1
            asked += role == "user"
            if not isinstance(message.content, str):
                shown += [part for part in message.content if isinstance(part, Image)]
        fewest, most = self.turns or (asked, asked)
        self.turns = (min(fewest, asked), max(most, asked))
        if len(self.prompts) < _PROMPTS:
            prompt = _first_question(conversation)
            if prompt and prompt not in self.prompts:
                self.prompts.append(prompt)
        if shown:
            self._read_images(shown)
        count_unread(self.unread, conversation.unread)
        add_findings(self.findings, findings_of(conversation.notes, row.line, row.number))

    def _read_images(self, shown: Sequence[Image]) -> None:
        self.image_rows += 1
        self.images += len(shown)
        for image in shown:
            assert isinstance(image.content, bytes)
            self.image_sizes[image_digest(image.content)] = len(image.content)
            self.largest_image = max(self.largest_image, image.size or (0, 0), key=math.prod)

    def _add_problem(self, row: BadRow) -> None:
        self.bad += 1
        self.judged += row.judged
        if len(self.problems) < LISTED_PROBLEMS:
            self.problems.append(row)
        _add_to_group(self.groups, row)

    def measure(self, measured: Sequence[tuple[RenderedRow, Rendered]]) -> None:
        """Count the tokens of usable rows."""
        rows, rendered = zip(*measured, strict=True)
        lengths = np.array([len(each) for each in rendered])
        kinds = np.concatenate([each.kinds for each in rendered])
        starts = np.cumsum(lengths) - lengths

        def count(flags: Any) -> Any:
            return np.add.reduceat(flags, starts, dtype=np.int64)

        thinking, without = (
            count(learned(kinds, replace(self.rule, thinking=each))) for each in (True, False)
        )
        trained = thinking if self.rule.thinking else without
        counts = np.bincount(kinds, minlength=256)
        _add_counts(self.kind_counts, {at: n for at, n in enumerate(counts.tolist()) if n})
        every_kind, bare = counts[:WITHHELD] + counts[WITHHELD:], kinds & ~np.uint8(WITHHELD)
        of_images = np.zeros(len(rows), np.int64)
        if every_kind[Kind.IMAGE]:
            of_images = count(bare == Kind.IMAGE)
            most = int(np.argmax(of_images))
            if of_images[most] > self.most_image_tokens:
                self.most_image_tokens = int(of_images[most])
                self.most_images_row = rows[most].number
        if every_kind[Kind.THINK]:
            self.thinking_answers += _count_messages(bare == Kind.THINK, lengths, rendered)
        if every_kind[Kind.CALL]:
            self.call_answers += _count_messages(bare == Kind.CALL, lengths, rendered)
        kept = self._count_kept(lengths, trained, rendered)
        self.images_left_out += int(np.count_nonzero((of_images > 0) & ~kept))
        for index in np.flatnonzero(trained == 0):
            row, text = rows[index], "No token of the row carries the loss."
            none = Finding("nothing_learned", 1, text, (row.line,), (row.number,))
            add_findings(self.findings, {none.id: none})
        self.numbers += np.array([row.number for row in rows], "<i8").tobytes()
        for column, values in (
            (self.lengths, lengths),
            (self.with_thinking, thinking),
            (self.without_thinking, without),
            (self.hashes, np.array([content_hash(each) for each in rendered], "<u8")),
        ):
            column += values.tobytes()

    def _count_kept(self, lengths: Any, trained: Any, rendered: Sequence[Rendered]) -> Any:
        """Counts why rows are not trained on; which are, as `Prepared.select` decides."""
        kept = trained > 0
        long = lengths > (self.limit or np.inf)
        self.empty += int(np.count_nonzero(~kept & ~long))
        if not self.truncates:
            self.too_long += int(np.count_nonzero(long))
            return kept & ~long
        for index in np.flatnonzero(long):
            assert self.limit is not None
            kept[index] = truncate(rendered[index], self.limit, self.rule) is not None
            self.cut += bool(kept[index])
            self.empty += not bool(kept[index])
        return kept

    @property
    def learned(self) -> bytearray:
        """Learned tokens of each row under the rule."""
        return self.with_thinking if self.rule.thinking else self.without_thinking

    def report(self, measured: bool, sequence_len: int | None) -> Checkup:
        usable = self.rows - self.bad
        lengths = _column(self.lengths)
        over = int((lengths > sequence_len).sum()) if measured and sequence_len else None
        nothing = self.findings.get("nothing_learned")
        duplicates = len(self.hashes) // 8 - len(np.unique(_column(self.hashes)))
        return Checkup(
            rows=self.rows,
            usable=usable,
            problems=tuple(self.problems),
            groups=_most_frequent(self.groups),
            unread=most_frequent(self.unread),
            tokens=self._tokens(lengths) if measured else None,
            duplicates=duplicates,
            nothing_learned=nothing.rows if nothing else 0,
            over_sequence_len=over,
            roles=self.roles,
            findings=most_frequent(self.findings),
            warnings=_warnings(usable, self.bad, duplicates, over, sequence_len),
            turns=self.turns or (0, 0),
            prompts=tuple(self.prompts),
            odd=self.odd_rows() if measured else None,
            images=ImageStatistics(
                self.images,
                self.image_rows,
                len(self.image_sizes),
                sum(self.image_sizes.values()),
                self.largest_image,
                self.named_images,
            ),
            left_out=self._left_out() if measured and sequence_len else None,
        )

    def _left_out(self) -> LeftOut:
        return LeftOut(
            self.rows,
            bad=self.bad,
            judged=self.judged,
            too_long=self.too_long,
            nothing_learned=self.empty,
            cut=self.cut,
            image_rows=self.image_rows + self.bad_image_rows,
            images_left_out=self.images_left_out + self.bad_image_rows,
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


def _first_question(conversation: Conversation) -> str | None:
    """What the user says first, where it is a text that can stand in a config."""
    for message in conversation.messages:
        if message.role == "user":
            text = "".join(part.text for part in message.parts if isinstance(part, Text)).strip()
            return text if len(text) <= _PROMPT_CHARACTERS else None
    return None


def _count_messages(flags: Any, lengths: Any, rendered: Sequence[Rendered]) -> int:
    """How many messages of all rows hold a token that is flagged."""
    rows = np.repeat(np.arange(len(lengths)), lengths)[flags]
    sources = np.concatenate([each.sources for each in rendered])[flags]
    return int(np.count_nonzero(np.diff(rows) | np.diff(sources))) + 1


def _column(values: bytearray) -> Any:
    return np.frombuffer(values, "<i8")


def _add_counts(counts: dict[Any, int], more: Mapping[Any, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


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


def group_problems(problems: Iterable[BadRow]) -> tuple[ProblemGroup, ...]:
    """Equal problems as one, the most frequent first."""
    groups: dict[str, ProblemGroup] = {}
    for problem in problems:
        _add_to_group(groups, problem)
    return _most_frequent(groups)


def _add_to_group(groups: dict[str, ProblemGroup], row: BadRow) -> None:
    group = groups.get(row.what)
    if group is None:
        if len(groups) < _KINDS_OF_PROBLEMS:
            groups[row.what] = ProblemGroup(row, 1, (row.row,), (row.line,))
        return
    rows, lines = group.rows, group.lines
    if len(rows) < _GROUP_ROWS:
        rows = (*rows, row.row)
    if group.count < NOTE_EXAMPLES and row.file == group.first.file:
        lines = (*lines, row.line)
    groups[row.what] = ProblemGroup(group.first, group.count + 1, rows, lines)


def _most_frequent(groups: Mapping[str, ProblemGroup]) -> tuple[ProblemGroup, ...]:
    return tuple(sorted(groups.values(), key=lambda group: -group.count)[:_GROUPS])


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

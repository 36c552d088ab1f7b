"""The dataset doctor: what a dataset holds, what is wrong with which line, how much is learned.

It reads rows by the same path as `prepare` and keeps only counts and lengths, so that a dataset of
any size can be checked before anything is written. Without a tokenizer it reports rows and
problems alone.
"""

import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.chat.conversation import Conversation, Image, Text
from engine.chat.render import WITHHELD, Kind, LabelRule, Rendered, learned, truncate
from engine.chat.tokenizer import ChatTokenizer
from engine.config import RunConfig
from engine.data.prepare import content_hash, label_rule
from engine.data.rows import RenderedRow, image_digest, iterate_rendered
from engine.data.sources import config_notes
from engine.data.statistics import (
    FEW_ROWS,
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
    count_unread,
)

_PROGRESS_ROWS = 64
_NOTE_EXAMPLES = 5
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
    strategy = config.excess_length_strategy
    notebook = Notebook(label_rule(config), limit=sequence_len, truncates=strategy == "truncate")
    for row in iterate_rendered(config, folder, tokenizer):
        notebook.rows += 1
        notebook.named_images += len(row.image_names)
        if row.problem is not None:
            notebook.add_problem(row.bad_row(row.problem))
            notebook.bad_image_rows += bool(row.image_names)
        elif row.conversation is not None:
            notebook.read(row, row.conversation)
            if row.rendered is not None:
                notebook.measure(row, row.rendered)
        if progress is not None and notebook.rows % _PROGRESS_ROWS == 0:
            progress(notebook.rows, row.read_bytes)
    return replace(notebook.report(tokenizer is not None, sequence_len), files=files)


@dataclass(slots=True)
class Notebook:
    """Counts of one pass; 40 bytes a row, plus the bad rows and a digest for each image."""

    rule: LabelRule
    limit: int | None = None
    """sequence_len, where one is known."""
    truncates: bool = False
    rows: int = 0
    bad: int = 0
    problems: list[BadRow] = field(default_factory=list)
    """The first LISTED_PROBLEMS."""
    groups: dict[str, ProblemGroup] = field(default_factory=dict)
    """Of all bad rows, by what is wrong; of a file with a thousand kinds, the first ones."""
    roles: dict[str, int] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    unread: dict[str, Unread] = field(default_factory=dict)
    turns: tuple[int, int] | None = None
    prompts: list[str] = field(default_factory=list)
    images: int = 0
    image_rows: int = 0
    image_bytes: int = 0
    image_digests: set[str] = field(default_factory=set)
    largest_image: tuple[int, int] = (0, 0)
    named_images: int = 0
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    """Of the usable rows; the next ones are theirs."""
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    with_thinking: "array[int]" = field(default_factory=lambda: array("q"))
    without_thinking: "array[int]" = field(default_factory=lambda: array("q"))
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    kind_counts: Any = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    thinking_answers: int = 0
    call_answers: int = 0
    most_image_tokens: int = 0
    most_images_row: int | None = None
    bad_image_rows: int = 0
    too_long: int = 0
    empty: int = 0
    cut: int = 0
    images_left_out: int = 0

    def read(self, row: RenderedRow, conversation: Conversation) -> None:
        self._read_images(conversation)
        asked = sum(message.role == "user" for message in conversation.messages)
        fewest, most = self.turns or (asked, asked)
        self.turns = (min(fewest, asked), max(most, asked))
        if len(self.prompts) < _PROMPTS:
            prompt = _first_question(conversation)
            if prompt and prompt not in self.prompts:
                self.prompts.append(prompt)
        for message in conversation.messages:
            self.roles[message.role] = self.roles.get(message.role, 0) + 1
        count_unread(self.unread, conversation.unread)
        for note in conversation.notes:
            self.find(note.id, row, note.text, note.about)

    def _read_images(self, conversation: Conversation) -> None:
        parts = (part for message in conversation.messages for part in message.parts)
        found = [part for part in parts if isinstance(part, Image)]
        self.image_rows += bool(found)
        self.images += len(found)
        for image in found:
            assert isinstance(image.content, bytes)
            digest = image_digest(image.content)
            if digest not in self.image_digests:
                self.image_digests.add(digest)
                self.image_bytes += len(image.content)
            self.largest_image = max(self.largest_image, image.size or (0, 0), key=math.prod)

    def add_problem(self, row: BadRow) -> None:
        """Take in a row that cannot be used."""
        self.bad += 1
        if len(self.problems) < LISTED_PROBLEMS:
            self.problems.append(row)
        _add_to_group(self.groups, row)

    def find(self, name: str, row: RenderedRow, text: str, about: str = "") -> None:
        key = f"{name} {about}".rstrip()
        known = self.findings.get(key, Finding(name, 0, text, (), ()))
        lines, numbers = known.lines, known.numbers
        if len(lines) < _NOTE_EXAMPLES:
            lines, numbers = (*lines, row.line), (*numbers, row.number)
        self.findings[key] = Finding(name, known.rows + 1, known.text, lines, numbers)

    def measure(self, row: RenderedRow, rendered: Rendered) -> None:
        self.numbers.append(row.number)
        self.lengths.append(len(rendered))
        for thinking, counts in ((True, self.with_thinking), (False, self.without_thinking)):
            flags = learned(rendered.kinds, replace(self.rule, thinking=thinking))
            counts.append(int(np.count_nonzero(flags)))
        self.hashes.append(content_hash(rendered))
        self.kind_counts += np.bincount(rendered.kinds, minlength=256)
        of_images = np.count_nonzero(rendered.kinds & ~np.uint8(WITHHELD) == Kind.IMAGE)
        if of_images > self.most_image_tokens:
            self.most_image_tokens, self.most_images_row = int(of_images), row.number
        self.thinking_answers += _messages_of(Kind.THINK, rendered)
        self.call_answers += _messages_of(Kind.CALL, rendered)
        is_kept = self._is_kept(rendered)
        self.images_left_out += bool(of_images) and not is_kept
        if self.learned[-1] == 0:
            self.find("nothing_learned", row, "No token of the row carries the loss.")

    def _is_kept(self, rendered: Rendered) -> bool:
        """Counts why a row is not trained on; whether it is, as `Prepared.select` decides."""
        if self.limit is None or len(rendered) <= self.limit:
            self.empty += self.learned[-1] == 0
            return self.learned[-1] > 0
        if not self.truncates:
            self.too_long += 1
            return False
        left = truncate(rendered, self.limit, self.rule)
        self.cut += left is not None
        self.empty += left is None
        return left is not None

    @property
    def learned(self) -> "array[int]":
        """Learned tokens of each row under the rule."""
        return self.with_thinking if self.rule.thinking else self.without_thinking

    def report(self, measured: bool, sequence_len: int | None) -> Checkup:
        usable = self.rows - self.bad
        lengths = np.array(self.lengths, dtype=np.int64)
        over = int((lengths > sequence_len).sum()) if measured and sequence_len else None
        nothing = self.findings.get("nothing_learned")
        duplicates = len(self.hashes) - len(np.unique(np.array(self.hashes, dtype=np.uint64)))
        return Checkup(
            rows=self.rows,
            usable=usable,
            problems=tuple(self.problems),
            groups=_most_frequent(self.groups),
            unread=tuple(sorted(self.unread.values(), key=lambda each: -each.rows)),
            tokens=self._tokens(lengths) if measured else None,
            duplicates=duplicates,
            nothing_learned=nothing.rows if nothing else 0,
            over_sequence_len=over,
            roles=self.roles,
            findings=tuple(sorted(self.findings.values(), key=lambda found: -found.rows)),
            warnings=_warnings(usable, self.bad, duplicates, over, sequence_len),
            turns=self.turns or (0, 0),
            prompts=tuple(self.prompts),
            odd=self.odd_rows() if measured else None,
            images=ImageStatistics(
                self.images,
                self.image_rows,
                len(self.image_digests),
                self.image_bytes,
                self.largest_image,
                self.named_images,
            ),
            left_out=self._left_out() if measured and sequence_len else None,
        )

    def _left_out(self) -> LeftOut:
        return LeftOut(
            self.rows,
            bad=self.bad,
            too_long=self.too_long,
            nothing_learned=self.empty,
            cut=self.cut,
            image_rows=self.image_rows + self.bad_image_rows,
            images_left_out=self.images_left_out + self.bad_image_rows,
        )

    def _tokens(self, lengths: Any) -> TokenStatistics:
        by_kind = {
            kind.word: int(self.kind_counts[kind] + self.kind_counts[kind | WITHHELD])
            for kind in Kind
        }
        return TokenStatistics(
            total=int(lengths.sum()),
            learned=sum(self.learned),
            by_kind=by_kind,
            kind_counts={kind: n for kind, n in enumerate(self.kind_counts.tolist()) if n},
            length_counts=_count_lengths(lengths),
            thinking_answers=self.thinking_answers,
            call_answers=self.call_answers,
            thinking=by_kind["think"],
            answer=by_kind["text"] + by_kind["call"],
            longest_rows=tuple(np.sort(lengths)[::-1][:LISTED_LONGEST].tolist()),
            row_length=length_statistics(lengths),
            learned_a_row=length_statistics(np.array(self.learned, dtype=np.int64)),
            most_image_tokens=self.most_image_tokens,
            most_images_row=self.most_images_row,
        )

    def odd_rows(self) -> OddRows:
        """The rows that a person should look at."""
        numbers, lengths, always, answers, learned_here = (
            np.array(values, dtype=np.int64)
            for values in (
                *(self.numbers, self.lengths, self.with_thinking, self.without_thinking),
                self.learned,
            )
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


def _first_question(conversation: Conversation) -> str | None:
    """What the user says first, where it is a text that can stand in a config."""
    for message in conversation.messages:
        if message.role == "user":
            text = "".join(part.text for part in message.parts if isinstance(part, Text)).strip()
            return text if len(text) <= _PROMPT_CHARACTERS else None
    return None


def _messages_of(kind: Kind, rendered: Rendered) -> int:
    """How many messages hold a token of that kind."""
    of_kind = rendered.sources[(rendered.kinds & ~np.uint8(WITHHELD)) == kind]
    return int(np.count_nonzero(np.diff(of_kind))) + 1 if len(of_kind) else 0


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
    if group.count < _NOTE_EXAMPLES and row.file == group.first.file:
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

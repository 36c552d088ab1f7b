"""The dataset doctor: what a dataset holds, what is wrong with which line, how much is learned.

It reads rows by the same path as `prepare` and keeps only counts and lengths, so that a dataset of
any size can be checked before anything is written. Without a tokenizer it reports rows and
problems alone.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.chat.messages import Conversation
from engine.chat.render import WITHHELD, Kind, LabelRule, Rendered, learned
from engine.chat.tokenizer import ChatTokenizer
from engine.config import DatasetConfig
from engine.data.array_writer import content_hash, problem_entry
from engine.data.rows import HistoryThinking, iterate_rendered

# Below this a first fine-tune tends to memorise instead of generalise.
FEW_ROWS = 100
_PROGRESS_ROWS = 64
_NOTE_EXAMPLES = 5


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
    """Tokens of the usable rows. `by_kind` uses the words of the preview."""

    total: int
    learned: int
    by_kind: dict[str, int]
    thinking: int
    answer: int
    row_length: Lengths
    learned_a_row: Lengths


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know about usable rows, with how many it touches and the first few lines."""

    id: str
    rows: int
    text: str
    lines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkup:
    """What was found. `problems` has one entry a bad row; `tokens` is None without a tokenizer."""

    rows: int
    usable: int
    problems: list[dict[str, Any]]
    tokens: TokenStatistics | None
    duplicates: int
    nothing_learned: int
    over_sequence_len: int | None
    roles: dict[str, int]
    findings: list[Finding]
    warnings: list[str]


def check(
    datasets: Sequence[DatasetConfig],
    folder: Path,
    tokenizer: ChatTokenizer | None = None,
    *,
    rule: LabelRule | None = None,
    history_thinking: HistoryThinking = "keep",
    sequence_len: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checkup:
    """Reads every row of `datasets` (as `rows.effective_datasets` gives them) and reports.

    `progress` gets (rows, bytes read) and may raise to cancel. Raises `UserError` where a dataset
    cannot be read at all.
    """
    notebook = _Notebook(rule or LabelRule())
    rows = iterate_rendered(datasets, folder, tokenizer, history_thinking=history_thinking)
    for row in rows:
        notebook.rows += 1
        if row.problem is not None:
            notebook.problems.append(problem_entry(row, row.problem))
        elif row.conversation is not None:
            notebook.read(row.line, row.conversation)
            if row.rendered is not None:
                notebook.measure(row.line, row.rendered)
        if progress is not None and notebook.rows % _PROGRESS_ROWS == 0:
            progress(notebook.rows, row.read_bytes)
    return notebook.report(tokenizer is not None, sequence_len)


@dataclass(slots=True)
class _Notebook:
    """Counts of one pass; 24 bytes a row, plus the bad rows."""

    rule: LabelRule
    rows: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    roles: dict[str, int] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    learned: "array[int]" = field(default_factory=lambda: array("q"))
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    kind_counts: Any = field(default_factory=lambda: np.zeros(256, dtype=np.int64))

    def read(self, line: int, conversation: Conversation) -> None:
        for message in conversation.messages:
            self.roles[message.role] = self.roles.get(message.role, 0) + 1
        for note in conversation.notes:
            self.find(note.id, line, note.text)

    def find(self, name: str, line: int, text: str) -> None:
        known = self.findings.get(name, Finding(name, 0, text, ()))
        lines = known.lines if len(known.lines) >= _NOTE_EXAMPLES else (*known.lines, line)
        self.findings[name] = Finding(name, known.rows + 1, known.text, lines)

    def measure(self, line: int, rendered: Rendered) -> None:
        carried = int(np.count_nonzero(learned(rendered.kinds, self.rule)))
        self.lengths.append(len(rendered.input_ids))
        self.learned.append(carried)
        self.hashes.append(content_hash(rendered))
        self.kind_counts += np.bincount(rendered.kinds, minlength=256)
        if carried == 0:
            self.find("nothing_learned", line, "No token of the row carries the loss.")

    def report(self, measured: bool, sequence_len: int | None) -> Checkup:
        usable = self.rows - len(self.problems)
        lengths = np.array(self.lengths, dtype=np.int64)
        over = int((lengths > sequence_len).sum()) if measured and sequence_len else None
        nothing = self.findings.get("nothing_learned")
        duplicates = len(self.hashes) - len(np.unique(np.array(self.hashes, dtype=np.uint64)))
        return Checkup(
            rows=self.rows,
            usable=usable,
            problems=self.problems,
            tokens=self._tokens(lengths) if measured else None,
            duplicates=duplicates,
            nothing_learned=nothing.rows if nothing else 0,
            over_sequence_len=over,
            roles=self.roles,
            findings=sorted(self.findings.values(), key=lambda finding: -finding.rows),
            warnings=_warnings(usable, len(self.problems), duplicates, over, sequence_len),
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
            thinking=by_kind["think"],
            answer=by_kind["text"] + by_kind["call"],
            row_length=length_statistics(lengths),
            learned_a_row=length_statistics(np.array(self.learned, dtype=np.int64)),
        )


def length_statistics(lengths: Any) -> Lengths:
    """Statistics of an int64 array; all zero where it is empty."""
    if len(lengths) == 0:
        return Lengths(0.0, 0, 0, 0, 0)
    p50, p95, p99 = np.percentile(lengths, (50, 95, 99), method="inverted_cdf")
    return Lengths(
        round(float(lengths.mean()), 1), int(p50), int(p95), int(p99), int(lengths.max())
    )


def _warnings(
    usable: int, bad: int, duplicates: int, over: int | None, sequence_len: int | None
) -> list[str]:
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
    return found

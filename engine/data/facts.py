"""What rows hold besides their tokens, counted: roles, notes, problems, what no rule reads.

It follows from the rows and how they are read, and from nothing that labels or length rules decide:
so it is kept with prepared arrays, and a checkup of these reads no row again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.chat.conversation import Conversation, Image, Text
from engine.data.rows import RenderedRow
from engine.data.statistics import (
    NOTE_EXAMPLES,
    BadRow,
    Finding,
    ProblemGroup,
    Unread,
    add_findings,
    add_unread,
    count_unread,
    findings_of,
)

_PROMPTS, _PROMPT_CHARACTERS = 5, 300
_GROUPS, _GROUP_ROWS = 50, 100
_KINDS_OF_PROBLEMS = 10_000
# They are added where two become one.
_SUMS = ("rows", "images", "image_rows", "named_images", "bad_image_rows")


@dataclass(slots=True)
class Facts:
    """Of some rows in a row."""

    rows: int = 0
    problems: list[BadRow] = field(default_factory=list)
    """All of those that were taken; of those that were added the first, as many as were asked."""
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
    largest_image: tuple[int, int] = (0, 0)
    named_images: int = 0
    bad_image_rows: int = 0

    def take(self, rows: Sequence[RenderedRow]) -> None:
        """Read the next rows."""
        for row in rows:
            self.rows += 1
            self.named_images += len(row.image_names)
            if row.problem is not None:
                self.problems.append(row.bad_row(row.problem))
                self.bad_image_rows += bool(row.image_names)
            elif row.conversation is not None:
                self._read(row, row.conversation)

    def add(self, next_rows: "Facts", listed: int) -> None:
        """Take in what was found in the rows that follow these; `listed` problems are kept."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(next_rows, name))
        add_counts(self.roles, next_rows.roles)
        for row in next_rows.problems:
            self.bad += 1
            self.judged += row.judged
            if len(self.problems) < listed:
                self.problems.append(row)
            _add_to_group(self.groups, row)
        add_findings(self.findings, next_rows.findings)
        add_unread(self.unread, next_rows.unread)
        ends = [each for each in (self.turns, next_rows.turns) if each is not None]
        if ends:
            self.turns = (min(fewest for fewest, _ in ends), max(most for _, most in ends))
        new = [each for each in next_rows.prompts if each not in self.prompts]
        self.prompts += new[: _PROMPTS - len(self.prompts)]
        self.largest_image = max(self.largest_image, next_rows.largest_image, key=math.prod)

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
        self.image_rows += bool(shown)
        self.images += len(shown)
        for image in shown:
            self.largest_image = max(self.largest_image, image.size or (0, 0), key=math.prod)
        count_unread(self.unread, conversation.unread)
        add_findings(self.findings, findings_of(conversation.notes, row.line, row.number))


def add_counts(counts: dict[Any, int], more: Mapping[Any, int]) -> None:
    """Add counts by name to others."""
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


def _first_question(conversation: Conversation) -> str | None:
    """What the user says first, where it is a text that can stand in a config."""
    for message in conversation.messages:
        if message.role == "user":
            text = "".join(part.text for part in message.parts if isinstance(part, Text)).strip()
            return text if len(text) <= _PROMPT_CHARACTERS else None
    return None


def group_problems(problems: Iterable[BadRow]) -> tuple[ProblemGroup, ...]:
    """Equal problems as one, the most frequent first."""
    groups: dict[str, ProblemGroup] = {}
    for problem in problems:
        _add_to_group(groups, problem)
    return largest_groups(groups)


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


def largest_groups(groups: Mapping[str, ProblemGroup]) -> tuple[ProblemGroup, ...]:
    """The 50 groups with the most rows, the largest first."""
    return tuple(sorted(groups.values(), key=lambda group: -group.count)[:_GROUPS])

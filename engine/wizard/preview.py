"""The fourth step: rows as training reads them, and what of them is learned.

A checkup is judged by the worker's answer and the switches alone, so that turning one is answered
at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.chat.render import WITHHELD, Kind, LabelRule, count_learned
from engine.config import RunConfig
from engine.data.requests import CheckRows, Preview, PreviewRow, PreviewRows
from engine.data.statistics import Checkup
from engine.errors import UserError
from engine.report import Line, Mark
from engine.runs.comparison import RENDER_KEYS
from engine.units import counted
from engine.wizard.draft import WHICH_KEYS, Draft, is_named_by_path, rows_config
from engine.wizard.question import Choice, Question, Step, Work
from engine.wizard.reading import Read

SWITCH_HELP: Final = {
    "thinking": "yes: the model learns to think as the rows do.\n"
    "no: thinking is read as context, only the answer after it is learned.",
    "old thinking": "What earlier answers of a conversation thought.\n"
    "keep: later turns see it.\ndrop: it is left out, as most chat programs do.",
    "reasoning": "The effort that the prompt states.\n"
    "by row: high where a row thinks, else none.\n"
    "none over thinking would ask not to think and then think.",
}
_EFFORTS: Final = ("by row", "high", "none")


@dataclass(frozen=True, slots=True)
class Switch:
    """One question. `locked` says why there is no choice, and hides the answers."""

    name: str
    answers: tuple[str, ...]
    chosen: int = 0
    locked: str = ""


GROUPS: Final = {
    "thinking": (Kind.THINK,),
    "answers": (Kind.TEXT, Kind.EOS),
    "tool calls": (Kind.CALL,),
    "prompts": (Kind.BOS, Kind.SYSTEM, Kind.TOOLS, Kind.SETTINGS, Kind.USER),
    "tool results": (Kind.TOOL_RESULT,),
    "images": (Kind.IMAGE,),
}
"""The words of the count -> the kinds that they add up."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Mark, word and sentence; `stops` where going on would train nothing."""

    mark: Mark
    word: str
    text: str
    stops: bool = False
    key: str = ""
    """What shows or mends it on the full screen, where keys do."""


@dataclass(frozen=True, slots=True)
class OddRow:
    """A row to look at, and why."""

    number: int
    why: str


@dataclass(frozen=True, slots=True)
class GroupCount:
    """Tokens of one group: learned, and all."""

    learned: int
    total: int


def count_groups(kind_counts: Mapping[int, int], rule: LabelRule) -> dict[str, GroupCount]:
    """Each of GROUPS in a count of stored kinds."""
    found = {}
    for name, kinds in GROUPS.items():
        here = {kind: n for kind, n in kind_counts.items() if kind & ~WITHHELD in kinds}
        found[name] = GroupCount(count_learned(here, rule) if here else 0, sum(here.values()))
    return found


_AGAINST_EFFORT: Final = "effort_contradicts_thinking"
_SUPERLATIVES: Final = 3


RIGHT: Final = "right"
NEXT: Final = "next"
ROW: Final = "row"
_KEPT_ROWS: Final = 500
_SAID_BY_FILE: Final = {*WHICH_KEYS, *RENDER_KEYS} - {"chat_template_kwargs"}
"""What decides a previewed row and has no flag."""


class PreviewStep(Step):
    """The row `number`, and the switches."""

    title = "Preview"

    def __init__(self, draft: Draft, read: Read) -> None:
        self._draft = draft
        self._read = read
        self.number = 1
        self.found: Checkup | None = None
        self.problem: UserError | None = None
        self.rows: dict[int, PreviewRow] = {}
        """Those that were read, by number."""
        self._gone = 0
        """A row that was counted and is there no more."""
        self._efforts: tuple[str, ...] = ()
        self.config: RunConfig | None = None
        """The draft's when `follow` was last called: rows are judged by it also while Plan holds
        values that do not go together."""
        self._asked: RunConfig | None = None

    def work(self) -> Work | None:
        self.follow()
        if self.problem is not None:
            return None
        if self.found is None:
            return self.counting()
        known = self.number in self.rows or self.number == self._gone
        return None if known else self.fetching(self.number)

    def follow(self) -> bool:
        """Begin anew where the draft has other rows or other tokens of them; whether it has."""
        self.config = self._draft.config()
        config = rows_config(self.config, labels=False)
        if config == self._asked:
            return False
        same = self._asked is not None and self._asked.datasets == config.datasets
        self.number = self.number if same else 1
        self._asked = config
        self.forget()
        return True

    def forget(self) -> None:
        self.rows, self.found, self.problem, self._gone = {}, None, None, 0

    def counting(self) -> Work:
        """Reading all rows; it may go on beside `fetching`."""
        assert self._asked is not None
        names = ", ".join(dataset.path for dataset in self._asked.datasets)
        return self._read.work(CheckRows(self._asked, Path.cwd()), f"Reading {names}.")

    def fetching(self, number: int) -> Work:
        """Reading that row and some around it."""
        assert self._asked is not None
        request = PreviewRows(self._asked, Path.cwd(), number)
        return self._read.work(request, f"Reading row {number:,}.")

    def receive(self, work: Work, result: object) -> None:
        if isinstance(result, UserError):
            self.problem = result
        elif isinstance(result, Preview):
            if len(self.rows) > _KEPT_ROWS:
                self.rows.clear()
            self._efforts = result.efforts
            self.rows.update({row.number: row for row in result.rows})
            assert isinstance(work.request, PreviewRows)
            self._gone = 0 if work.request.row in self.rows else work.request.row
        else:
            assert isinstance(result, Checkup)
            self.found = result

    @property
    def row(self) -> PreviewRow | None:
        return self.rows.get(self.number)

    @property
    def rule(self) -> LabelRule:
        """What is learned under the switches."""
        assert self.config is not None
        return LabelRule(self.config.train_on_thinking, self.config.train_on_inputs)

    def switches(self) -> list[Switch]:
        """What of the rows is learned, each with its answers."""
        assert self.config is not None
        found = self.found
        tokens = found.tokens if found else None
        thinks = tokens is None or tokens.thinking > 0
        turns = found.turns[1] if found else 2
        dropped = self.config.history_thinking == "drop"
        effort = (self.config.chat_template_kwargs or {}).get("reasoning_effort", _EFFORTS[0])
        no_thinking = "" if thinks or dropped else "none in the rows"
        return [
            Switch("thinking", ("yes", "no"), int(not self.config.train_on_thinking), no_thinking),
            Switch(
                "old thinking",
                ("keep", "drop"),
                int(dropped),
                no_thinking or ("" if turns > 1 or dropped else "one turn per row"),
            ),
            Switch(
                "reasoning",
                _EFFORTS,
                _EFFORTS.index(effort) if effort in _EFFORTS else 0,
                "" if self._efforts else "v15 models only",
            ),
        ]

    def judge(self) -> Verdict:
        """The worst thing about all rows under the switches, or that all is well."""
        assert self.found is not None
        assert self.config is not None
        found = self.found
        if not found.usable:
            rows = counted(found.rows, "row")
            return Verdict("✗", "stop", f"none of {rows} can be used", stops=True)
        assert found.tokens is not None
        counts = found.tokens.kind_counts
        if not count_learned(counts, self.rule):
            if count_learned(counts, LabelRule(inputs=self.rule.inputs)):
                text = "no token is learned: every answer is only thinking; turn thinking on"
            else:
                text = "no token is learned in any row: all answers are kept out of the loss"
            return Verdict("✗", "stop", text, stops=True)
        for text, key in self._complaints(found):
            return Verdict("!", "look", text, key=key)
        longest = found.tokens.row_length.max
        lengths = f"longest {longest:,} of {self.config.sequence_len:,} tokens"
        return Verdict("✓", "good", f"every row learns something; {lengths}")

    def _complaints(self, found: Checkup) -> list[tuple[str, str]]:
        """Sentences, the worst first, each with the key of the full screen that helps."""
        assert found.tokens is not None
        assert found.odd is not None
        assert self.config is not None
        limit, strategy = self.config.sequence_len, self.config.excess_length_strategy
        nothing = found.odd.learns_nothing_count
        nothing += 0 if self.rule.thinking else found.odd.only_thinking_count
        against = sum(f.rows for f in found.findings if f.id == _AGAINST_EFFORT)
        cut = sum(tokens > limit for tokens in found.tokens.longest_rows)
        fate = {"truncate": "cut", "raise": "which the run refuses"}.get(strategy, "left out")
        shows, complaints = "w shows them", []
        if against:
            rows = counted(against, "row")
            complaints.append((f"effort is none over thinking in {rows}", "space on reasoning"))
        if nothing:
            complaints.append((f"nothing to learn in {counted(nothing, 'row')}, left out", shows))
        if cut:
            rows = counted(cut, "row")
            complaints.append((f"over {limit:,} tokens in {rows}, {fate}", shows))
        if found.bad_rows:
            complaints.append((f"an error in {counted(found.bad_rows, 'row')}, left out", shows))
        return complaints

    def odd_rows(self) -> list[OddRow]:
        """Rows to look at in their order, each once with its first reason; none before all are
        counted. Where there is no problem the longest and the least learned are still worth a look.
        """
        if self.found is None or self.config is None:
            return []
        found, limit = self.found, self.config.sequence_len
        why: dict[int, str] = {}
        for group in found.groups:
            for number in group.rows:
                why.setdefault(number, f"cannot be used: {group.first.what}")
        assert found.tokens is not None
        assert found.odd is not None
        only_thinking = () if self.rule.thinking else found.odd.only_thinking
        for number in (*found.odd.learns_nothing, *only_thinking):
            why.setdefault(number, "learns nothing")
        longest = list(zip(found.odd.longest, found.tokens.longest_rows, strict=True))
        for number, tokens in longest:
            if tokens > limit:
                why.setdefault(number, f"{tokens:,} tokens, over {limit:,}")
        for finding in found.findings:
            if finding.id != "nothing_learned":
                for number in finding.numbers:
                    why.setdefault(number, finding.text)
        for number, tokens in longest[:_SUPERLATIVES]:
            why.setdefault(number, f"among the longest: {tokens:,} tokens")
        for number, tokens, learned in found.odd.least_learned[:_SUPERLATIVES]:
            why.setdefault(number, f"among the least learned: {learned:,} of {tokens:,} tokens")
        return [OddRow(number, why[number]) for number in sorted(why)]

    def question(self) -> Question:
        """Whether it looks right; another row, or another answer of a switch."""
        if self.problem is not None:
            raise self.problem
        verdict, row = self.judge(), self.row
        assert self.found is not None
        odd = next((each for each in self.odd_rows() if each.number > self.number), None)
        choices = [
            Choice(RIGHT, "looks right", refusal=verdict.text if verdict.stops else ""),
            Choice(NEXT, "next row"),
            Choice(
                ROW,
                "another row",
                f"row {odd.number:,}: {odd.why}" if odd else "by its number",
                asks=f"row, 1 to {self.found.rows:,}",
                usual=f"{odd.number if odd else 1}",
            ),
        ]
        for switch in self.switches():
            if not switch.locked:
                choices += [
                    Choice(
                        f"{switch.name}={answer}",
                        f"{switch.name}: {answer}",
                        f"now {switch.answers[switch.chosen]}",
                        reason=SWITCH_HELP[switch.name],
                    )
                    for place, answer in enumerate(switch.answers)
                    if place != switch.chosen
                ]
        headline = Line(verdict.mark, verdict.word, verdict.text)
        facts = (Line("", "", self._row_text(row)), Line("", "", self._totals()))
        return Question(headline, tuple(choices), facts=facts)

    def take(self, key: str, text: str) -> bool:
        """Go on, show another row, or turn a switch."""
        assert self.found is not None
        if key == RIGHT:
            verdict = self.judge()
            if verdict.stops:
                raise UserError(
                    f"Nothing would be learned: {verdict.text}.",
                    "A run of these rows would change nothing.",
                    "Turn thinking on, or take rows with answers.",
                )
        elif key == NEXT:
            self.number = self.number % self.found.rows + 1
        elif key == ROW:
            self.number = self.row_number(text)
        else:
            self.turn(*key.split("=", 1))
        return key == RIGHT

    def turn(self, name: str, answer: str) -> None:
        key: str
        value: object
        match name:
            case "thinking":
                key, value = "train_on_thinking", answer == "yes"
            case "old thinking":
                key, value = "history_thinking", answer
            case _:
                key = "chat_template_kwargs"
                value = None if answer == "by row" else {"reasoning_effort": answer}
        self._draft.reset(key)
        if getattr(self._draft.config(), key) != value:
            self._draft.change(key, value)

    def has_row(self, number: int) -> bool:
        """Whether there is such a row; before all are counted, any from 1 on."""
        return number >= 1 and (self.found is None or number <= self.found.rows)

    def row_number(self, text: str) -> int:
        """The row that a typed text names. Raises UserError where there is none."""
        digits = text.replace(",", "")
        if not digits.isdecimal() or not self.has_row(int(digits)):
            known = f"; there are {self.found.rows:,} rows" if self.found else ""
            raise UserError(
                f"{text} is no row number{known}.", "Rows are counted from 1.", "Type one of them."
            )
        return int(digits)

    def _row_text(self, row: PreviewRow | None) -> str:
        from engine.data.preview import legend, row_text

        if row is None:
            return f"There is no row {self.number:,} any more: the rows were changed."
        text = row_text(row, self.rule, underline=False)
        return f"{text}\n{legend(underline=False)}"

    def _totals(self) -> str:
        found = self.found
        assert found is not None
        tokens = found.tokens
        if tokens is None:
            return ""
        learned = count_learned(tokens.kind_counts, self.rule)
        return (
            f"All {found.usable:,} usable rows: {learned:,} of {tokens.total:,} tokens are learned."
            f" {tokens.thinking:,} are thinking, {tokens.answer:,} answers."
        )


def preview_command(draft: Draft, config: RunConfig, number: int) -> list[str]:
    """The words after `windtunnel` that print row `number` of `config` alike; none where only
    another file could."""
    (dataset, *more), path = config.datasets, draft.path
    own = draft.own or RunConfig(base_model=config.base_model, datasets=config.datasets)
    same = all(getattr(config, key) == getattr(own, key) for key in _SAID_BY_FILE)
    if draft.own is not None:
        words = ["preview", str(path)] if same and path else []
    else:
        named = same and not more and is_named_by_path(dataset)
        words = ["preview", dataset.path, "--model", config.base_model] if named else []
    words += ["--row", str(number)] if words else []
    if words and config.train_on_thinking != own.train_on_thinking:
        words.append("--think" if config.train_on_thinking else "--no-think")
    if config.chat_template_kwargs != own.chat_template_kwargs:
        effort = (config.chat_template_kwargs or {}).get("reasoning_effort")
        words = [*words, "--reasoning-effort", effort] if words and effort else []
    return words

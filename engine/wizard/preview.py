"""The fourth step: rows as training reads them, and what of them is learned."""

from pathlib import Path
from typing import Final

from engine.chat.render import LabelRule, count_learned
from engine.config import RunConfig
from engine.data.requests import CheckRows, Preview, PreviewRow, PreviewRows
from engine.data.statistics import Checkup
from engine.errors import UserError
from engine.report import Line
from engine.wizard.counting import rows_config
from engine.wizard.draft import Draft
from engine.wizard.judging import OddRow, Verdict, judge, list_odd_rows
from engine.wizard.question import Choice, Confirm, Question, Work
from engine.wizard.reading import Read
from engine.wizard.switches import SWITCH_HELP, Switch, change_of, list_switches

RIGHT: Final = "right"
NEXT: Final = "next"
ROW: Final = "row"
_KEPT_ROWS: Final = 500


class PreviewStep:
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
        """Counting all rows, then reading the one that is shown."""
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
        """Have all rows read again."""
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
        """Keep what was found in all rows, the row, or why they cannot be read."""
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
        """The row of that number, once it was read."""
        return self.rows.get(self.number)

    @property
    def rule(self) -> LabelRule:
        """What is learned under the switches."""
        assert self.config is not None
        return LabelRule(self.config.train_on_thinking, self.config.train_on_inputs)

    def switches(self) -> list[Switch]:
        """What of the rows is learned, each with its answers."""
        assert self.config is not None
        return list_switches(self.config, self.found, self._efforts)

    def judge(self) -> Verdict:
        """The worst thing about all rows under the switches, or that all is well."""
        assert self.found is not None
        assert self.config is not None
        limit, excess = self.config.sequence_len, self.config.excess_length_strategy
        return judge(self.found, self.rule, limit, excess)

    def odd_rows(self) -> list[OddRow]:
        """Rows to look at, each with its reason; none before all are counted."""
        if self.found is None or self.config is None:
            return []
        return list_odd_rows(self.found, self.rule, self.config.sequence_len)

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

    def confirm(self, _key: str, _text: str) -> Confirm | None:
        """Nothing here is asked twice."""
        return None

    def take(self, key: str, text: str) -> bool:
        """Go on, show another row, or turn a switch."""
        assert self.found is not None
        if key == RIGHT:
            self._require_learning()
        elif key == NEXT:
            self.number = self.number % self.found.rows + 1
        elif key == ROW:
            self.number = self.row_number(text)
        else:
            self.turn(*key.split("=", 1))
        return key == RIGHT

    def turn(self, name: str, answer: str) -> None:
        """Take another answer of a switch."""
        key, value = change_of(name, answer)
        self._draft.reset(key)
        if getattr(self._draft.config(), key) != value:
            self._draft.change(key, value)

    def back(self) -> bool:
        """Nothing is begun here that could be undone."""
        return False

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

    def _require_learning(self) -> None:
        verdict = self.judge()
        if verdict.stops:
            raise UserError(
                f"Nothing would be learned: {verdict.text}.",
                "A run of these rows would change nothing.",
                "Turn thinking on, or take rows with answers.",
            )

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

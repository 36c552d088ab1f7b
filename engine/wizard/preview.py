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


class PreviewStep:
    """The row `number`, and the switches."""

    title = "Preview"

    def __init__(self, draft: Draft, read: Read) -> None:
        self._draft = draft
        self._read = read
        self.number = 1
        self.found: Checkup | None = None
        self.problem: UserError | None = None
        self._shown: Preview | None = None
        self._asked: RunConfig | None = None

    def work(self) -> Work | None:
        """Counting all rows, then reading the one that is shown."""
        config, here = rows_config(self._draft.config(), labels=False), Path.cwd()
        if config != self._asked:
            same = self._asked is not None and self._asked.datasets == config.datasets
            self.number = self.number if same else 1
            self._asked, self._shown, self.found, self.problem = config, None, None, None
        if self.problem is not None:
            return None
        names = ", ".join(dataset.path for dataset in config.datasets)
        if self.found is None:
            return self._read.work(CheckRows(config, here), f"Reading {names}.")
        if self.row is None:
            request = PreviewRows(config, here, self.number, 1)
            return self._read.work(request, f"Reading row {self.number:,}.")
        return None

    def receive(self, _work: Work, result: object) -> None:
        """Keep what was found in all rows, the row, or why they cannot be read."""
        if isinstance(result, UserError):
            self.problem = result
        elif isinstance(result, Preview):
            self._shown = result
        else:
            assert isinstance(result, Checkup)
            self.found = result

    @property
    def row(self) -> PreviewRow | None:
        """The row of that number, once it was read."""
        rows = self._shown.rows if self._shown else ()
        return next((row for row in rows if row.number == self.number), None)

    @property
    def rule(self) -> LabelRule:
        """What is learned under the switches."""
        config = self._draft.config()
        return LabelRule(config.train_on_thinking, config.train_on_inputs)

    def switches(self) -> list[Switch]:
        """What of the rows is learned, each with its answers."""
        efforts = self._shown.efforts if self._shown else ()
        return list_switches(self._draft.config(), self.found, efforts)

    def judge(self) -> Verdict:
        """The worst thing about all rows under the switches, or that all is well."""
        assert self.found is not None
        config = self._draft.config()
        return judge(self.found, self.rule, config.sequence_len, config.excess_length_strategy)

    def odd_rows(self) -> list[OddRow]:
        """Rows to look at, each with its reason."""
        assert self.found is not None
        return list_odd_rows(self.found, self.rule, self._draft.config().sequence_len)

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
            self.number = self._number(text)
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

    def _number(self, text: str) -> int:
        digits, last = text.replace(",", ""), self.found.rows if self.found else 0
        if not digits.isdecimal() or not 1 <= int(digits) <= last:
            raise UserError(
                f"{text} is no row number.", f"There are {last:,} rows.", "Type one of them."
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
        from engine.data.preview_text import legend, row_text

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

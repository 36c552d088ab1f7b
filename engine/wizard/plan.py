"""The fifth step: does it fit, every value with its reason, and what would make it fit."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from engine.config import NONE, RunConfig, spell
from engine.config.schema import explain_key
from engine.data.sources import with_absolute_paths
from engine.errors import UserError
from engine.hardware import assume, listed_gpus
from engine.plan import (
    Alternative,
    Device,
    Estimate,
    best_device,
    describe_faster,
    estimate,
    make_faster,
    make_fit,
    remarks,
)
from engine.report import VERDICT_MARKS, Line
from engine.report.plan import fit_lines, plan_verdict
from engine.units import GIB, gib
from engine.wizard.counting import count_work, take_answer
from engine.wizard.draft import Draft
from engine.wizard.measure import measure_and_keep
from engine.wizard.question import Choice, Confirm, Progress, Question, Work
from engine.wizard.reading import Read
from engine.wizard.settings import Field, amounts_text, list_fields
from engine.wizard.values import EXPERTS, set_value

ACCEPT: Final = "accept"
SET: Final = "set"
"""Any key of the config, as key=value in the text."""
FIT: Final = "fit"
CARDS: Final = "cards"
ALL: Final = "all"
MEASURE: Final = "measure"
RECOMMENDED: Final = "u"
"""Typed in place of a value: the recommended one."""
FITS_ALREADY: Final = "it fits as it is"
MEASURING: Final = {
    "cuda": "building the real shape with random weights, to run a few steps of it: a few minutes,"
    " no download",
    "cpu": "building two layers with random weights: this checks the formula, and no card",
}
_SHOWN_BYTES: Final = 50 * 2**20


@dataclass(frozen=True, slots=True)
class Card:
    """The same plan on another device."""

    device: Device
    needs: Estimate


def what_to_know(draft: Draft) -> str:
    """What matters most of what is not in the numbers; may be empty."""
    advice = draft.advice()
    if advice.not_trained:
        return f"planned only: {advice.not_trained}"
    if draft.uncounted:
        known = "counted before a change" if draft.statistics else "planned for full rows"
        return f"{known}: {draft.uncounted}"
    try:
        return next(iter(remarks(advice.config, draft.architecture())), "")
    except UserError as error:
        return error.what


def list_rungs(draft: Draft) -> tuple[Alternative, ...]:
    """Changes that make the plan fit, each on top of those before; empty where it fits."""
    assert draft.device is not None
    return make_fit(draft.config(), draft.architecture(), draft.device, draft.statistics)


def faster_sentence(draft: Draft) -> str:
    """What the room that is left could be used for; may be empty."""
    assert draft.device is not None
    place = draft.architecture(), draft.device, draft.statistics
    found = make_faster(draft.config(), *place)
    return describe_faster(found) if found else ""


def list_cards(draft: Draft) -> list[Card]:
    """The plan as it is on every known GPU, the smallest first."""
    config, architecture, rows = draft.config(), draft.architecture(), draft.statistics
    devices = [best_device(assume(gpu.name)) for gpu in listed_gpus()]
    devices.sort(key=lambda device: device.total_bytes)
    return [Card(device, estimate(config, architecture, device, rows)) for device in devices]


class PlanStep:
    """Which values. `asked` is what stands in place of them: the rungs, or other GPUs."""

    title = "Plan"

    def __init__(self, draft: Draft, read: Read) -> None:
        self._draft = draft
        self._read = read
        self.every = False
        """Whether all settings are listed."""
        self._asked = ""
        self._measuring = False
        self._news: tuple[Line, ...] = ()
        self._cards: list[Card] = []

    def work(self) -> Work | None:
        """Counting rows that the plan is without, or the measuring that was asked for.

        The question can be asked before the rows are counted.
        """
        if not self._measuring:
            return count_work(self._draft, self._read)
        config, device = self._draft.config(), self._device
        run = partial(measure_plan, with_absolute_paths(config, Path.cwd()))
        return Work(MEASURE, (repr(config), device.name), MEASURING[device.kind], run)

    def receive(self, work: Work, result: object) -> None:
        """Take in counts of rows, or what was measured: the estimate has it from now on."""
        if work.name != MEASURE:
            take_answer(self._draft, self._draft.config(), result)
            return
        self._measuring = False
        if isinstance(result, UserError):
            text = f"{result.why} {result.fix}"
            self._news = (Line("✗", "not measured", f"{result.what} {text}"),)
        else:
            self._news = (Line("✓", "measured", str(result)),)
            self._draft.look_again()

    def question(self) -> Question:
        """Accept the plan, change a value of it, or see what else would hold it."""
        if self._asked:
            return self._rungs() if self._asked == FIT else self._other_cards()
        fits = self._draft.advice().estimate.verdict != "does not fit"
        choices = [Choice(ACCEPT, "accept", "" if fits else "save it only: it does not fit here")]
        if not fits:
            choices.append(Choice(FIT, "make it fit", "what would, the least change first"))
        choices += [self._choice(field) for field in self.fields()]
        choices += [
            Choice(
                SET,
                "another setting",
                "any key of a config, as key=value",
                asks="key=value",
            ),
            Choice(ALL, "fewer settings" if self.every else "all settings"),
            Choice(CARDS, "other GPUs", "the same plan on each"),
        ]
        if not self._device.planned:
            choices.append(
                Choice(MEASURE, "measure here", reason=f"By {MEASURING[self._device.kind]}.")
            )
        facts = (*self._news, *self.facts())
        return Question(self.verdict(), tuple(choices), facts=facts, typed=SET)

    def verdict(self) -> Line:
        """Whether the plan fits, in one sentence."""
        return plan_verdict(self._draft.advice().estimate, self._device)

    def facts(self) -> tuple[Line, ...]:
        """Where the memory goes, what is not in the numbers, and what the run amounts to."""
        advice = self._draft.advice()
        needs = advice.estimate
        large = {name: size for name, size in needs.parts.items() if size >= _SHOWN_BYTES}
        parts = [f"{name} {gib(size)}" for name, size in large.items()]
        parts.append(f"the rest {gib(needs.device_bytes - sum(large.values()))}")
        spare = needs.spare_bytes
        parts.append(f"spare {gib(spare)}" if spare >= 0 else f"over by {gib(-spare)}")
        known = what_to_know(self._draft)
        return (
            Line("", "", ", ".join(parts)),
            *([Line("·", "", known)] if known else []),
            Line("", "", amounts_text(advice)),
        )

    def fields(self) -> list[Field]:
        """The values that are listed, each with its reason."""
        return list_fields(self._draft, every=self.every)

    def confirm(self, _key: str, _text: str) -> Confirm | None:
        """Nothing here is asked twice."""
        return None

    def take(self, key: str, text: str) -> bool:
        """Accept, change a value, or open what stands in place of the values."""
        before, opened = self._draft.config(), bool(self._asked)
        if opened:
            self._take_line(key)
        elif key in (FIT, CARDS):
            self._asked = key
        elif key == ALL:
            self.every = not self.every
        elif key == MEASURE:
            self._require_here()
            self._measuring = True
        elif key == SET:
            name, equals, value = text.partition("=")
            if not equals:
                raise UserError(
                    f"{text} sets no value.", "It has no equals sign.", "Type key=value: seed=11."
                )
            set_value(self._draft, name.strip(), value.strip())
        elif key != ACCEPT:
            self.change(key, text)
        self._news = _changes(before, self._draft.config())
        return key == ACCEPT and not opened

    def change(self, key: str, text: str) -> None:
        """Take a typed value, or the recommended one; what was not typed changes nothing.

        Raises UserError for a value that the config refuses or that contradicts another.
        """
        if text == RECOMMENDED:
            self._draft.reset(key)
        elif text:
            set_value(self._draft, key, text)

    def back(self) -> bool:
        """Leave the rungs or the other GPUs."""
        opened, self._asked = self._asked, ""
        return bool(opened)

    @property
    def _device(self) -> Device:
        self._draft.advice()  # raises where none is chosen
        assert self._draft.device is not None
        return self._draft.device

    def _choice(self, field: Field) -> Choice:
        found = explain_key(field.key)[0]
        takes = f"It takes {found.takes}. Default: {found.default}"
        values = f" ({EXPERTS} or {NONE})" if field.key == "lora_target_parameters" else ""
        return Choice(
            field.key,
            f"{field.key} {field.value}{', yours' if field.chosen else ''}",
            field.reason,
            reason=f"{found.key}: {found.meaning}\n{takes}",
            asks=f"{field.key}, now {field.value}{values}; {RECOMMENDED} takes the recommended one",
        )

    def _rungs(self) -> Question:
        rungs = list_rungs(self._draft)
        choices = [
            Choice(
                f"{place}",
                rung.name,
                f"{gib(rung.estimate.device_bytes)}; {rung.trade}",
                Line(VERDICT_MARKS[rung.estimate.verdict], rung.estimate.verdict, ""),
            )
            for place, rung in enumerate(rungs)
        ]
        headline = Line("·", "make it fit", "a change is taken with all above it")
        if not rungs:
            headline = Line("✓", "fits", FITS_ALREADY)
        elif rungs[-1].estimate.verdict == "does not fit":
            headline = Line("✗", "not enough", "all of these do not make it fit on this device")
        leave = Choice(ACCEPT, "leave it as it is")
        return Question(headline, (*choices, leave), max(0, len(choices) - 1))

    def _other_cards(self) -> Question:
        self._cards = list_cards(self._draft)
        choices = [
            Choice(
                f"{place}",
                card.device.name,
                f"can give {gib(card.device.can_give_bytes)}, {card.needs.spare_bytes / GIB:+.1f}",
                Line(VERDICT_MARKS[card.needs.verdict], card.needs.verdict, ""),
            )
            for place, card in enumerate(self._cards)
        ]
        names = [card.device.name for card in self._cards]
        here = self._device.name
        headline = Line("·", "other GPUs", "what each can give, and what is left")
        leave = Choice(ACCEPT, "stay with this one", here)
        place = names.index(here) if here in names else len(names)
        return Question(headline, (*choices, leave), place)

    def _take_line(self, key: str) -> None:
        asked, self._asked = self._asked, ""
        if key == ACCEPT:
            return
        if asked == FIT:
            self.take_rung(int(key))
        else:
            self._draft.device = self._cards[int(key)].device

    def take_rung(self, place: int) -> None:
        """Take the change of that place, with all above it."""
        for key, value in list_rungs(self._draft)[place].changes.items():
            self._draft.change(key, value)

    def _require_here(self) -> None:
        if self._device.planned:
            raise UserError(
                f"{self._device.name} is not here.",
                "It can be planned for, and not measured.",
                "Measure on the computer that has it: windtunnel fit config.yml",
            )


def _changes(before: RunConfig, now: RunConfig) -> tuple[Line, ...]:
    """What an answer has changed; empty where it is nothing."""
    changed = [
        f"{key} {spell(key, getattr(before, key))} -> {spell(key, getattr(now, key))}"
        for key in type(now).model_fields
        if getattr(before, key) != getattr(now, key)
    ]
    return (Line("·", "changed", "; ".join(changed)),) if changed else ()


def measure_plan(config: RunConfig, _progress: Progress | None = None) -> str:
    """Measure a config with absolute paths here, keep the figures, and say them in a sentence.

    Raises UserError where it cannot be measured.
    """
    lines = [" ".join(line.split()) for line in fit_lines(measure_and_keep(config))]
    return "; ".join(lines[1:4])

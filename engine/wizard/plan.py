"""The fifth step: does it fit, every value with its reason, and what would make it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from engine.config import FULL, NONE, RunConfig, assignment, spell
from engine.config.schema import explain_key
from engine.data.sources import with_absolute_paths
from engine.errors import UserError
from engine.hardware import attention_backends
from engine.plan import (
    Alternative,
    Attention,
    Device,
    Estimate,
    Recommendation,
    best_device,
    changed,
    describe_faster,
    estimate,
    make_faster,
    make_fit,
    remarks,
)
from engine.plan.attention import task_of, why_not
from engine.plan.savers import IN_RAM
from engine.report import VERDICT_MARKS, Line
from engine.report.plan import fit_lines, plan_verdict, steps_text
from engine.units import GIB, gib
from engine.wizard.draft import (
    EXPERTS,
    Draft,
    count_work,
    expert_tensors,
    is_named_by_path,
    set_value,
    spelled,
    take_answer,
)
from engine.wizard.machine import listed_machines, named_cards
from engine.wizard.question import Choice, Progress, Question, Step, Work
from engine.wizard.reading import Read
from engine.wizard.start import measure_and_keep

_POWERS: Final = tuple(str(2**n) for n in range(7, 18))
_FIRST: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("adapter", ("qlora", "lora", FULL)),
    ("sequence_len", _POWERS),
    ("micro_batch_size", ("1", "2", "4", "8", "16")),
    ("gradient_accumulation_steps", ("1", "2", "4", "8", "16", "32")),
    ("lora_r", ("8", "16", "32", "64", "128")),
    ("lora_alpha", ("8", "16", "32", "64", "128", "256")),
    ("learning_rate", ("1e-05", "2e-05", "5e-05", "0.0001", "0.0002", "0.0005", "0.001", "0.005")),
    ("num_epochs", ("1", "2", "3", "5", "10")),
    ("max_steps", ("none", "50", "100", "150", "500", "1000")),
    (
        "optimizer",
        ("adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit"),
    ),
    ("attn_implementation", (NONE,)),
    ("sample_packing", ("false", "true")),
    ("gradient_checkpointing", ("false", "true")),
    ("checkpointed_layers", ("none", "4", "8", "16", "32")),
    ("lora_dropout", ("0", "0.05", "0.1")),
)
_SEVERAL: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("dp_shard_size", (NONE, "1", "2", "4", "8")),
    ("dp_replicate_size", (NONE, "1", "2", "4", "8")),
)
_EXPERTS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("quantize_moe_experts", ("false", "true")),
    ("lora_target_parameters", (NONE, EXPERTS)),
)
_IMAGES: Final = (("image_size", (NONE, "448", "672", "1024", "1540")),)
_THINKING: Final = (("train_on_thinking", ("true", "false")),)
_MORE: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("val_set_size", ("0", "0.05", "0.1", "0.2")),
    ("lr_scheduler", ("cosine", "linear", "constant")),
    ("warmup_ratio", ("none", "0", "0.03", "0.05", "0.1")),
    ("weight_decay", ("0", "0.01", "0.1")),
    ("max_grad_norm", ("0.5", "1", "2")),
    ("saves_per_epoch", ("none", "1", "2", "4")),
    ("evals_per_epoch", ("none", "1", "2", "4")),
    ("train_on_thinking", ("true", "false")),
    ("history_thinking", ("keep", "drop")),
    ("bf16", ("auto", "true", "false")),
    ("seed", ("0", "1", "42")),
)
_COUNTS: Final = ("none", "4", "8", "16", "32")
_WAITING: Final = tuple(
    (key, _COUNTS if number else (spell(key, RunConfig.model_fields[key].default), "true"))
    for saver in IN_RAM
    for number, key in enumerate(saver.keys)
)
"""What can wait in RAM: shown where it does, and among all settings."""
_ADAPTER_ONLY: Final = ("lora_r", "lora_alpha", "lora_dropout")


@dataclass(frozen=True, slots=True)
class Field:
    """One value: as the file spells it, the usual ones, and why it is what it is."""

    key: str
    value: str
    usual: tuple[str, ...]
    reason: str
    chosen: bool = False
    """By the person: marked with a star."""
    wrong: bool = False
    """The reason says what is wrong with what was typed."""


def list_fields(draft: Draft, *, every: bool, wrong: tuple[str, str] | None = None) -> list[Field]:
    """The lines of the page. `wrong` is a key with what is wrong with its typed value."""
    advice = draft.advice()
    fields = []
    for key, usual in _keys(draft, every):
        bad = wrong is not None and wrong[0] == key
        fields.append(
            Field(
                key,
                spelled(key, advice.config),
                usual,
                wrong[1] if wrong and bad else _reason(draft, advice, key),
                chosen=key in draft.changes,
                wrong=bad,
            )
        )
    return fields


def amounts_text(advice: Recommendation) -> str:
    """What the run amounts to: steps, time and price where they are known, and what moves."""
    needs, duration = advice.estimate, advice.duration
    a_step = needs.tokens_at_once * advice.config.gradient_accumulation_steps
    words = [f"{a_step:,} tokens a step", f"{needs.trainable_parameters:,} trainable"]
    if duration is not None:
        words[:1] = [steps_text(duration)]
        words += [f"about ${duration.usd:,.2f}"] if duration.usd is not None else []
    elif advice.tokens_per_second:
        words.append(f"about {advice.tokens_per_second:,.0f} tokens a second")
    return " · ".join([*words, f"{gib(needs.disk_bytes)} of disk"])


def _keys(draft: Draft, every: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each key of the page with its usual values, the keys of what this model has among them."""
    config, known = draft.config(), draft.statistics
    special = _EXPERTS if expert_tensors(draft.architecture()) and config.adapter else ()
    special += _IMAGES if known and known.image_tokens else ()
    thinks = bool(known and known.thinking_tokens)
    for key, usual in (*_FIRST[:1], *special, *(_THINKING * thinks), *_FIRST[1:]):
        if config.adapter is None and key in _ADAPTER_ONLY:
            continue
        if key == "checkpointed_layers" and not (config.checkpointed_layers or every):
            continue
        yield key, (NONE, *_attention_here(draft)) if key == "attn_implementation" else usual
    if draft.device is not None and draft.device.cards > 1:
        yield from _SEVERAL
    yield from (entry for entry in _WAITING if every or getattr(config, entry[0]))
    if every:
        yield from _MORE if thinks else (*_MORE, *_THINKING)


def _attention_here(draft: Draft) -> Iterator[str]:
    config, device = draft.config(), draft.device
    assert device is not None
    task = task_of(config, draft.architecture(), device)
    return (name for name in attention_backends() if why_not(name, device, task) is None)


def _reason(draft: Draft, advice: Recommendation, key: str) -> str:
    if key == "num_epochs" and advice.config.max_steps:
        return "max_steps ends it"
    if key in dict(_EXPERTS):
        return _price_of_experts(draft, advice, key)
    without = {
        "attn_implementation": _attention_reason(advice.attention),
        "max_steps": "all epochs",
        "dp_shard_size": "a card holds a whole copy",
        "dp_replicate_size": "one copy learns",
        "image_size": "the model's own limit; less gives an image fewer tokens",
    }
    if draft.own is not None and key not in advice.reasons:
        return _reason_of_own(draft, advice, key) or without.get(key, "left out: as usual")
    return advice.reasons.get(key) or without.get(key, "the usual value")


def _attention_reason(chosen: Attention) -> str:
    """What runs where the config names none, and whether FlashAttention 4 could; F1 shows all."""
    if not chosen.flash_4:
        return f"{chosen.backend}: {chosen.reason}"
    return f"{chosen.backend}; {chosen.flash_4}; {chosen.reason}"


def _reason_of_own(draft: Draft, advice: Recommendation, key: str) -> str:
    """What is known of a value of an opened config; empty where the file does not name it."""
    if key == "sequence_len":
        return advice.estimate.decided_by
    if draft.opened is None or key not in draft.opened.document.values:
        return ""
    return draft.opened.document.reason(key) or "in the config"


def _price_of_experts(draft: Draft, advice: Recommendation, key: str) -> str:
    """What the value of a key about experts means, and what the other one would need."""
    here = getattr(advice.config, key)
    other: dict[str, object]
    if key == "lora_target_parameters":
        other = {key: None if here else expert_tensors(draft.architecture())}
        means = "all experts learn too" if here else "attention and shared experts learn"
    else:
        other = {key: not here}
        means = "experts in 4 bits" if here else "experts in 16 bits"
    needs = estimate(changed(advice.config, other), draft.place())
    return f"{'without' if here else 'with'}: {gib(needs.device_bytes)}; {means}"


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
    return make_fit(draft.config(), draft.place())


def faster_sentence(draft: Draft) -> str:
    """What the room that is left could be used for; may be empty."""
    found = make_faster(draft.config(), draft.place())
    return describe_faster(found) if found else ""


def list_cards(draft: Draft) -> list[Card]:
    """The plan as it is on every known GPU, the smallest first."""
    config, place = draft.config(), draft.place()
    devices = map(best_device, listed_machines())
    return [Card(each, estimate(config, replace(place, device=each))) for each in devices]


class PlanStep(Step):
    """Which values; in place of them the rungs or other GPUs, once they are asked for."""

    title = "Plan"

    def __init__(self, draft: Draft, read: Read) -> None:
        self._draft = draft
        self._read = read
        self.every = False
        """Whether all settings are listed."""
        self.measuring = False
        """Whether it was asked for and has not ended."""
        self.rungs: tuple[Alternative, ...] = ()
        self.cards: list[Card] = []
        """What the lines stand for that are asked in place of the values."""
        self._asked = ""
        self._news: tuple[Line, ...] = ()

    def work(self) -> Work | None:
        """Counting rows that the plan is without, or the measuring that was asked for.

        The question can be asked before the rows are counted.
        """
        if not self.measuring:
            return self.counting()
        config, device = self._draft.config(), self._device
        run = partial(measure_plan, with_absolute_paths(config, Path.cwd()))
        return Work(MEASURE, (repr(config), device.name), MEASURING[device.kind], run)

    def counting(self) -> Work | None:
        return count_work(self._draft, self._read)

    def receive(self, work: Work, result: object) -> None:
        """Take in counts of rows, or what was measured: the estimate has it from now on."""
        if work.name != MEASURE:
            take_answer(self._draft, result)
            return
        self.measuring = False
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

    def verdict(self, *, named: bool = True) -> Line:
        """Whether the plan fits, in one sentence; the device in it by its name, or not."""
        return plan_verdict(self._draft.advice().estimate, self._device, named=named)

    def facts(self) -> tuple[Line, ...]:
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

    def fields(self, wrong: tuple[str, str] | None = None) -> list[Field]:
        """The values that are listed, each with its reason; `wrong` as `list_fields` has it."""
        return list_fields(self._draft, every=self.every, wrong=wrong)

    def take(self, key: str, text: str) -> bool:
        """Accept, change a value, or open what stands in place of the values."""
        before, opened = self._draft.config(), bool(self._asked)
        if opened:
            self._take_line(key)
        elif key == FIT:
            self._asked, self.rungs = key, list_rungs(self._draft)
        elif key == CARDS:
            self._asked, self.cards = key, list_cards(self._draft)
        elif key == ALL:
            self.every = not self.every
        elif key == MEASURE:
            if self._device.planned:
                raise UserError(
                    f"{self._device.name} is not here.",
                    "It can be planned for, and not measured.",
                    "Measure on the computer that has it: windtunnel fit config.yml",
                )
            self.measuring = True
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
        rungs = self.rungs
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
        choices = [
            Choice(
                f"{place}",
                card.device.name,
                f"can give {gib(card.device.can_give_bytes)}, {card.needs.spare_bytes / GIB:+.1f}",
                Line(VERDICT_MARKS[card.needs.verdict], card.needs.verdict, ""),
            )
            for place, card in enumerate(self.cards)
        ]
        names = [card.device.name for card in self.cards]
        here = self._device.name
        headline = Line("·", "other GPUs", "what each can give, and what is left")
        leave = Choice(ACCEPT, "stay with this one", here)
        place = names.index(here) if here in names else len(names)
        return Question(headline, (*choices, leave), place)

    def _take_line(self, key: str) -> None:
        asked, self._asked = self._asked, ""
        if key == ACCEPT:
            return
        if asked == CARDS:
            self._draft.device = self.cards[int(key)].device
        else:  # with all rungs above it
            for name, value in self.rungs[int(key)].changes.items():
                self._draft.change(name, value)


def _changes(before: RunConfig, now: RunConfig) -> tuple[Line, ...]:
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


def plan_command(draft: Draft) -> list[str]:
    """The words after `windtunnel`; none where no command says the same.

    The person's values come first: they are what has just changed.
    """
    if not all(map(_can_be_typed, draft.changes.values())):
        return []
    values = [assignment(*change) for change in draft.changes.items()]
    device = draft.device
    assume = []
    if device and device.planned:
        assume = ["--assume", named_cards(device)]
    if draft.own is not None:
        if draft.path is None or (draft.dataset and draft.dataset not in draft.own.datasets):
            return []
        if draft.model and draft.model != draft.own.base_model:
            values.append(assignment("base_model", draft.model))
        return ["estimate", str(draft.path), *values, *assume]
    if draft.dataset and not is_named_by_path(draft.dataset):
        return []
    data = ["--data", draft.dataset.path] if draft.dataset else []
    return ["recommend", *values, "--model", draft.model or "", *data, *assume]


def _can_be_typed(value: object) -> bool:
    """Whether `key=value` of a command line says it: one value, or a list of names."""
    if isinstance(value, list | tuple):
        return all(isinstance(each, str) for each in value)
    return value is None or isinstance(value, bool | int | float | str)

"""Question 5: the recommended values, and the person's own in place of them.

A value is checked as in a config file before it is kept; one that cannot be kept costs nothing but
a sentence.
"""

from collections.abc import Mapping
from typing import Final

from engine.config import NONE, RunConfig, spell
from engine.config.explanation import explain_key
from engine.errors import UserError
from engine.plan import Recommendation, make_fit
from engine.report.plan import headline
from engine.units import gib
from engine.wizard.draft import Draft
from engine.wizard.values import EXPERTS, expert_tensors, set_value, spelled
from tui.plain.dialogue import EXPLAIN, Answer, Dialogue
from tui.plain.setup import Setup, ask_text

_FIT: Final = "f"
_RECOMMENDED: Final = "u"
_HELP: Final = (
    "Enter accepts; a number changes that value, key=value any other of the config; ? 3 explains 3."
)
_SHOWN_BYTES: Final = 50 * 2**20


def ask_plan(setup: Setup) -> None:
    """Question 5. Returns when the plan is accepted, even one that does not fit: Review says so."""
    draft, dialogue = setup.draft, setup.dialogue
    keys: list[str] = []
    _say_verdict(setup)
    while True:
        listed = _keys(draft)
        if listed != keys:
            keys = listed
            _list_values(setup, keys)
        fits = draft.advice().estimate.verdict != "does not fit"
        dialogue.say(f"  * {_HELP}" if fits else f"  * {_HELP} {_FIT} makes it fit.")
        text = dialogue.answer()
        if not text:
            return
        _carry_out(setup, text, keys)


def _carry_out(setup: Setup, text: str, keys: list[str]) -> None:
    draft, dialogue = setup.draft, setup.dialogue
    before = draft.config()
    try:
        if text == _FIT:
            _make_fit(setup)
        elif text.startswith(EXPLAIN):
            _explain(dialogue, text.removeprefix(EXPLAIN).strip(), keys)
        elif "=" in text:
            key, _, value = text.partition("=")
            set_value(draft, key.strip(), value.strip())
        elif chosen := _key_of(text, keys):
            _ask_value(setup, chosen)
        else:
            dialogue.say(f"  {text} is no answer here. {_HELP}")
    except UserError as error:
        dialogue.refuse(_without_place(error))
    if draft.config() != before:
        _say_changes(setup, before)


def _ask_value(setup: Setup, key: str) -> None:
    draft = setup.draft
    now = spelled(key, draft.config())
    if key == "lora_target_parameters":
        now += f"; {EXPERTS} or {NONE}"

    def take(text: str) -> None:
        if text == _RECOMMENDED:
            draft.reset(key)
        elif text:
            try:
                set_value(draft, key, text)
            except UserError as error:
                raise _without_place(error) from None

    ask_text(setup.dialogue, f"  {key}, now {now}: ", take)


def _without_place(error: UserError) -> UserError:
    """The same without the place of the value: it was typed here."""
    what = error.what.removeprefix("The command line: ").removeprefix("The config: ")
    return UserError(what, error.why, error.fix)


def _make_fit(setup: Setup) -> None:
    """Take the changes that make the plan fit, least cost first, once the person agrees."""
    draft, dialogue = setup.draft, setup.dialogue
    device = draft.device
    assert device is not None
    rungs = make_fit(draft.config(), draft.architecture(), device, draft.statistics)
    for rung in rungs:
        needs = rung.estimate
        dialogue.say(f"  {rung.name}: {gib(needs.device_bytes)}, {needs.verdict}; {rung.trade}")
    if not rungs:
        dialogue.say("  It fits already, or nothing would make it smaller.")
    elif rungs[-1].estimate.verdict == "does not fit":
        dialogue.say("  All of these together do not make it fit. A smaller model or a larger GPU")
        dialogue.say("  would: b goes back to them.")
    elif dialogue.choose([Answer("take these changes"), Answer("leave it as it is")]) == 0:
        for key, value in rungs[-1].changes.items():
            draft.change(key, value)


def _explain(dialogue: Dialogue, number: str, keys: list[str]) -> None:
    key = _key_of(number, keys) or number
    if not key:
        dialogue.say(f"  {_HELP} At a value {_RECOMMENDED} takes the recommended one.")
        return
    for found in explain_key(key):
        dialogue.say(
            f"  {found.key}: {found.meaning}", f"  It takes {found.takes}. Default: {found.default}"
        )


def _key_of(text: str, keys: list[str]) -> str | None:
    """The key of a number of the list, or a key that is in it."""
    if text in keys:
        return text
    if text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= len(keys):
        return keys[int(text) - 1]
    return None


def _keys(draft: Draft) -> list[str]:
    """The values worth a line: single ones, recommended, or of the config that was opened."""
    advice = draft.advice()
    names = dict.fromkeys([*(advice.recommended or advice.config.file_values()), *draft.changes])
    names = {name: None for name in names if _is_single(getattr(advice.config, name))}
    if expert_tensors(draft.architecture()):
        names["lora_target_parameters"] = None
    return list(names)


def _is_single(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _list_values(setup: Setup, keys: list[str]) -> None:
    advice = setup.draft.advice()
    for number, key in enumerate(keys, 1):
        own = "*" if key in setup.draft.changes else " "
        reason = f" ({advice.reasons[key]})" if key in advice.reasons else ""
        value = spelled(key, advice.config)
        setup.dialogue.say(f"  {own} {number:>2}  {key} {value}{reason}")


def _say_verdict(setup: Setup) -> None:
    draft = setup.draft
    advice, device = draft.advice(), draft.device
    assert device is not None
    setup.dialogue.say(f"  {headline(advice.estimate, device)}", f"  {_parts(advice)}")
    if advice.not_trained:
        setup.dialogue.say(f"  Not trained yet: {advice.not_trained}")


def _parts(advice: Recommendation) -> str:
    needs = advice.estimate
    large = {name: size for name, size in needs.parts.items() if size >= _SHOWN_BYTES}
    words = [f"{name} {gib(size)}" for name, size in large.items()]
    around = needs.device_bytes - sum(large.values())
    spare = needs.spare_bytes
    last = f"spare {gib(spare)}" if spare >= 0 else f"over by {gib(-spare)}"
    return ", ".join([*words, f"the rest {gib(around)}", last])


def _say_changes(setup: Setup, before: RunConfig) -> None:
    now = setup.draft.config()
    changes = {
        key: (getattr(before, key), getattr(now, key))
        for key in type(now).model_fields
        if getattr(before, key) != getattr(now, key)
    }
    setup.dialogue.say(f"  {_list_changes(changes)}")
    _say_verdict(setup)


def _list_changes(changes: Mapping[str, tuple[object, object]]) -> str:
    return "; ".join(
        f"{key} {spell(key, was)} -> {spell(key, value)}" for key, (was, value) in changes.items()
    )

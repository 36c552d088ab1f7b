"""Question 4: rows as the model sees them, and what is learned of them.

A row is shown by the text of `windtunnel preview`, which needs neither colour nor a screen.
"""

from pathlib import Path
from typing import Final

from engine.errors import UserError
from tui.plain.data import count
from tui.plain.dialogue import Answer
from tui.plain.setup import Setup

_WAYS: Final = ("by row", "high", "none")


def ask_preview(setup: Setup) -> None:
    """Question 4: rows as the model sees them, and the switches of what is learned."""
    row = 1
    while True:
        count(setup)
        _show_row(setup, row)
        _show_totals(setup)
        while True:
            choices, changes = _list_switches(setup)
            index = int(
                setup.dialogue.choose([Answer("looks right"), Answer("next row"), *choices])
            )
            if index == 0:
                if _learns(setup):
                    return
                continue
            break
        if index == 1:
            assert setup.found is not None
            row = row % setup.found.rows + 1
        else:
            key, value = changes[index - 2]
            if value is None:
                setup.draft.reset(key)
            else:
                setup.draft.change(key, value)


def _show_row(setup: Setup, row: int) -> None:
    from engine.data.prepare import label_rule
    from engine.data.preview import preview_row
    from engine.data.preview_text import legend, row_text
    from engine.data.rows import iterate_rendered

    config = setup.draft.config()
    tokenizer = setup.tokenizer()
    rows = iterate_rendered(config, Path.cwd(), tokenizer, skip=row - 1)
    rendered = next(rows, None)
    if rendered is None:
        raise UserError(
            f"There is no row {row} any more.",
            "The rows were changed after they were read.",
            "Take the rows again.",
        )
    text = row_text(preview_row(rendered, tokenizer), label_rule(config), underline=False)
    setup.dialogue.say(*(f"  {line}" for line in text.split("\n")))
    setup.dialogue.say(f"  {legend(underline=False)}")


def _show_totals(setup: Setup) -> None:
    found = setup.found
    assert found is not None
    if found.tokens is None:
        return
    tokens = found.tokens
    told = f"  All {found.usable:,} usable rows: {tokens.learned:,} of {tokens.total:,} tokens are"
    told += f" learned. {tokens.thinking:,} are thinking, {tokens.answer:,} answers."
    if found.nothing_learned:
        told += f" {found.nothing_learned:,} rows learn nothing and are left out."
    else:
        told += " Every row learns something."
    setup.dialogue.say(told)


def _list_switches(setup: Setup) -> tuple[list[Answer], list[tuple[str, object]]]:
    """What can be turned, each with the key that it changes and its value (None: by itself)."""
    config, found = setup.draft.config(), setup.found
    assert found is not None
    dropped = config.history_thinking == "drop"
    choices: list[Answer] = []
    changes: list[tuple[str, object]] = []
    if dropped or (found.tokens and found.tokens.thinking):
        learns = config.train_on_thinking
        choices.append(
            Answer(
                "do not learn thinking" if learns else "learn thinking",
                "Without it thinking is read as context, and only the answer after it is learned.",
            )
        )
        changes.append(("train_on_thinking", not learns))
        if dropped or found.turns[1] > 1:
            choices.append(
                Answer(
                    "keep old thinking" if dropped else "drop old thinking",
                    "What earlier answers thought: kept, later turns see it; dropped, they do not,"
                    " as in most chat programs.",
                )
            )
            changes.append(("history_thinking", "keep" if dropped else "drop"))
    if setup.tokenizer().efforts:
        now = (config.chat_template_kwargs or {}).get("reasoning_effort", _WAYS[0])
        for way in _WAYS:
            if way != now:
                choices.append(
                    Answer(f"reasoning effort {way}", f"The prompt states it; now {now}.")
                )
                effort = None if way == _WAYS[0] else {"reasoning_effort": way}
                changes.append(("chat_template_kwargs", effort))
    return choices, changes


def _learns(setup: Setup) -> bool:
    found = setup.found
    if found is not None and found.tokens is not None and found.tokens.learned:
        return True
    setup.dialogue.say(
        "  No token is learned in any row: a run would change nothing. Turn thinking on, or"
        " take rows with answers."
    )
    return False

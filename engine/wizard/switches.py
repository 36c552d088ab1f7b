"""The switches of the preview: when one is no choice, and which key of the config each changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.config import RunConfig
from engine.data.statistics import Checkup

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


def list_switches(config: RunConfig, found: Checkup | None, efforts: Sequence[str]) -> list[Switch]:
    """One line each; `found` is None while rows are counted, `efforts` what the tokenizer knows."""
    tokens = found.tokens if found else None
    thinks = tokens is None or tokens.thinking > 0
    turns = found.turns[1] if found else 2
    dropped = config.history_thinking == "drop"
    effort = (config.chat_template_kwargs or {}).get("reasoning_effort", _EFFORTS[0])
    no_thinking = "" if thinks or dropped else "none in the rows"
    return [
        Switch("thinking", ("yes", "no"), int(not config.train_on_thinking), no_thinking),
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
            "" if efforts else "v15 models only",
        ),
    ]


def change_of(name: str, answer: str) -> tuple[str, object]:
    """The config's key behind a switch, and its value for `answer`."""
    if name == "thinking":
        return "train_on_thinking", answer == "yes"
    if name == "old thinking":
        return "history_thinking", answer
    return "chat_template_kwargs", None if answer == "by row" else {"reasoning_effort": answer}

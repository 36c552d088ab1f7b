"""Whether the keys of a config contradict each other, and whether its values are safe.

Separate from the types because a rule reads several keys, and because the sentence that a person
reads is the point; `contradictions` is the table of them.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.config.contradictions import RULES
from engine.config.finding import Finding, problem, shown
from engine.visible import visible

if TYPE_CHECKING:
    from engine.config.data_keys import DatasetConfig
    from engine.config.run import RunConfig


_NAMES = (
    "base_model",
    "revision_of_model",
    "tokenizer_config",
    "lora_model_dir",
    "dataset_prepared_path",
    "image_folder",
    "output_dir",
    "resume_from_checkpoint",
    "hub_model_id",
)
_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = (
    *("role", "content", "tool_calls", "tool_call_id", "name", "weight"),
    *("thinking", "reasoning", "reasoning_content"),
)


def broken_rules(config: "RunConfig", unread: frozenset[str] = frozenset()) -> list[Finding]:
    """Every rule that `config` breaks, without lines; the keys of a dataset read datasets[0].path.

    `unread` names keys whose values are not the file's (they could not be read): what depends on
    them is not judged.
    """
    given = config.model_fields_set
    found = []
    for rule in RULES:
        if unread.isdisjoint(rule.keys) and rule.broken(config):
            key = next((key for key in rule.keys if key in given), rule.keys[0])
            found.append(problem(rule.id, key, rule.what, rule.why, rule.fix))
    for key in _NAMES:
        found.extend(_unsafe_name(key, getattr(config, key)))
    found.extend(_bad_patterns("lora_target_modules", config.lora_target_modules))
    found.extend(_bad_patterns("unfrozen_parameters", config.unfrozen_parameters))
    found.extend(_bad_settings("chat_template_kwargs", config.chat_template_kwargs))
    for key in ("datasets", "test_datasets"):
        for index, dataset in enumerate(getattr(config, key)):
            found.extend(_bad_dataset(f"{key}[{index}]", dataset))
    return found


def _unsafe_name(key: str, value: object) -> Iterator[Finding]:
    if not isinstance(value, str):
        return
    if not value.strip():
        what, fix = f"{key} is blank.", "Write a name or a path."
    elif not value.isprintable() or value.startswith("-"):
        what = f"{key} starts with a dash or holds invisible characters: {shown(value)}."
        fix = "Use letters, digits, spaces, dots, slashes, dashes and underscores."
    else:
        return
    why = "It becomes a file name, a hub id or an argument of a command."
    yield problem("unsafe-name", key, what, why, fix)


def _bad_patterns(key: str, patterns: list[str] | str | None) -> Iterator[Finding]:
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield problem(
                "bad-pattern",
                key,
                f"{key} holds {shown(pattern)}, which is not a regular expression.",
                f"Python's re module says: {visible(str(error), one_line=True)}.",
                "Correct the pattern, or write a list of plain names.",
            )


def _bad_settings(key: str, settings: dict[str, str] | None) -> Iterator[Finding]:
    for name, value in (settings or {}).items():
        if name != "reasoning_effort" or value not in ("none", "high"):
            yield problem(
                "bad-template-setting",
                key,
                f"{key} holds {shown(name)}: {shown(value)}.",
                "mistral-common renders one setting, reasoning_effort, as none or high.",
                "Write {reasoning_effort: high}, {reasoning_effort: none}, or remove the key.",
            )


def _bad_dataset(key: str, dataset: "DatasetConfig") -> Iterator[Finding]:
    for field in ("path", "name", "split", "revision"):
        yield from _unsafe_name(f"{key}.{field}", getattr(dataset, field))
    yield from _bad_settings(f"{key}.chat_template_kwargs", dataset.chat_template_kwargs)
    if dataset.trust_remote_code:
        yield problem(
            "no-remote-code",
            f"{key}.trust_remote_code",
            f"{key}.trust_remote_code is true.",
            "It would run Python from the dataset's repository with your rights.",
            "Remove it; use the dataset's Parquet files if it has no others.",
        )
    for field, known, example in (
        ("roles", _ROLES, "user: [human]"),
        ("message_property_mappings", _MESSAGE_KEYS, "role: from"),
    ):
        for name in getattr(dataset, field) or {}:
            if name not in known:
                yield problem(
                    "unknown-name",
                    f"{key}.{field}",
                    f"{key}.{field} names {shown(name)}.",
                    f"Left of the colon stands one of {', '.join(known)}.",
                    f"Write ours: theirs, for example {example}.",
                )

"""The commands about the config's format: schema, and explain for one key.

They only print what `engine.config` knows, so that help on the screen, in the wizard and in an
editor is one text.
"""

import json
import textwrap
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from engine.cli.printing import AsJson
from engine.config.schema import Explanation, config_schema, explain_key

_WIDTH = 80
_LABEL_WIDTH = 10


def print_schema(*, as_json: Annotated[bool, Parameter("--json")] = False) -> int:
    """Print the JSON schema of a config, with what each key means, for editors and scripts.

    Parameters
    ----------
    as_json
        The schema is JSON in any case; without this it is indented.
    """
    print(json.dumps(config_schema(), indent=None if as_json else 2))
    return 0


def print_explanation(key: str, /, *, as_json: AsJson = False) -> int:
    """Explain one key of a config: what it does, what it takes, its default.

    Parameters
    ----------
    key
        A key such as lora_r, or datasets.path for a key of a dataset.
    """
    found = explain_key(key)
    if as_json:
        print(json.dumps({"keys": [asdict(explanation) for explanation in found]}))
    else:
        print("\n\n".join(describe(explanation) for explanation in found))
    return 0


def describe(explanation: Explanation) -> str:
    """An explanation as plain text, at most 80 columns wide."""
    lines = [f"{explanation.key}  ({explanation.section})", ""]
    lines += [*textwrap.wrap(explanation.meaning, _WIDTH), ""]
    for label, text in (
        ("takes", explanation.takes),
        ("default", explanation.default),
        ("here", explanation.limit),
    ):
        if text:
            lines += textwrap.wrap(
                text,
                _WIDTH,
                initial_indent=label.ljust(_LABEL_WIDTH),
                subsequent_indent=" " * _LABEL_WIDTH,
            )
    return "\n".join(lines)

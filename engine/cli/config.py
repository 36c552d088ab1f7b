"""The commands about a config: `new` asks for one, `schema` and `explain` say what stands in it,
`help` what belongs together."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from engine.cli.terminal import HOST, Ascii, AsJson, Assume, CommandHost, NewRequest
from engine.config.finding import shown
from engine.config.schema import Explanation, config_schema, explain_key
from engine.errors import UserError

_PAGES = Path(__file__).parents[1] / "help"
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


def print_help(topic: str | None = None, /, *, as_json: AsJson = False) -> int:
    """Print one of the help pages; without a name, which there are.

    Parameters
    ----------
    topic
        A page, such as clusters.
    """
    pages = {page.stem: page for page in sorted(_PAGES.glob("*.md"))}
    titles = {name: page.read_text("utf-8").partition("\n")[0][2:] for name, page in pages.items()}
    if topic is None:
        lines = [f"windtunnel help {name:<12}{title}" for name, title in titles.items()]
        print(json.dumps({"topics": titles}) if as_json else "\n".join(lines))
        return 0
    if topic not in pages:
        raise UserError(
            f"There is no help page {shown(topic)}.",
            f"There are: {', '.join(pages)}.",
            "`windtunnel --help` lists the commands; `windtunnel explain KEY` explains a key.",
        )
    text = pages[topic].read_text("utf-8")
    print(json.dumps({"topic": topic, "text": text}) if as_json else text.rstrip())
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


def new(
    *,
    out: Annotated[
        Path | None, Parameter(("--out", "-o"), help="Where the config is written.")
    ] = None,
    plain: Annotated[bool, Parameter(help="Numbered questions on plain lines.")] = False,
    ascii_only: Ascii = False,
    assumed: Assume = None,
    host: CommandHost = HOST,
) -> int:
    """Answer the wizard's six questions here, write the config, and start it or not.

    The same questions as the wizard's, without a screen: what was answered stays above.
    """
    if host.ask_new is None:
        raise UserError(
            "No questions can be asked here.",
            "`new` needs a terminal to write to and keys to read.",
            "Write a config without questions: windtunnel recommend --model M -o config.yml",
        )
    return host.ask_new(NewRequest(out, plain, ascii_only, assumed))

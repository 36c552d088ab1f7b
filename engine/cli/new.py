"""`new`: the wizard's questions one after another, asked by whoever has a terminal."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import cyclopts
from cyclopts import Parameter

from engine.errors import UserError


@dataclass(frozen=True, slots=True)
class NewRequest:
    """How the questions are asked, and where their config goes."""

    out: Path | None = None
    plain: bool = False
    ascii_only: bool = False
    assumed: str | None = None
    """The GPUs to plan for."""


AskNew: TypeAlias = Callable[[NewRequest], int]
"""Asks, and returns the exit status."""


def register_new(app: cyclopts.App, ask: AskNew | None) -> None:
    """Add the command; `ask` is None where nobody can be asked."""

    @app.command
    def new(
        *,
        out: Annotated[
            Path | None, Parameter(("--out", "-o"), help="Where the config is written.")
        ] = None,
        plain: Annotated[bool, Parameter(help="Numbered questions on plain lines.")] = False,
        ascii_only: Annotated[bool, Parameter("--ascii", help="Draw with ASCII alone.")] = False,
        assumed: Annotated[
            str | None, Parameter("--assume", help="Plan for GPUs that are not here.")
        ] = None,
    ) -> int:
        """Answer the wizard's six questions here, write the config, and start it or not.

        The same questions as the wizard's, without a screen: what was answered stays above.
        """
        if ask is None:
            raise UserError(
                "No questions can be asked here.",
                "`new` needs a terminal to write to and keys to read.",
                "Write a config without questions: windtunnel recommend --model M -o config.yml",
            )
        return ask(NewRequest(out, plain, ascii_only, assumed))

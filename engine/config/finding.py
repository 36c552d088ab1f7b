"""What is wrong with a config, as data: one finding, and the error that carries all of them.

Reading, rules and limits all produce findings; the wizard and the commands each show them in their
own way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.errors import UserError
from engine.visible import visible


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about a config; `line` counts from 1, None when no file stands behind."""

    id: str
    severity: Literal["error", "note"]
    key: str
    line: int | None
    what: str
    why: str
    fix: str

    def sentence(self) -> str:
        """The finding in one paragraph, with its line."""
        where = "" if self.line is None else f"Line {self.line}: "
        return f"{where}{self.what} {self.why} {self.fix}"


def problem(id: str, key: str, what: str, why: str, fix: str) -> Finding:  # noqa: A002
    """An error whose line is not known yet."""
    return Finding(id, "error", key, None, what, why, fix)


def shown(value: object) -> str:
    """A value as a person may see it: as YAML spells it, one line, nothing invisible, cut short."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = visible(str(value), one_line=True)
    cut = text if len(text) <= 60 else f"{text[:57]}..."
    return f'"{cut}"' if isinstance(value, str) else cut


class ConfigError(UserError):
    """A config that cannot be used; `findings` holds every problem, in the order of the file."""

    def __init__(self, name: str, findings: Sequence[Finding]) -> None:
        self.findings = tuple(sorted(findings, key=lambda finding: finding.line or 0))
        if len(self.findings) == 1:
            only = self.findings[0]
            where = name if only.line is None else f"{name}, line {only.line}"
            super().__init__(f"{where}: {only.what}", only.why, only.fix)
            return
        super().__init__(
            f"{name} has {len(self.findings)} problems.",
            "\n".join(finding.sentence() for finding in self.findings),
            "Correct all of them, then try again.",
        )

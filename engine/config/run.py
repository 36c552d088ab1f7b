"""The whole config of one run: every key of it, none against another."""

from typing import Self

from pydantic import ValidationInfo, model_validator

from engine.config.keys import RunKeys
from engine.config.rules import broken_rules

WITHOUT_RULES = {"rules": False}
"""Validation context under which only types and ranges are checked."""


class RunConfig(RunKeys):
    """One run."""

    @model_validator(mode="after")
    def _keep_the_rules(self, info: ValidationInfo) -> Self:
        if info.context != WITHOUT_RULES:
            broken = broken_rules(self)
            if broken:
                raise ValueError("\n".join(finding.sentence() for finding in broken))
        return self

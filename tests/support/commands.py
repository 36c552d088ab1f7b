"""A command line as a test gives it, with what it prints."""

import json
from typing import Any

import pytest

from engine.child import TRAINER
from engine.cli import main
from engine.cli.terminal import Host


class Call:
    """Carries out command lines; `trainer` is the module of the process with torch."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *words: object, trainer: str = TRAINER) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        status = main([str(word) for word in words], Host(trainer=trainer))
        return status, *self._capfd.readouterr()

    def document(self, *words: object, trainer: str = TRAINER, status: int = 0) -> dict[str, Any]:
        """What `--json` prints of a command that ends with `status` and says nothing beside it."""
        ended, out, err = self(*words, "--json", trainer=trainer)
        assert (ended, err) == (status, "")
        found: dict[str, Any] = json.loads(out)
        return found

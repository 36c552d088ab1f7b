"""`windtunnel new` on a pseudo terminal, asked by the real questionary."""

import re
from pathlib import Path

from engine.config import read_config
from engine.runs import find_run, status
from tests.support.extras import needs_trainer
from tests.support.terminal import Terminal

DOWN, ENTER, ESCAPE, CONTROL_C, CONTROL_U = "\x1b[B", "\r", "\x1b", "\x03", "\x15"


def plain(text: str) -> str:
    """What was written, without its escapes."""
    return re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|[()][A-Z0-9]|[=>])", "", text)

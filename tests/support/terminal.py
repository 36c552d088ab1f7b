"""A program on a pseudo terminal."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.fakes.processes import PATIENCE_SECONDS, ROOT


class Terminal:
    """A program on a terminal of 80 columns and 24 rows, and all that it has written."""

    def __init__(
        self, *arguments: str, program: Sequence[str] = ("-m", "tui"), **environment: str
    ) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **environment},
        )
        os.close(slave)
        self.written = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.written:
            if not self._read(deadline):
                raise AssertionError(f"{text!r} is not in {self.written!r}")

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self) -> int:
        """Read to the end; the exit status."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._read(deadline):
            pass
        # Before the terminal is closed: that would end the program in another way.
        status = self.process.wait(max(1.0, deadline - time.monotonic()))
        os.close(self.master)
        return status

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            chunk = os.read(self.master, 65536)
        except OSError:  # Linux's word for: the other side of the terminal is closed
            return False
        self.written += chunk.decode("utf-8", "replace")
        return bool(chunk)

"""Time to the first frame of the wizard, against an empty Textual app, side by side.

Both are started in a terminal of 120 columns and 40 rows, in turns; the clock stops when the page's
text, or the empty app's, has arrived. CPU is what the process has used by then.
"""

import os
import pty
import select
import statistics
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
RUNS: Final = 10
AIM: Final = 1.5

EMPTY: Final = """
from textual.app import App
from textual.widgets import Static
class Empty(App):
    def compose(self):
        yield Static("first frame")
Empty().run()
"""
PROGRAMS: Final = {
    "empty": ([sys.executable, "-c", EMPTY], b"first frame"),
    "wizard": ([sys.executable, "-m", "tui"], b"Machine"),
}


def first_frame(command: list[str], text: bytes) -> tuple[float, float]:
    """Seconds of wall time and of CPU until `text` is on the terminal."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    written = b""
    try:
        while text not in written:
            if not select.select([master], [], [], 30)[0]:
                raise SystemExit(f"no first frame: {written!r}")
            written += os.read(master, 65536)
        wall = time.perf_counter() - began
        return wall, _cpu_seconds(process.pid)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def _cpu_seconds(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    user, system = int(fields[11]), int(fields[12])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print both medians and their ratio."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(RUNS):
        for name, (command, text) in PROGRAMS.items():
            times[name].append(first_frame(command, text))
    for place, unit in enumerate(("wall", "CPU")):
        empty, wizard = (
            statistics.median(pair[place] for pair in times[name]) for name in PROGRAMS
        )
        print(
            f"first frame, {unit}: empty app {empty:.2f} s, wizard {wizard:.2f} s, "
            f"{wizard / empty:.2f} times (aim: at most {AIM})"
        )


if __name__ == "__main__":
    main()

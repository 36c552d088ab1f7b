"""Ctrl-C is exit status 130 at every moment from our first import on, without a traceback."""

import signal
from pathlib import Path

import pytest

from tests.fakes.processes import run_python
from tests.support.terminal import Terminal

# Sends SIGINT at the AT-th import, opened file or started module, counted from the first import
# that one of our modules makes.
INTERRUPTER = """
import os, signal, sys
counted, begun = 0, False
def count(event, arguments):
    global counted, begun
    if event == "import" and arguments[0] == "engine.interrupt":
        begun = True
    if begun and event in ("import", "exec", "open", "marshal.loads", "os.listdir"):
        counted += 1
        if counted == int(os.environ["AT"]):
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(count)
"""
SCRIPT = "from tui.__main__ import main; main()"
"""What an installer writes for the console script."""
PROGRAMS = {"script": ["-c", SCRIPT], "tui": ["-m", "tui"], "engine": ["-m", "engine"]}
MOMENTS = (1, 2, 4, 8, 16, 50, 150, 400, 800, 1200)


@pytest.fixture
def interrupter(tmp_path: Path) -> str:
    """A folder for PYTHONPATH."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTER, "utf-8")
    return str(tmp_path)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_it_is_130_while_modules_are_imported(program: list[str], interrupter: str) -> None:
    for moment in MOMENTS:
        done = run_python(*program, "models", PYTHONPATH=interrupter, AT=str(moment))
        assert (done.returncode, done.stderr) == (130, ""), moment


@pytest.mark.parametrize("moment", [1500, 2500, 3500])
def test_it_is_130_while_the_screen_is_made_and_the_terminal_is_given_back(
    interrupter: str, moment: int
) -> None:
    terminal = Terminal(PYTHONPATH=interrupter, AT=str(moment))
    assert terminal.end() == 130
    assert "Traceback" not in terminal.written
    assert terminal.written.count("\x1b[?1049h") == terminal.written.count("\x1b[?1049l")


def test_on_the_screen_it_leaves_and_gives_the_terminal_back() -> None:
    terminal = Terminal()
    terminal.wait_for("windtunnel probe")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.written
    assert "\x1b[?1049l" in terminal.written


def test_it_is_130_after_the_work_while_python_ends() -> None:
    late = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    done = run_python("-c", SCRIPT.replace("; ", f"\n{late}"), "models")
    assert (done.returncode, done.stderr) == (130, "")
    assert "ministral-3-3b" in done.stdout or done.stdout == ""


def test_when_all_is_done_and_python_is_taken_down_the_status_stands() -> None:
    late = "import os, signal\nclass Late:\n    def __del__(self, kill=os.kill, me=os.getpid()):\n"
    late += "        kill(me, 2)\nlate = Late()\n"
    done = run_python("-c", late + SCRIPT, "models")
    assert (done.returncode, done.stderr) == (0, "")


WORK = """
import os, signal, sys, time
from engine.interrupt import interruptible
class Lost:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def lose():
    Lost()
    time.sleep(60)
def turn_into_another():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("numpy could not be imported")
def answer():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return 1
sys.exit(interruptible({work}))
"""


@pytest.mark.parametrize("work", ["lose", "turn_into_another", "answer"])
def test_whatever_a_library_makes_of_it_it_is_130(work: str) -> None:
    done = run_python("-c", WORK.replace("{work}", work))
    assert (done.returncode, done.stderr) == (130, "")


def test_a_sentence_that_follows_from_it_is_not_said() -> None:
    saying = "lambda: [answer(), print_sentence(UserError('a.', 'b.', 'c.')), 1][-1]"
    code = "from engine.cli import print_sentence\nfrom engine.errors import UserError\n"
    done = run_python("-c", code + WORK.replace("{work}", saying))
    assert (done.returncode, done.stderr) == (130, "")


def test_a_shell_that_has_it_ignored_is_obeyed(interrupter: str) -> None:
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    code += "os.execv(sys.executable, [sys.executable, '-m', 'tui', 'models'])"
    done = run_python("-c", code, PYTHONPATH=interrupter, AT="400")
    assert (done.returncode, done.stderr) == (0, "")


# A signal that another thread takes does not end a read of this one, as little as one that comes
# just before it.
ASKING = """
import signal, sys, threading, time
from tui.plain import read_line
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
try:
    read_line("> ")
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_it_is_not_lost_between_a_question_and_the_wait_for_an_answer() -> None:
    terminal = Terminal(program=("-c", ASKING))
    terminal.wait_for("> ")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130

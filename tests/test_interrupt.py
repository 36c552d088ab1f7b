"""Ctrl-C and SIGTERM are exit status 130 at every moment from our first import on, without a
traceback; a long command says what is kept and how to start again."""

import os
import shlex
import signal
from pathlib import Path

import pytest

from tests.fakes.processes import ROOT, run_python
from tests.support.terminal import Terminal

# Sends SIGNAL at the AT-th import, opened file or started module, counted from the first import
# that one of our modules makes; or, where AT is a word, as soon as something of that name is done.
INTERRUPTER = """
import os, signal, sys
at, number = os.environ.get("AT", ""), int(os.environ.get("SIGNAL", "2"))
counted, begun = 0, False
def count(event, arguments):
    global at, counted, begun
    if at and not at.isdigit() and at in f"{event} {arguments[:2]}":
        at = os.environ["AT"] = ""
        os.kill(os.getpid(), number)
    if event == "import" and arguments[0] == "engine.interrupt":
        begun = True
    if begun and event in ("import", "exec", "open", "marshal.loads", "os.listdir"):
        counted += 1
        if str(counted) == at:
            os.kill(os.getpid(), number)
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
def test_it_is_130_while_the_screen_is_made_and_restored(interrupter: str, moment: int) -> None:
    terminal = Terminal(PYTHONPATH=interrupter, AT=str(moment))
    assert terminal.end() == 130
    assert "Traceback" not in terminal.written
    assert terminal.written.count("\x1b[?1049h") == terminal.written.count("\x1b[?1049l")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_on_the_screen_it_leaves_and_gives_the_terminal_back(number: signal.Signals) -> None:
    terminal = Terminal()
    terminal.wait_for("windtunnel probe")
    terminal.process.send_signal(number)
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


READS, LEARNS = "rows are only read", "Nothing was trained or saved yet"
ROWS, TRAINER = "rows.jsonl", "'-m', 'engine.train"
KEPT = [
    (["check", ROWS, "--model", "demo-tiny"], ROWS, READS),
    (["prepare", "run.yml"], ROWS, "What is prepared so far is kept"),
    (["train", "run.yml"], ROWS, LEARNS),
    (["merge", "run", "-o", "out"], TRAINER, "Nothing was merged"),
    (["resume", "run"], TRAINER, "The run is as it was"),
]
KEPT_TOO = [
    (["train", "run.yml", "--verify-resume"], TRAINER, LEARNS),
    (["demo", "it's"], TRAINER, LEARNS),
    (["fit", "run.yml"], "run.yml", "No figure was kept"),
    (["estimate", "run.yml"], ROWS, "Nothing is written"),
    (["recommend", "--model", "demo-tiny", "--data", ROWS], ROWS, "Nothing was written"),
]


@pytest.mark.parametrize(
    ("command", "at", "kept"),
    [*KEPT, *(pytest.param(*each, marks=pytest.mark.slow) for each in KEPT_TOO)],
    ids=lambda each: str(each[0]) if isinstance(each, list) else None,
)
def test_a_long_command_says_what_is_kept(
    interrupter: str, tmp_path: Path, command: list[str], at: str, kept: str
) -> None:
    place = tmp_path / "place"
    (place / "run").mkdir(parents=True)
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    (place / "rows.jsonl").write_text(f"{row}\n", "utf-8")
    config = "base_model: demo-tiny\ndatasets: [{path: rows.jsonl}]\ndataset_prepared_path: store\n"
    for file in ("run.yml", "run/config.yml"):
        (place / file).write_text(config, "utf-8")
    (place / "run/events.jsonl").touch()
    done = run_python(
        *("-m", "engine", *command),
        cwd=place,
        PYTHONPATH=f"{interrupter}{os.pathsep}{ROOT}",
        AT=at,
        SIGNAL=str(signal.SIGTERM.value),
        WINDTUNNEL_RUNS=str(tmp_path / "runs"),
    )
    assert (done.returncode, done.stdout) == (130, "")
    interrupted, again = done.stderr.splitlines()[-2:]
    assert interrupted.startswith("Interrupted. ")
    assert kept in interrupted
    assert again == f"Start again: windtunnel {shlex.join(command)}"


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

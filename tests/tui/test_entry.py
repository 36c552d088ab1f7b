"""What a command line opens where, and what it leaves with; a run that is watched or drawn."""

import io
import signal
from pathlib import Path

import pytest
from rich.console import Console

from engine.config import read_config
from engine.errors import UserError
from engine.events import Ended, Event, Note, Recorded, Sample, Started, Step
from engine.runs import create_run
from tests.fakes.processes import run_python, running_fake
from tests.support.extras import needs_trainer
from tests.support.terminal import Terminal
from tests.support.written_runs import written_run
from tui.entry import WizardRequest, make_draft, read_request
from tui.progress import Progress

CONFIG = """\
base_model: demo-tiny
datasets:
  - path: sample:harbour-pilot
    type: chat_template
adapter: lora
lora_r: 4  # small on purpose
max_steps: 2
"""

ROWS = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yml"
    path.write_text(CONFIG, "utf-8")
    return path


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        ([], WizardRequest()),
        (["--plain", "--ascii"], WizardRequest(plain=True, ascii_only=True)),
        (["--assume", "H100 x2"], WizardRequest(assumed="H100 x2")),
        (["--assume=24 GB", "a.yaml"], WizardRequest(Path("a.yaml"), assumed="24 GB")),
        (["run.yml", "--plain"], WizardRequest(Path("run.yml"), plain=True)),
        (["train", "run.yml"], None),
        (["--help"], None),
        (["--bogus"], None),
        (["--plain", "demo"], None),
    ],
)
def test_no_command_is_for_the_wizard(arguments: list[str], request_: WizardRequest | None) -> None:
    assert read_request(arguments) == request_


@pytest.mark.parametrize("word", ["lora_r=8", "other.yml", "--bogus"])
def test_a_word_behind_a_config_names_the_command_that_takes_it(word: str) -> None:
    with pytest.raises(UserError, match="has no meaning behind a config"):
        read_request(["run.yml", word])


@pytest.mark.parametrize("arguments", [[], ["--plain", "--assume", "H100", "mine.yml"]])
def test_without_a_terminal_nothing_is_asked(arguments: list[str]) -> None:
    done = run_python("-m", "tui", *arguments)
    assert done.returncode == 2
    what, _, fix = done.stderr.splitlines()
    assert what == "No answers can be asked here."
    assert "windtunnel train config.yml" in fix
    assert done.stdout == ""


def test_unknown_flags_are_a_sentence_of_the_commands() -> None:
    done = run_python("-m", "tui", "--bogus")
    assert done.returncode == 2
    assert "--bogus" in done.stderr
    assert len(done.stderr.splitlines()) == 3


def test_help_names_the_commands_and_the_wizard() -> None:
    done = run_python("-m", "tui", "--help")
    assert done.returncode == 0
    assert "recommend" in done.stdout
    assert "--assume" in done.stdout


def test_a_dumb_terminal_gets_plain_questions_and_q_leaves() -> None:
    terminal = Terminal(TERM="dumb")
    terminal.wait_for("1 of 6  Machine")
    terminal.press("q\n")
    assert terminal.end() == 0
    assert "Left. No run was started." in terminal.written
    assert "\x1b" not in terminal.written


def test_the_end_of_the_input_leaves_with_a_sentence() -> None:
    terminal = Terminal("--plain", "--ascii", "--assume", "H100")
    terminal.wait_for("> ")
    terminal.press("\x04")
    assert terminal.end() == 0
    assert "plan for H100" in terminal.written
    assert "The answers ended (ctrl+d)." in terminal.written
    assert terminal.written.isascii()


def test_an_interrupt_is_130_and_shows_no_traceback() -> None:
    terminal = Terminal("--plain")
    terminal.wait_for("> ")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.written


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--plain", "--assume", "bogus"), "There is no GPU named bogus."),
        (("--plain", "nowhere.yml"), "nowhere.yml"),
    ],
)
def test_what_cannot_be_opened_is_a_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    terminal = Terminal(*arguments)
    assert terminal.end() == 2
    assert sentence in terminal.written
    assert "Traceback" not in terminal.written


@needs_trainer
def test_a_config_opens_with_its_own_values_at_the_review(config: Path) -> None:
    terminal = Terminal(str(config), "--plain")
    terminal.wait_for("6 of 6  Review")
    terminal.wait_for("start now")
    terminal.wait_for("name: now mine")
    terminal.press("2\n")
    terminal.wait_for("path, Enter for")
    terminal.press(f"{config.with_name('copy.yml')}\n")
    assert terminal.end() == 0
    copy = config.with_name("copy.yml").read_text("utf-8")
    assert "lora_r: 4  # small on purpose" in copy
    assert read_config(config.with_name("copy.yml")).config.max_steps == 2


@needs_trainer
def test_an_opened_config_keeps_its_comments(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)
    (config.parent / "rows.jsonl").write_text(ROWS, "utf-8")
    text = CONFIG.replace("adapter:", "  - path: rows.jsonl\nadapter:")
    config.write_text(text, "utf-8")
    terminal = Terminal(str(config), "--plain")
    terminal.wait_for("start now")
    terminal.press("b\nlora_r=8\nb\nb\n")
    terminal.wait_for("the 2 datasets of the config")
    terminal.press("\n\n\n2\n")
    terminal.wait_for("path, Enter for")
    terminal.press(f"{config}\n1\n")
    assert terminal.end() == 0
    changed = config.read_text("utf-8")
    assert "lora_r: 8  # small on purpose" in changed
    assert "lora_alpha" not in changed
    assert len(read_config(config).config.datasets) == 2


def test_the_command_line_fills_the_draft(config: Path) -> None:
    draft = make_draft(WizardRequest(config, assumed="H100"))
    assert (draft.name, draft.model, draft.config().lora_r) == ("mine", "demo-tiny", 4)
    assert draft.device is not None
    assert draft.device.planned


def test_a_terminal_gets_the_screen_and_ctrl_q_leaves_it() -> None:
    terminal = Terminal()
    terminal.wait_for("windtunnel probe")
    terminal.press("\x11")
    assert terminal.end() == 0
    assert "\x1b[?1049h" in terminal.written


def test_on_a_terminal_it_opens_the_newest_run_and_q_leaves_it_running(home: Path) -> None:
    written_run(create_run("older").path, 3, Ended("finished", 3))
    with running_fake(create_run("newer"), steps=100_000, step_seconds=0.01) as trainer:
        terminal = Terminal("watch")
        terminal.wait_for("training")
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.written.rstrip().endswith("still training: windtunnel watch newer")
        assert trainer.poll() is None


@pytest.mark.parametrize(("arguments", "environment"), [(("--plain",), {}), ((), {"TERM": "dumb"})])
def test_plain_and_a_dumb_terminal_get_lines_without_escapes(
    home: Path, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    written_run(create_run("told").path, 20, Ended("finished", 20))
    terminal = Terminal("watch", "told", *arguments, **environment)
    assert terminal.end() == 0
    assert "\x1b" not in terminal.written
    assert "step 17: held-out loss 1.130" in terminal.written
    assert "told is finished, step 20 of 99" in terminal.written


@pytest.mark.parametrize("program", ["tui", "engine"])
def test_a_pipe_gets_lines_from_the_engine_alone_too(home: Path, program: str) -> None:
    written_run(create_run("told").path, 20, Ended("finished", 20))
    done = run_python("-m", program, "watch", "told")
    assert (done.returncode, done.stderr) == (0, "")
    assert "told is finished" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [((), "There is no run to watch."), (("nobody",), "There is no run called 'nobody'.")],
)
def test_no_such_run_is_exit_status_2(
    home: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = run_python("-m", "tui", "watch", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence)
    assert len(done.stderr.strip().splitlines()) == 3


def test_ascii_writes_nothing_else(home: Path) -> None:
    with running_fake(create_run("live"), steps=100_000, step_seconds=0.01):
        terminal = Terminal("watch", "live", "--ascii")
        terminal.wait_for("smoothed")
        terminal.press("q")
        assert terminal.end() == 0
    assert terminal.written.isascii()


STARTED = Started("run", "demo-tiny", "lora", ("cpu",), 1, 2, 98304)
STEP = Step(2, 1.0, 0.5, 10, 20, 1e-3, 1.0, 0.1, 200.0, 10**9, 2)


def drawn(*events: Event, width: int = 80) -> str:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=width, force_terminal=True, color_system=None))
    for seq, event in enumerate(events):
        progress.show(Recorded(seq, 0.0, event))
    progress.close()
    return out.getvalue()


def test_the_bar_has_the_step_and_its_figures() -> None:
    text = drawn(STARTED, STEP)  # what is kept above it: tests/report/test_same_words.py
    assert "2/2" in text
    assert "loss 0.500" in text


def test_text_of_a_dataset_cannot_act_on_the_terminal() -> None:
    text = drawn(
        STARTED, Note("info", "[/] \x1b]0;title\x07 \x9b31m"), Sample(0, "q", "a", "before")
    )
    assert "[/]" in text
    for acting in ("\x1b]0", "\x07", "\x9b"):
        assert acting not in text


@needs_trainer
@pytest.mark.slow  # 12 s; what it draws is tested above, its real trainer in test_inline
def test_the_console_script_draws_on_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal(
        *("demo", str(tmp_path / "run"), "max_steps=2", "eval_steps=null"),
        *("test_datasets=[]", "eval_train_rows=0"),
    )
    assert terminal.end() == 0, terminal.written
    for text in ("2 steps", "before", "Finished at step 2"):
        assert text in terminal.written

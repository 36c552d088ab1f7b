"""The progress of a foreground run keeps what is worth keeping and lets no text act."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from engine.events import Event, Note, Phase, Recorded, Sample, Saved, Score, Started, Step
from tests.support.extras import needs_trainer
from tui.progress import Progress

STARTED = Started("run", "demo-tiny", "lora", ("cpu",), 1, 2, 98304)
STEP = Step(2, 1.0, 0.5, 10, 20, 1e-3, 1.0, 0.1, 200.0, 10**9, 2)


def drawn(*events: Event, width: int = 80) -> str:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=width, force_terminal=True, color_system=None))
    for seq, event in enumerate(events):
        progress.show(Recorded(seq, 0.0, event))
    progress.close()
    return out.getvalue()


def test_what_is_worth_keeping_stays_above_the_bar() -> None:
    text = drawn(
        Phase("import"),
        STARTED,
        STEP,
        Score(2, "heldout_wording", 0.4, 0.5, 52),
        Saved(2, "checkpoints/step-2"),
    )
    assert "starting PyTorch" in text
    assert "training demo-tiny (lora) on cpu: 2 steps, 98,304 trained parameters" in text
    assert "2/2" in text
    assert "loss 0.500" in text
    assert "step 2: heldout_wording, loss 0.400, 50% of 52 answers word for word" in text
    assert "step 2: saved checkpoints/step-2" in text


def test_text_of_a_dataset_cannot_act_on_the_terminal() -> None:
    text = drawn(
        STARTED, Note("info", "[/] \x1b]0;title\x07 \x9b31m"), Sample(0, "q", "a", "before")
    )
    assert "[/]" in text
    assert "\x1b]0" not in text
    assert "\x07" not in text
    assert "\x9b" not in text


@needs_trainer
def test_the_console_script_draws_on_a_terminal(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    arguments = ["demo", str(tmp_path / "run"), "max_steps=2", "eval_steps=null"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tui", *arguments, "test_datasets=[]", "eval_train_rows=0"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
    )
    os.close(slave)
    text = b""
    try:
        while chunk := os.read(master, 4096):
            text += chunk
    except OSError:  # Linux's word for: the other side of the terminal is closed
        pass
    os.close(master)
    assert process.wait() == 0, text
    assert b"2 steps" in text
    assert b"before" in text
    assert b"Finished at step 2" in text

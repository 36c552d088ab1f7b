"""Starting the trainer: what it inherits, what it survives, and how an early death is reported."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.config import read_config
from engine.errors import UserError, WorkError
from engine.events import Phase, Started, Step
from engine.launch import (
    ALONE,
    Nodes,
    change_config,
    find_nodes,
    forwarded_signals,
    launch,
    resume_run,
)
from engine.runs import Follower, RunFolder, ask, create_run, is_locked, send, status
from tests.fakes.engine import loss_at
from tests.fakes.processes import ROOT, fake_environment, processes_of, running_fake, wait_until
from tests.support.written_runs import read_steps

pytestmark = pytest.mark.usefixtures("home")

FAKE = "tests.fakes.engine"


def start(run: RunFolder, *, detach: bool = True, **fake: object) -> "subprocess.Popen[bytes]":
    return launch(run, detach=detach, module=FAKE, environment=fake_environment(**fake))


def end(run: RunFolder) -> None:
    if is_locked(run):
        send(run, "stop")
        wait_until(lambda: not is_locked(run))


def environment_of(process: "subprocess.Popen[bytes]") -> dict[str, str]:
    text = Path(f"/proc/{process.pid}/environ").read_bytes().decode()
    return dict(pair.split("=", 1) for pair in text.split("\0") if pair)


def launcher(run: RunFolder, before: str, after: str = "time.sleep(60)") -> list[str]:
    """A program that launches the run detached, as a wizard in a terminal of its own would."""
    code = (
        "import time, fcntl, termios; from pathlib import Path; from engine.launch import launch; "
        f"from engine.runs import RunFolder; {before}; "
        f"launch(RunFolder(Path({str(run.path)!r})), detach=True, module={FAKE!r}); {after}"
    )
    return [sys.executable, "-c", code]


def test_launch_returns_when_the_trainer_holds_the_lock(run: RunFolder) -> None:
    process = start(run)
    assert is_locked(run)
    assert status(run) == "running"
    process.kill()
    process.wait()


def test_the_run_folder_gets_its_config_and_its_plan(run: RunFolder) -> None:
    launch(
        run,
        detach=True,
        config="base_model: demo-tiny  # why\n",
        plan={"parts": {"weights": 3}},
        module=FAKE,
        environment=fake_environment(steps=1),
    ).wait(60)
    assert run.config.read_text() == "base_model: demo-tiny  # why\n"
    assert '"weights": 3' in run.plan.read_text()
    assert not list(run.path.glob(".*")), "nothing half written stays behind"


def test_a_config_that_is_replaced_is_kept_beside(run: RunFolder) -> None:
    for number, text in enumerate(["a: 1\n", "a: 2\n", "a: 2\n", "a: 3\n"]):
        launch(
            run, detach=True, config=text, module=FAKE, environment=fake_environment(steps=number)
        ).wait(60)
    kept = {path.name: path.read_text() for path in run.path.glob("config*")}
    assert kept == {"config.yml": "a: 3\n", "config-1.yml": "a: 1\n", "config-2.yml": "a: 2\n"}


def test_a_detached_trainer_is_quiet(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_OWN", "stays")
    process = launch(
        run, detach=True, module=FAKE, environment={"CUDA_VISIBLE_DEVICES": "GPU-1234"}
    )
    try:
        environment = environment_of(process)
        expected = {
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "TERM": "dumb",
            "NO_COLOR": "1",
            "CUDA_VISIBLE_DEVICES": "GPU-1234",
            "MY_OWN": "stays",
        }
        assert environment | expected == environment
        files = {number: os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)}
        assert files == {0: "/dev/null", 1: str(run.log), 2: str(run.log)}
        assert os.getsid(process.pid) == process.pid
    finally:
        process.kill()
        process.wait()


def test_a_folder_called_engine_where_one_stands_is_not_run(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("engine", "tests"):
        (tmp_path / "cwd" / name).mkdir(parents=True)
        (tmp_path / "cwd" / name / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path / "cwd")
    process = start(run, steps=2)
    assert process.wait(60) == 0
    assert "not this one" not in run.log.read_text()


def test_a_detached_run_survives_the_kill_of_everything_that_started_it(run: RunFolder) -> None:
    wizard = subprocess.Popen(launcher(run, "pass"), cwd=ROOT, start_new_session=True)
    wait_until(lambda: len(read_steps(run)) > 2)
    os.killpg(wizard.pid, signal.SIGKILL)
    wizard.wait()
    before = len(read_steps(run))
    wait_until(lambda: len(read_steps(run)) > before + 5)
    assert ask(run, "pause", timeout_seconds=60).outcome == "done", "and it is attached again"
    assert status(run) == "paused"
    end(run)
    assert status(run) == "stopped"


def test_a_detached_run_survives_its_terminal(run: RunFolder) -> None:
    ours, theirs = pty.openpty()
    wizard = subprocess.Popen(
        launcher(run, "fcntl.ioctl(0, termios.TIOCSCTTY, 0)"),
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    wait_until(lambda: len(read_steps(run)) > 2)
    os.close(ours)  # the window is closed
    assert wizard.wait(60) == -signal.SIGHUP
    before = len(read_steps(run))
    wait_until(lambda: len(read_steps(run)) > before + 5)
    end(run)


def test_a_foreground_trainer_dies_with_its_group(run: RunFolder) -> None:
    code = launcher(run, "pass")[-1].replace("detach=True", "detach=False")
    command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    wait_until(lambda: is_locked(run))
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    wait_until(lambda: not is_locked(run))
    assert status(run) == "lost"


def test_a_second_launch_on_the_same_folder_is_refused(run: RunFolder) -> None:
    process = start(run)
    with pytest.raises(UserError, match="already running") as caught:
        launch(run, detach=True, config="another: config\n", module=FAKE)
    assert caught.value.exit_status == 2
    assert not run.config.exists(), "what the first one trains on is not touched"
    assert process.poll() is None
    end(run)


def test_of_two_launches_at_the_same_moment_one_hears_that_it_lost(run: RunFolder) -> None:
    messages: list[str] = []
    processes: list[subprocess.Popen[bytes]] = []

    def try_it() -> None:
        try:
            processes.append(start(run))
        except UserError as error:
            messages.append(str(error))

    threads = [threading.Thread(target=try_it) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(processes) == 1
    assert len(messages) == 2
    assert all("already running" in each for each in messages)
    end(run)


def test_an_early_death_is_reported_with_its_last_lines(run: RunFolder) -> None:
    trace = "Traceback (most recent call last):\n  File 'x'\n    boom()\nValueError: \x1b[31mbad"
    with pytest.raises(WorkError) as caught:
        start(run, last_words=trace)
    assert caught.value.what == "The trainer ended before it began (exit status 1)."
    assert caught.value.why == "Its last words: ValueError: ␛[31mbad"
    assert str(run.log) in caught.value.fix
    assert caught.value.exit_status == 1
    assert status(run) == "waiting"


def test_the_trainers_own_refusal_keeps_its_exit_status(run: RunFolder) -> None:
    with pytest.raises(UserError) as caught:
        start(run, last_words="It does not fit.\nToo big.\nUse less.", exit_status=3)
    assert caught.value.exit_status == 3
    assert caught.value.why == "Its last words: It does not fit. / Too big. / Use less."


def test_a_death_without_a_line_is_reported_too(run: RunFolder) -> None:
    run.log.write_text("words of an earlier launch\n")
    with pytest.raises(WorkError, match="printed nothing"):
        start(run, last_words=" ")


def test_a_trainer_that_never_begins_is_ended(run: RunFolder) -> None:
    begun = time.monotonic()
    silent = fake_environment(silent=1)
    with pytest.raises(WorkError, match="has not begun for 1 seconds"):
        launch(run, detach=True, module=FAKE, environment=silent, timeout_seconds=1)
    assert time.monotonic() - begun < 10
    assert not processes_of(run.path)


def test_a_folder_that_cannot_be_filled_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match="could not be started"):
        start(RunFolder(tmp_path / "file" / "run"))


def test_a_dead_run_goes_on_from_its_last_checkpoint(run: RunFolder) -> None:
    process = start(run)
    wait_until(lambda: len(read_steps(run)) >= 5)
    ask(run, "save", timeout_seconds=60)
    wait_until(lambda: len(read_steps(run)) >= 12)
    process.kill()
    process.wait()
    saved = int((run.checkpoints / "LATEST").read_text().removeprefix("step-"))
    follower = Follower(run.events, from_end=True)
    resumed = resume_run(run, module=FAKE, environment=fake_environment(steps=saved + 10))
    assert resumed.process is not None
    assert resumed.process.wait(60) == 0
    events = follower.read()
    assert [type(each.event) for each in events[:3]] == [Phase, Started, Step]
    assert isinstance(events[2].event, Step)
    assert events[2].event.step == saved + 1
    steps = read_steps(run)
    assert [step.step for step in steps] == list(range(1, saved + 11))
    assert [step.loss for step in steps] == [loss_at(step.step) for step in steps]
    assert status(run) == "finished"


def test_a_run_can_go_back_to_an_earlier_checkpoint(run: RunFolder) -> None:
    start(run, steps=9).wait(60)
    for step in (2, 4, 10):
        (run.checkpoints / f"step-{step}").mkdir()
    with pytest.raises(UserError, match="has finished"):
        resume_run(run, module=FAKE)
    for name in ("step-3", "../step-2", "step-2.partial", "\x1b"):
        with pytest.raises(UserError) as caught:
            resume_run(run, module=FAKE, checkpoint=name)
        assert caught.value.why == "It has step-2, step-4, step-9, step-10."
        assert "\x1b" not in str(caught.value)
    six = fake_environment(steps=6)
    resumed = resume_run(run, module=FAKE, checkpoint="step-4", environment=six)
    assert resumed.process is not None
    assert resumed.process.wait(60) == 0
    assert [step.step for step in read_steps(run)] == [1, 2, 3, 4, 5, 6]


def test_a_paused_run_is_only_asked_to_go_on(run: RunFolder) -> None:
    process = start(run)
    ask(run, "pause", timeout_seconds=60)
    with pytest.raises(UserError, match="is paused"):
        resume_run(run, checkpoint="step-1", module=FAKE)
    resumed = resume_run(run, module=FAKE)
    assert resumed.ack is not None
    assert resumed.ack.outcome == "done"
    assert process.poll() is None
    with pytest.raises(UserError, match="is running"):
        resume_run(run, module=FAKE)
    end(run)


def test_a_run_that_was_never_started_begins(run: RunFolder) -> None:
    resumed = resume_run(run, module=FAKE, environment=fake_environment(steps=2))
    assert resumed.process is not None
    assert resumed.process.wait(60) == 0
    assert isinstance(resumed.process.args, list)
    assert "--resume" not in resumed.process.args


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_foreground_signal_reaches_the_trainer(run: RunFolder, sent: signal.Signals) -> None:
    process = start(run, detach=False)
    before = signal.getsignal(sent)
    with forwarded_signals(run, process) as received:
        wait_until(lambda: len(read_steps(run)) > 1)
        os.kill(os.getpid(), sent)
        assert process.wait(60) == 0
    assert received == [sent.name]
    assert status(run) == "stopped"
    assert signal.getsignal(sent) == before


def test_a_full_disk_does_not_end_a_training(run: RunFolder) -> None:
    """Where a small file system can be mounted it is really full, else files may not grow."""
    disk = run.path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        full = create_run("full", output_dir=disk / "run")
        limit = {} if mounted else {"file_size": 30_000}
        with running_fake(full, step_seconds=0.002, **limit) as process:
            wait_until(lambda: _is_full(full))
            time.sleep(0.3)
            assert process.poll() is None
            assert len(read_steps(full)) > 50
            assert status(full) == "running"
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def _is_full(run: RunFolder) -> bool:
    before = run.events.stat().st_size if run.events.exists() else 0
    time.sleep(0.1)
    return before > 10_000 and run.events.stat().st_size == before


@pytest.mark.parametrize(
    ("changes", "ranks", "sums"),
    [
        (["dp_shard_size=1"], 1, 4),
        (["dp_shard_size=4"], 4, 1),
        (["dp_shard_size=1", "dp_replicate_size=4"], 1, 1),
        (["dp_shard_size=1", "micro_batch_size=4"], 1, 2),
        (["dp_shard_size=1", "gradient_accumulation_steps=1"], 1, 1),
        (["auto_fit=true"], 2, 2),
    ],
)
def test_another_number_of_ranks_learns_the_same_rows_in_each_step(
    run: RunFolder, changes: list[str], ranks: int, sums: int
) -> None:
    run.config.write_text("base_model: x\ndp_shard_size: 2\ngradient_accumulation_steps: 2\n")
    change_config(run, changes)
    config = read_config(run.config).config
    assert (config.dp_shard_size, config.gradient_accumulation_steps) == (ranks, sums)


def test_ranks_that_cannot_share_a_step_are_refused(run: RunFolder) -> None:
    text = "base_model: x\ndp_shard_size: 2\ngradient_accumulation_steps: 2\n"
    run.config.write_text(text)
    with pytest.raises(UserError, match="3 ranks cannot share the 4 micro-batches") as refused:
        change_config(run, ["dp_shard_size=3"])
    assert "divides 4" in refused.value.fix
    assert run.config.read_text() == text


def test_computers_of_a_run_need_a_place_to_meet() -> None:
    assert find_nodes(1, "") is ALONE
    assert find_nodes(2, "first:29500") == Nodes(2, "first:29500")


@pytest.mark.parametrize(
    ("count", "rendezvous", "verify", "what"),
    [
        (1, "first:29500", False, "--nodes is 1."),
        (0, "", False, "--nodes is 0."),
        (2, "", False, "--rendezvous is empty."),
        (2, "first", False, "--rendezvous is first."),
        (2, ":29500", False, "--rendezvous is :29500."),
        (2, "first:port", False, "--rendezvous is first:port."),
        (2, "first:29500", True, "--verify-resume is for one computer, and --nodes is 2."),
    ],
)
def test_computers_that_could_not_meet_are_refused(
    count: int, rendezvous: str, verify: bool, what: str
) -> None:
    with pytest.raises(UserError) as refused:
        find_nodes(count, rendezvous, verify=verify)
    assert refused.value.what == what

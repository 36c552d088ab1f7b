"""Slurm on one computer: sbatch, srun, scontrol, squeue and scancel as small programs.

`install` writes them into a folder of the PATH. A job is a real bash in a session of its own under
a controller that outlives sbatch; its nodes are processes here. Jobs are files in $FAKE_SLURM.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.fakes.processes import PATIENCE_SECONDS, ROOT, wait_until

COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel")
_POLL_SECONDS = 0.02
_KILL_SECONDS = 2.0


def install(folder: Path) -> None:
    """Make the commands in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMMANDS:
        write_program(folder / name, "-m", "tests.fakes.slurm", name)


def write_program(path: Path, *words: str) -> None:
    """A command that is this Python with `words` before its own."""
    line = shlex.join([sys.executable, *words])
    path.write_text(f'#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(ROOT))}\nexec {line} "$@"\n')
    path.chmod(0o755)


def job_file(number: str) -> Path:
    return Path(os.environ["FAKE_SLURM"]) / f"{number}.json"


def read_job(number: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(job_file(number).read_text("utf-8"))
    return found


def write_job(number: str, **values: object) -> None:
    path = job_file(number)
    known = read_job(number) if path.exists() else {}
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(known | values), "utf-8")
    beside.replace(path)


def options_of(script: str) -> dict[str, str]:
    """What the lines of #SBATCH ask for, by name."""
    lines = [line[8:] for line in script.splitlines() if line.startswith("#SBATCH ")]
    words = [word.removeprefix("--") for line in lines for word in shlex.split(line)]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def sbatch(*words: str) -> int:
    script = Path(words[-1])
    options = options_of(script.read_text("utf-8"))
    if "nodes" not in options or "output" not in options:
        print("sbatch: error: Batch job submission failed", file=sys.stderr)
        return 1
    number = str(100 + len(list(job_file("0").parent.glob("*.json"))))
    log = options["output"].replace("%%", "%").replace("%j", number)
    write_job(number, state="PENDING", script=str(script), log=log, nodes=options["nodes"])
    controller = [sys.executable, "-m", "tests.fakes.slurm", "control", number]
    with open(os.devnull, "r+b") as nothing:
        subprocess.Popen(
            controller, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
        )
    print(number)
    return 0


def control(number: str) -> int:
    """Run a job to its end, from the top whenever it is queued again."""
    restarts = 0
    while True:
        job = read_job(number)
        added = {"SLURM_JOB_ID": number, "SLURM_NNODES": job["nodes"]}
        added |= {"SLURM_JOB_NODELIST": "all", "SLURM_RESTART_COUNT": str(restarts)}
        with open(job["log"], "ab") as log:
            batch = subprocess.Popen(
                ["bash", job["script"]],
                env={**os.environ, **added},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        write_job(number, state="RUNNING", pid=batch.pid, restarts=restarts, requeue=False)
        while batch.poll() is None and not read_job(number)["requeue"]:
            time.sleep(_POLL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(batch.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            batch.wait(_KILL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(batch.pid, signal.SIGKILL)
        status = batch.wait()
        if not read_job(number)["requeue"]:
            write_job(number, state="FAILED" if status else "COMPLETED", status=status)
            return 0
        restarts += 1


def srun(*words: str) -> int:
    """One task a node; signals go to all of them, and the worst end is ours."""
    command = list(words)
    while command[0].startswith("-"):
        command.pop(0)
    tasks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        for task in tasks:
            task.send_signal(number)

    for each in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(each, forward)
    for node in range(int(os.environ["SLURM_NNODES"])):
        environment = {**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}
        tasks.append(subprocess.Popen(command, env=environment))
    return max(abs(task.wait()) for task in tasks)


def scontrol(*words: str) -> int:
    if words[0] == "show":
        with contextlib.suppress(BrokenPipeError):  # who wants the first line leaves after it
            os.write(1, b"localhost\n" * int(os.environ["SLURM_NNODES"]))
        return 0
    write_job(words[-1], requeue=True)
    return 0


def squeue(*words: str) -> int:
    print(f"JOBID STATE\n{words[-1]} {read_job(words[-1])['state']}")
    return 0


def scancel(*words: str) -> int:
    """`--signal=USR1 --batch JOB`: a signal to the script alone, as before a job's limit."""
    name = next(word for word in words if word.startswith("--signal=")).partition("=")[2]
    os.kill(read_job(words[-1])["pid"], signal.Signals[f"SIG{name}"])
    return 0


def wait_for_end(number: str) -> dict[str, Any]:
    """The job when it is over."""
    over = ("COMPLETED", "FAILED")
    wait_until(lambda: read_job(number)["state"] in over, PATIENCE_SECONDS)
    return read_job(number)


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))

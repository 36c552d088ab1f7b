"""A job for Slurm: what its script says, and that a run lives through limits until it has ended."""

import json
from pathlib import Path

import pytest

from engine.child import TRAINER
from engine.cluster.job import seconds_of
from engine.runs import RunFolder, status
from tests.fakes import slurm
from tests.fakes.processes import PATIENCE_SECONDS, processes_of, wait_until
from tests.support.commands import Call
from tests.support.shell import check_script
from tests.support.written_runs import read_steps

FAKE = "tests.fakes.engine"
ROW = {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]}
SHARDED = ("fsdp_version=2", "fsdp_config={}", "optimizer=adamw_torch_8bit")
WINDTUNNEL = (
    "import sys; from engine.cli import main; from engine.cli.terminal import Host;"
    " sys.exit(main(sys.argv[1:], Host(trainer={!r})))"
)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that all nodes see, with blanks and a quote in its name: a config and its rows."""
    folder = tmp_path / "Marie's 100% shared disk"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(4 * (json.dumps(ROW) + "\n"), "utf-8")
    keys = {"base_model": "demo-tiny", "datasets": [{"path": "rows.jsonl"}], "adapter": "lora"}
    (folder / "my run.yml").write_text(json.dumps(keys), "utf-8")
    (tmp_path / "nodes" / "bin").mkdir(parents=True)
    slurm.write_program(tmp_path / "nodes" / "bin" / "windtunnel", "-c", WINDTUNNEL.format(FAKE))
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands on the PATH; their jobs are in the folder that is given."""
    slurm.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{tmp_path / 'slurm'}:{Path('/usr/bin')}:{Path('/bin')}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm"))
    return tmp_path / "slurm"


def meeting_of(process: int) -> str:
    """What the nodes of a rank's run call their meeting."""
    pairs = Path(f"/proc/{process}/environ").read_text("utf-8").split("\0")
    return dict(pair.partition("=")[::2] for pair in pairs).get("TORCHELASTIC_RUN_ID", "")


@pytest.mark.parametrize(
    ("trainer", "layout"),
    [
        pytest.param(FAKE, "", id="fake"),
        pytest.param(FAKE, "dp_shard_size=2 --nodes 2", id="two nodes", marks=pytest.mark.slow),
        pytest.param(TRAINER, "", id="real", marks=pytest.mark.slow),
        pytest.param(TRAINER, "dp_shard_size=2", id="two real ranks", marks=pytest.mark.slow),
    ],
)
def test_a_job_is_sent_warned_queued_again_and_finishes(
    trainer: str,
    layout: str,
    call: Call,
    shared: Path,
    cluster: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slurm.write_program(tmp_path / "nodes/bin/windtunnel", "-c", WINDTUNNEL.format(trainer))
    monkeypatch.setenv("FAKE_STEPS", "40")
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.05")
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
    script = shared / "my run.sbatch"
    quick = ("max_steps=40", "save_steps=100", "eval_table_size=0", "eval_drift=false")
    settings = (*quick, "--environment", tmp_path / "nodes")
    words = (shared / "my run.yml", *settings, *layout.split(), "--to", "slurm", "-o", script)
    code, out, err = call("export", *words, "--submit", trainer=trainer)
    assert (code, err) == (0, "")
    (number,) = [line.split()[3].rstrip(".") for line in out.splitlines() if "Sent as" in line]
    run = RunFolder(shared / "runs" / "my-run")
    wait_until(lambda: run.events.exists() and len(read_steps(run)) > 1, PATIENCE_SECONDS)
    meetings = [meeting_of(process) for process in processes_of(run.path)]
    assert "--nodes" not in layout or f"my-run-{number}-0" in meetings
    slurm.scancel("--signal=USR1", "--batch", number)
    job = slurm.wait_for_end(number)
    log = Path(job["log"]).read_text("utf-8")
    assert (job["state"], job["restarts"], status(run)) == ("COMPLETED", 1, "finished"), log
    assert [step.step for step in read_steps(run)] == list(range(1, 41))
    assert log.count("Finished at step 40") == 1
    assert (log.count("the time limit is near"), log.count("HF_TOKEN is set")) == (1, 2)
    assert "not_to_be_seen" not in log + script.read_text("utf-8")


def cached(cache: Path, repository: str, *names: str) -> Path:
    """A repository in the hub's cache, each of its files empty but the index."""
    folder = cache / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40, "utf-8")
    for name in names:
        (snapshot / name).write_text("{}", "utf-8")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return snapshot


def test_a_job_of_many_nodes_is_a_script_without_a_fault(call: Call, shared: Path) -> None:
    script, cache = shared / "many.sbatch", shared / "it's a cache"
    words = ["--time", "0:30:00", "--partition", "gpu-large", "--account", "lab@site"]
    words += ["--cache", str(cache), "dp_shard_size=64", *SHARDED]
    made = call.document("export", shared / "my run.yml", *words, "--to", "slurm", "-o", script)
    assert made["files"] == [str(script)]
    assert (made["allocation"]["nodes"], made["allocation"]["gpus_per_node"]) == (8, 8)
    check_script(script)


def test_its_lines_ask_slurm_for_what_the_config_needs(call: Call, shared: Path) -> None:
    script = shared / "many.sbatch"
    words = ["--time", "0:30:00", "--partition", "gpu-large", "dp_shard_size=16", *SHARDED]
    assert call("export", shared / "my run.yml", *words, "--to", "slurm", "-o", script)[0] == 0
    text = script.read_text("utf-8")
    assert slurm.options_of(text) == {
        "job-name": "many",
        "partition": "gpu-large",
        "time": "0:30:00",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "exclusive": "",
        "mem": "0",
        "signal": "B:USR1@600",
        "requeue": "",
        "open-mode": "append",
        "output": f"{shared}/many-%j.log".replace("100%", "100%%"),
        "export": "ALL",
    }
    assert '--nodes "$SLURM_NNODES" --rendezvous "$host:$port"' in text
    assert "dp_shard_size=16 fsdp_version=2" in text


def test_a_config_that_says_nothing_of_gpus_has_a_copy_on_each(call: Call, shared: Path) -> None:
    script = shared / "job.sbatch"
    words = ("--nodes", "2", "--gpus-per-node", "4", "--to", "slurm", "-o", script)
    assert call("export", shared / "my run.yml", *words)[0] == 0
    options = slurm.options_of(script.read_text("utf-8"))
    assert (options["nodes"], options["gpus-per-node"]) == ("2", "4")
    assert " dp_replicate_size=8 " in script.read_text("utf-8")


REFUSED = [
    (
        "dp_shard_size=6 --gpus-per-node 4",
        ["1 node of 4 GPUs is 4 ranks", "--nodes 1 --gpus-per-node 6"],
    ),
    ("dp_shard_size=24 --nodes 5", ["--nodes 3 --gpus-per-node 8"]),
    ("dp_shard_size=1 --nodes 3", ["3 nodes of 1 GPU are 3 ranks", "--nodes 1"]),
    ("dp_shard_size=8 --nodes 0", ["--nodes 1 --gpus-per-node 8"]),
    ("", ["does not say over how many GPUs", "dp_shard_size=8"]),
    ("dp_shard_size=8 --time soon", ["--time is 'soon'", "24:00:00"]),
    ("dp_shard_size=8 --partition gpu;reboot", ["--partition", "letters, digits"]),
    ("dp_shard_size=8 -o {config}", ["is the config itself"]),
    ('dp_shard_size=8 -o {folder}/a"b.sbatch --cache {folder}/a"b', ["Rename it."]),
    ("dp_shard_size=8 --submit", ["There is no sbatch here.", "login node"]),
    ("dp_shard_size=8 --environment /nowhere --submit", ["has no bin/windtunnel"]),
    ("dp_shard_size=8 datasets[0].path=gone.jsonl", ["There is no gone.jsonl."]),
    (
        "dp_shard_size=8 datasets[0].path=you/rows --submit",
        ["are on the hub", "hf download you/rows --repo-type dataset --local-dir FOLDER"],
    ),
    (
        "dp_shard_size=8 base_model=ministral-3-3b --submit",
        ["is not in the shared cache", "HF_HOME=", "hf download mistralai/Ministral-3-3B"],
    ),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[words for words, _ in REFUSED])
def test_a_job_that_could_not_run_is_refused_with_what_to_do(
    words: str, said: list[str], call: Call, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    config = shared / "my run.yml"
    given = [word.format(config=config, folder=shared) for word in words.split()]
    if "--environment" not in given:
        given += ["--environment", str(shared.parent / "nodes")]
    if "-o" not in given:
        given += ["-o", str(shared / "job.sbatch")]
    before = config.read_bytes()
    code, out, err = call("export", config, *SHARDED, *given, "--to", "slurm")
    assert (code, out) == (2, "")
    assert all(each in err for each in said), err
    assert config.read_bytes() == before


def test_a_model_is_there_when_the_last_of_its_files_is(call: Call, shared: Path) -> None:
    cache, script = shared / "cache", shared / "job.sbatch"
    config = (shared / "my run.yml", "base_model=ministral-3-3b", "--cache", cache)
    words = (
        "export",
        *config,
        "--environment",
        shared.parent / "nodes",
        "--to",
        "slurm",
        "-o",
        script,
    )
    names = ("config.json", "tekken.json", "model-1.safetensors")
    snapshot = cached(cache, "mistralai/Ministral-3-3B-Instruct-2512-BF16", *names)
    assert len(call.document(*words)["missing"]) == 1
    (snapshot / "model-2.safetensors").touch()
    assert call.document(*words)["missing"] == []


def test_what_slurm_refuses_is_said(call: Call, shared: Path, cluster: Path) -> None:
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'Invalid account' >&2; exit 1\n", "utf-8")
    words = ("export", shared / "my run.yml", "--to", "slurm", "-o", shared / "job.sbatch")
    code, out, err = call(*words, "--submit", "--environment", shared.parent / "nodes")
    assert (code, out) == (1, "")
    assert "Invalid account" in err


@pytest.mark.parametrize(
    ("limit", "seconds", "grace"),
    [
        ("90", 5400, 600),
        ("30:30", 1830, 600),
        ("24:00:00", 86400, 600),
        ("1-12", 129600, 600),
        ("2-00:30", 174600, 600),
        ("0-00:05:00", 300, 100),
    ],
)
def test_a_limit_as_slurm_reads(
    limit: str, seconds: int, grace: int, call: Call, shared: Path
) -> None:
    assert seconds_of(limit) == seconds
    script = shared / "job.sbatch"
    words = ("export", shared / "my run.yml", "--to", "slurm", "-o", script, "--time", limit)
    assert call(*words)[0] == 0
    assert slurm.options_of(script.read_text("utf-8"))["signal"] == f"B:USR1@{grace}"


def test_a_job_that_saves_nothing_is_not_queued_again(
    call: Call, shared: Path, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = tmp_path / "nodes" / "bin" / "windtunnel"
    waits.write_text("#!/bin/bash\ntrap 'exit 130' USR1\necho loading\nsleep 60 & wait\n")
    words = ("--environment", tmp_path / "nodes", "--to", "slurm", "-o", shared / "job.sbatch")
    sent = call.document("export", shared / "my run.yml", *words, "--submit")
    log = shared / f"job-{sent['job']}.log"
    wait_until(lambda: log.exists() and "loading" in log.read_text("utf-8"))
    slurm.scancel("--signal=USR1", "--batch", sent["job"])
    job = slurm.wait_for_end(sent["job"])
    assert (job["state"], job["status"], job["restarts"]) == ("FAILED", 130, 0)
    assert "nothing was saved since this job started" in log.read_text("utf-8")

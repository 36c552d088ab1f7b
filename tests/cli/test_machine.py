"""`probe`, `doctor` and `models` as a person and as a program run them, over the fake driver."""

import os

import pytest

from engine.catalog import model_names
from engine.cli.machine import command_lines
from engine.hardware import missing_packages, read_machine
from tests.fakes.nvml import H100, RTX_4090, FakeDriver
from tests.fakes.packages import install_torch
from tests.fakes.processes import ROOT, run_python
from tests.support.commands import Call
from tests.support.extras import needs_trainer

CONTRACT = {
    *("uuid", "index", "name", "memory_total_bytes", "memory_free_bytes", "compute_capability")
}
HEAVY = {"torch", "transformers", "peft", "datasets", "mistral_common", "numpy", "pyarrow"}


@pytest.fixture
def torch_for_cuda(tmp_path, monkeypatch):
    """A torch that the fake driver's cards can use."""
    folder = tmp_path / "site-packages"
    install_torch(folder, "2.13.0", cuda="'13.0'")
    monkeypatch.syspath_prepend(folder)
    return folder


def said(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


def test_probe_prints_what_the_contract_promises(nvml: FakeDriver, call: Call, tmp_path) -> None:
    nvml.set(RTX_4090, f"{H100} procs={os.getpid()}:1048576")
    printed = call.document("probe")
    assert printed.keys() >= {"gpus", "host", "stack", "missing", "problems"}
    card = printed["gpus"][1]
    assert card.keys() >= CONTRACT
    assert (card["uuid"], card["index"], card["compute_capability"]) == ("GPU-aaaa-1", 1, "9.0")
    assert card["memory_total_bytes"] == 85520809984
    assert card["processes"][0]["pid"] == os.getpid()
    host = printed["host"]
    assert (host["driver_version"], host["cuda_version"]) == ("580.95.05", "13.0")
    assert host["disk_path"] == str(tmp_path / "home")
    assert all(host[f"{each}_bytes"] > 0 for each in ("ram_total", "ram_available", "disk_free"))
    assert "torch" in printed["stack"]


def test_probe_says_first_what_can_be_used(nvml: FakeDriver, call: Call, torch_for_cuda) -> None:
    nvml.set(RTX_4090, f"{H100} procs={os.getpid()}:1073741824")
    status, out, _ = call("probe")
    assert status == 0
    assert out.startswith("✓ ready: 2 GPUs, 101.2 of 103.6 GiB free\n")
    assert "  1  H100 80GB HBM3  ready\n     78.2 of 79.6 GiB free, Hopper 9.0, " in out
    assert "55 °C, 310 of 700 W\n     GPU-aaaa-1\n     used by " in out
    assert "1.0 GiB" in out
    assert max(map(len, out.splitlines())) <= 80


def test_probe_without_a_gpu_has_done_its_work(nvml: FakeDriver, call: Call) -> None:
    nvml.set("init 12")
    status, out, _ = call("probe")
    assert status == 0
    assert out.startswith("· no GPU: ")
    assert "! warning: No NVIDIA driver was found." in said(out)
    printed = call.document("probe")
    assert printed["gpus"] == []
    assert printed["host"]["driver_version"] is None
    (problem,) = printed["problems"]
    assert problem.keys() >= {"id", "severity", "what", "why", "fix"}
    assert problem["id"] == "no_driver"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("init 18",), "error: The running NVIDIA module and its library are of different"),
        (("init 9",), "error: The NVIDIA driver is installed and not loaded."),
        (("err nvmlDeviceGetComputeRunningProcesses_v3 4", H100), "refuses to tell processes"),
        (("err nvmlDeviceGetHandleByIndex_v2 15 0", H100), "lost: the driver no longer reaches"),
        (
            ("gpu name=NVIDIA_GB10 uuid=GPU-c total=0 cc=12.1",),
            "GiB free, shared with the computer",
        ),
    ],
)
def test_probe_puts_trouble_into_a_sentence(nvml: FakeDriver, call: Call, lines, words) -> None:
    nvml.set(*lines)
    status, out, _ = call("probe")
    assert status == 0
    assert words in said(out)
    assert max(map(len, out.splitlines())) <= 80


def test_probe_shows_hidden_cards(
    nvml: FakeDriver, call: Call, monkeypatch, torch_for_cuda
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
    nvml.set(RTX_4090, H100)
    _, out, _ = call("probe")
    assert out.startswith("✓ ready: RTX 4090, ")
    assert "  1  H100 80GB HBM3  hidden by CUDA_VISIBLE_DEVICES=GPU-b\n" in out
    assert "! warning: GPU 1 is hidden by CUDA_VISIBLE_DEVICES=GPU-b." in said(out)


def test_probe_makes_strange_names_harmless(nvml: FakeDriver, call: Call) -> None:
    nvml.set(H100.replace("HBM3", "\x1b]0;x\x07"))
    _, out, _ = call("probe")
    assert "\x1b" not in out
    assert "\x07" not in out


def test_probe_plans_for_cards_that_are_not_here(call: Call) -> None:
    status, out, _ = call("probe", "--assume", "NVIDIA H100 80GB HBM3 x2")
    assert status == 0
    assert out.startswith("· planned: 2 x H100 80GB HBM3, 159.3 of 159.3 GiB free\n")
    printed = call.document("probe", "--assume", "NVIDIA H100 80GB HBM3 x2")
    assert printed["assumed"]
    assert [card["uuid"] for card in printed["gpus"]] == ["planned-0", "planned-1"]


def test_doctor_prints_what_to_install(nvml: FakeDriver, call: Call, torch_for_cuda) -> None:
    nvml.set(H100)
    missing = missing_packages(read_machine())
    status, out, _ = call("doctor")
    assert status == 0
    for each in missing:
        assert "\n".join(command_lines(each.command)) in out
        mark = "✗" if each.needed else "·"
        assert all(f"{mark} {package}" in out for package in each.packages)
    assert "✓ mistral-common" in out
    assert max(map(len, out.splitlines())) <= 80
    printed = call.document("doctor")
    assert printed.keys() >= {"stack", "missing", "problems", "torch_cuda"}
    assert [entry["command"] for entry in printed["missing"]] == [each.command for each in missing]


@needs_trainer
def test_a_torch_without_cuda_comes_first(nvml: FakeDriver, call: Call, torch_for_cuda) -> None:
    (torch_for_cuda / "torch" / "version.py").write_text("cuda: Optional[str] = None\n")
    nvml.set(H100)
    _, out, _ = call("probe")
    assert out.startswith(
        "✗ not ready: H100 80GB HBM3, 79.6 GiB: the installed torch cannot use it\n"
    )
    _, out, _ = call("doctor")
    assert out.startswith("✗ 1 fault on this computer: see below.\n")
    assert "✓ torch              2.13.0 (without CUDA)\n" in out
    (problem,) = read_machine().problems
    assert out.endswith("\n".join(["", *command_lines(problem.command), ""]))
    # Where the lines are broken follows from the place of this Python.
    whole = out.replace(" \\\n    ", " ")
    assert whole.endswith(" --index-url https://download.pytorch.org/whl/cu130\n")
    assert max(map(len, out.splitlines()[:-2])) <= 80


def test_both_say_whether_fa4_suits_the_cards(nvml: FakeDriver, call: Call, torch_for_cuda) -> None:
    nvml.set(RTX_4090, H100)
    _, out, _ = call("probe")
    assert "· flash 4  RTX 4090 is not eligible: it trains from Hopper on" in out
    assert "· flash 4 H100 80GB HBM3 is eligible: made for Hopper" in said(out)
    first, second = (card["flash_attention_4"] for card in call.document("probe")["gpus"])
    assert first.startswith("not eligible: ")
    assert second.startswith("eligible: ")


@pytest.mark.parametrize("command", ["probe", "doctor"])
def test_neither_loads_the_trainer_nor_a_tokenizer(nvml: FakeDriver, command: str) -> None:
    nvml.set(H100)
    code = f"import sys; from engine.cli import main; main(['{command}', '--json'])"
    program = f"{code}; print(*sys.modules, file=sys.stderr)"
    done = run_python("-c", program, cwd=ROOT, **nvml.environment)
    assert done.returncode == 0
    assert "GPU-aaaa-1" in done.stdout or command == "doctor"
    assert "no_driver" not in done.stdout
    assert not {name.split(".")[0] for name in done.stderr.split()} & HEAVY


def test_every_model_has_a_verdict_and_a_size_in_80_columns(call: Call) -> None:
    lines = call("models", "--assume", "RTX 4090")[1].splitlines()
    assert lines[0] == "RTX 4090 can give 22.8 GiB"
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line for line in lines[2:] if line}
    assert {*model_names()} - {"demo-tiny-vision"} <= set(rows)
    assert " ✓ fits " in rows["magistral-small-2509"]
    assert " qlora " in rows["magistral-small-2509"]
    assert " qlora, RAM " in rows["mistral-medium-3.5"]
    assert not any("not trained yet" in line for line in lines)


def test_json_has_a_plan_beside_each_model(call: Call) -> None:
    plain = call.document("models")
    printed = call.document("models", "--assume", "24 GB")
    assert printed["device"]["planned"]
    assert [m["name"] for m in printed["models"]] == [m["name"] for m in plain["models"]]
    for before, model in zip(plain["models"], printed["models"], strict=True):
        plan = model.pop("plan")
        assert model == before
        assert plan["verdict"] in ("fits", "tight", "does not fit")
        assert plan["method"] in ("lora", "qlora", "full")
        assert plan["device_bytes"] > 0
        assert plan["not_trained"] is None

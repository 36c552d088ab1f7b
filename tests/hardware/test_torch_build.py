"""What is said of an installed torch, a driver and a card: from versions and files alone."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.hardware import Gpu, Machine, assume, read_machine, torch_problem
from engine.hardware.machine import Problem
from engine.hardware.packages import read_torch_cuda
from tests.fakes.nvml import H100, FakeDriver
from tests.fakes.packages import install_torch

INDEX = "--index-url https://download.pytorch.org/whl"
T4 = "gpu name=Tesla_T4 uuid=GPU-t4 total=16106127360 cc=7.5"
V100 = "gpu name=Tesla_V100-SXM2-16GB uuid=GPU-v total=16935682048 cc=7.0"
RTX_5090 = "gpu name=NVIDIA_GeForce_RTX_5090 uuid=GPU-5 total=34190917632 cc=12.0"
# Driver, and the newest CUDA that it runs.
DRIVERS = {"470": 11040, "535": 12020, "570": 12080, "580": 13000}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages that is looked into before the real one."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture(autouse=True)
def intel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.parametrize(
    ("version", "cuda", "requires", "found"),
    [
        ("2.13.0", "'13.0'", (), "13.0"),  # what PyPI has
        ("2.13.0+cu126", "'12.6'", (), "12.6"),
        ("2.13.0+cpu", "None", (), ""),
        ("2.13.0+rocm6.4", "None", (), ""),
        ("2.14.0a0+git1234", "'13.2'", (), "13.2"),  # built here
        ("2.13.0+cu130", None, (), "13.0"),
        ("2.13.0+cpu", None, (), ""),
        ("2.13.0", None, ("cuda-toolkit[cublas,cudart]==13.0.3; sys_platform == 'linux'",), "13.0"),
        (
            "2.7.0",
            None,
            (
                "numpy",
                "nvidia-cuda-runtime-cu12==12.6.77",
            ),
            "12.6",
        ),
        ("2.13.0", None, ("numpy",), None),
    ],
)
def test_the_cuda_of_torch(
    packages: Path, version: str, cuda: str | None, requires: tuple[str, ...], found: str | None
) -> None:
    install_torch(packages, version, cuda=cuda, requires=requires)
    assert read_torch_cuda() == found


def machine_with(nvml: FakeDriver, driver: str, *cards: str) -> Machine:
    nvml.set(f"driver {driver}.10", f"cuda {DRIVERS[driver]}", *cards)
    return read_machine({})


def about(machine: Machine, card: int = 0) -> Problem | None:
    return torch_problem(machine, machine.gpus[card])


@pytest.mark.parametrize(
    ("torch", "cuda", "driver", "card", "problem", "command"),
    [
        ("2.13.0", "'13.0'", "580", H100, None, ""),
        ("2.13.0", "'13.0'", "580", T4, None, ""),
        ("2.13.0", "'13.0'", "580", RTX_5090, None, ""),
        ("2.13.0+cu126", "'12.6'", "535", H100, None, ""),
        ("2.13.0+cu126", "'12.6'", "580", V100, None, ""),
        ("2.13.0+cpu", "None", "580", H100, "torch_without_cuda", f"2.13.0+cu130 {INDEX}/cu130"),
        ("2.13.0+cpu", "None", "535", H100, "torch_without_cuda", f"2.13.0+cu126 {INDEX}/cu126"),
        ("2.13.0", "'13.0'", "535", T4, "driver_too_old_for_torch", f"2.13.0+cu126 {INDEX}/cu126"),
        ("2.13.0", "'13.0'", "580", V100, "card_not_in_torch", f"2.13.0+cu126 {INDEX}/cu126"),
        ("2.13.0+cu126", "'12.6'", "580", RTX_5090, "card_not_in_torch", f"{INDEX}/cu130"),
        ("2.15.0", "'13.2'", "580", V100, "card_not_in_torch", ""),
    ],
)
def test_a_torch_that_cannot_use_a_card_and_the_build_that_can(
    nvml: FakeDriver,
    packages: Path,
    torch: str,
    cuda: str,
    driver: str,
    card: str,
    problem: str | None,
    command: str,
) -> None:
    install_torch(packages, torch, cuda=cuda)
    machine = machine_with(nvml, driver, card)
    found = about(machine)
    assert (found and found.id) == problem
    assert [each for each in machine.problems if each.id == problem] == [found] * bool(found)
    if found:
        assert found.severity == "error"
        assert command in found.command
        for sentence in (found.what, found.why, found.fix):
            assert sentence[0].isupper()
            assert sentence.endswith(".")


def test_a_driver_for_which_no_build_is_left_has_to_be_updated(
    nvml: FakeDriver, packages: Path
) -> None:
    install_torch(packages, "2.13.0", cuda="'13.0'")
    found = about(machine_with(nvml, "470", H100))
    assert found
    assert found.why == (
        "Driver 470.10 runs CUDA up to 11.4;"
        " torch was built for 13.0, which begins with driver 580."
    )
    assert found.fix == "Update the NVIDIA driver to 580 or newer."
    assert "torch" not in found.command


def test_a_driver_that_does_not_say_its_cuda_is_known_by_its_number(
    nvml: FakeDriver, packages: Path
) -> None:
    install_torch(packages, "2.13.0", cuda="'13.0'")
    unsaid = "err nvmlSystemGetCudaDriverVersion_v2 13"
    nvml.set("driver 535.10", unsaid, H100)
    found = about(read_machine({}))
    assert found
    assert found.id == "driver_too_old_for_torch"
    nvml.set("driver 580.10", unsaid, H100)
    assert about(read_machine({})) is None


def test_of_two_cards_only_the_one_that_torch_leaves_out_is_named(
    nvml: FakeDriver, packages: Path
) -> None:
    install_torch(packages, "2.13.0", cuda="'13.0'")
    machine = machine_with(nvml, "580", H100, V100)
    assert about(machine, 0) is None
    assert "V100-SXM2-16GB" in (about(machine, 1) or machine.problems[0]).what
    # A warning: the other card works, and the build that is proposed has code for both.
    (found,) = [each for each in machine.problems if "torch" in each.id]
    assert (found.id, found.severity) == ("card_not_in_torch", "warning")
    assert "cu126" in found.command


def test_no_build_is_proposed_that_leaves_out_the_other_card(
    nvml: FakeDriver, packages: Path
) -> None:
    install_torch(packages, "2.13.0", cuda="'13.0'")
    found = about(machine_with(nvml, "580", RTX_5090, V100), 1)
    assert found
    assert found.command == ""
    assert found.fix == "Use the other cards: no build of this torch has code for all of them."


def test_the_wheels_of_arm_leave_out_other_cards(
    nvml: FakeDriver, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    install_torch(packages, "2.13.0", cuda="'13.0'")
    found = about(machine_with(nvml, "580", T4))
    assert found
    assert (found.id, found.command) == ("card_not_in_torch", "")
    thor = "gpu name=NVIDIA_Thor uuid=GPU-thor total=5 cc=11.0"
    assert about(machine_with(nvml, "580", thor)) is None


def test_nothing_is_said_of_a_build_that_nobody_listed_or_of_no_torch() -> None:
    planned = assume("T4")
    gpu: Gpu = planned.gpus[0]
    for cuda in (None, "13.9"):
        machine = replace(planned, cuda_version="13.9", torch_cuda=cuda)
        assert torch_problem(machine, gpu) is None
    machine = replace(planned, stack={"torch": None}, torch_cuda="")
    assert torch_problem(machine, gpu) is None


def test_torch_is_looked_at_and_never_imported(nvml: FakeDriver, packages: Path) -> None:
    install_torch(packages, "2.13.0", cuda="'13.0'")
    nvml.set(V100)
    code = "import sys; from engine.hardware import read_machine; print(read_machine().problems)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"],
        env={**dict(nvml.environment), "PYTHONPATH": f"{packages}:{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "card_not_in_torch" in done.stdout
    assert done.stdout.endswith("False\n")

"""What kernels need beside torch, and what is said of torch and a card: by files alone."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.hardware import Gpu, Machine, assume, read_machine, torch_problem
from engine.hardware.machine import Problem
from engine.hardware.packages import (
    install_command,
    python_headers,
    read_torch_cuda,
    toolchain_problems,
)
from tests.fakes.nvml import H100, FakeDriver
from tests.fakes.packages import install_torch, package

PYTHON = "python{}.{}".format(*sys.version_info)
DEBIAN = "ID=debian\nVERSION_ID=12\n"
UBUNTU = 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n'
FEDORA = "ID=fedora\n"
ROCKY = 'ID="rocky"\nID_LIKE="rhel centos fedora"\n'
SUSE = 'ID="opensuse-leap"\nID_LIKE="suse opensuse"\n'
ARCH = "ID=arch\n"
OTHER = "ID=plan9\n"


def system(root: Path, release: str = DEBIAN, *, cache: str = "libcuda.so.1") -> Path:
    """A file system with this /etc/os-release and these libraries in the linker's list."""
    (root / "etc").mkdir()
    (root / "etc" / "os-release").write_text(release)
    (root / "etc" / "ld.so.cache").write_bytes(b"\0" + cache.encode() + b"\0")
    return root


def tools(folder: Path, *names: str) -> dict[str, str]:
    """An environment whose PATH has these programs and no other."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


def machine(**versions: str | None) -> Machine:
    planned = assume("H100")
    stack = {**planned.stack, "torch": "2.13.0", "triton": "3.7.1", "bitsandbytes": None}
    return replace(planned, torch_cuda="13.0", stack={**stack, **versions})


@pytest.fixture
def no_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which this Python's headers would be, empty as on a system without them."""
    folder = tmp_path / "include"
    folder.mkdir()
    monkeypatch.setattr("engine.hardware.packages.python_headers", lambda: folder)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    return folder


@pytest.fixture
def headers(no_headers: Path) -> None:
    (no_headers / "Python.h").touch()


def found_in(
    root: Path, here: Machine | None = None, *, release: str = DEBIAN, tool: str = "gcc"
) -> list[Problem]:
    """What is said of a computer with this one program."""
    return toolchain_problems(here or machine(), tools(root / "bin", tool), system(root, release))


def only(problems: list[Problem]) -> Problem:
    (found,) = problems
    for sentence in (found.what, found.why, found.fix):
        assert sentence[0].isupper() or sentence.startswith(("4-bit", "flash-attn"))
        assert sentence.endswith(".")
    return found


@pytest.mark.parametrize("there", ["gcc", "clang"])
@pytest.mark.usefixtures("headers")
def test_a_compiler_and_headers_are_all_that_triton_wants(tmp_path: Path, there: str) -> None:
    assert not found_in(tmp_path, tool=there)


@pytest.mark.parametrize(
    ("release", "command"),
    [
        (DEBIAN, "sudo apt-get install gcc"),
        (UBUNTU, "sudo apt-get install gcc"),
        (FEDORA, "sudo dnf install gcc"),
        (ROCKY, "sudo dnf install gcc"),
        (SUSE, "sudo zypper install gcc"),
        (ARCH, "sudo pacman -S gcc"),
        (OTHER, ""),
    ],
)
@pytest.mark.usefixtures("headers")
def test_without_a_compiler_its_command_is_named(
    tmp_path: Path, release: str, command: str
) -> None:
    # Triton does not take cc, the one name that every compiler answers to.
    found = only(found_in(tmp_path, release=release, tool="cc"))
    assert (found.id, found.command) == ("kernels_cannot_be_built", command)
    assert "a C compiler (gcc) is missing" in found.what


@pytest.mark.parametrize(
    ("release", "own", "command"),
    [
        (DEBIAN, PYTHON, f"sudo apt-get install gcc {PYTHON}-dev"),
        (FEDORA, PYTHON, "sudo dnf install gcc python3-devel"),
        (ROCKY, "python3.9", f"sudo dnf install gcc {PYTHON}-devel"),
        (SUSE, PYTHON, f"sudo zypper install gcc {PYTHON.replace('.', '')}-devel"),
    ],
)
@pytest.mark.usefixtures("no_headers")
def test_headers_are_named_by_the_version_of_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, own: str, command: str
) -> None:
    monkeypatch.setattr("sys.base_prefix", "/usr")
    (tmp_path / "usr" / "bin").mkdir(parents=True)
    (tmp_path / "usr" / "bin" / own).touch()
    (tmp_path / "usr" / "bin" / "python3").symlink_to(own)
    found = only(found_in(tmp_path, release=release, tool="cc"))
    assert found.command == command
    assert "headers of Python {}.{} are missing".format(*sys.version_info) in found.what


@pytest.mark.usefixtures("no_headers")
def test_a_python_from_elsewhere_has_no_package_of_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.base_prefix", "/opt/python")
    found = only(found_in(tmp_path))
    assert found.command == ""
    assert found.fix.startswith("Give this Python the headers of Python ")


@pytest.mark.usefixtures("headers")
def test_a_compiler_that_cc_names_has_to_be_there(tmp_path: Path) -> None:
    environment = tools(tmp_path / "bin", "gcc") | {"CC": "icx"}
    found = only(toolchain_problems(machine(), environment, system(tmp_path)))
    assert "the compiler icx that CC names is missing" in found.what


def test_headers_are_sought_where_triton_seeks_them() -> None:
    build = pytest.importorskip("triton.runtime.build")
    source = Path(build.__file__).read_text()
    assert "sysconfig.get_default_scheme()" in source
    assert "'posix_local'" in source
    assert python_headers().name == PYTHON


@pytest.mark.parametrize("cuda", [None, ""])
@pytest.mark.usefixtures("no_headers")
def test_nothing_is_wanted_where_torch_has_no_cuda(tmp_path: Path, cuda: str | None) -> None:
    assert not found_in(tmp_path, replace(machine(), torch_cuda=cuda), tool="cc")


@pytest.mark.usefixtures("headers")
def test_a_container_for_pictures_lacks_the_driver_library(tmp_path: Path) -> None:
    environment = tools(tmp_path / "bin", "gcc")
    root = system(tmp_path, cache="libcuda.so.0")
    found = only(toolchain_problems(machine(), environment, root))
    assert (found.id, found.severity) == ("cuda_library_missing", "error")
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in found.fix
    library = root / "usr" / "lib" / "wsl" / "lib" / "libcuda.so.1"
    library.parent.mkdir(parents=True)
    library.touch()
    assert only(toolchain_problems(machine(), environment, root)).command == "sudo ldconfig"
    environment["LD_LIBRARY_PATH"] = f":{library.parent}"
    assert not toolchain_problems(machine(), environment, root)


@pytest.mark.parametrize("place", ["usr/lib64", "usr/lib/x86_64-linux-gnu"])
@pytest.mark.usefixtures("headers")
def test_a_library_found_without_the_linker_s_list_is_not_missing(
    tmp_path: Path, place: str
) -> None:
    root = system(tmp_path, cache="libcuda.so.0")
    (root / place).mkdir(parents=True)
    (root / place / "libcuda.so.1").touch()
    assert not toolchain_problems(machine(), tools(tmp_path / "bin", "gcc"), root)


@pytest.mark.parametrize(
    ("libraries", "cuda", "fits"),
    [
        (("130",), "13.0", True),
        (("130",), "13.2", True),  # the nearest of the same major version
        (("126", "128"), "13.0", False),
        (("126", "130"), "12.9", True),
        ((), "13.0", False),
    ],
)
@pytest.mark.usefixtures("headers")
def test_bitsandbytes_needs_a_library_of_torch_s_cuda(
    tmp_path: Path, packages: Path, libraries: tuple[str, ...], cuda: str, fits: bool
) -> None:
    (packages / "bitsandbytes").mkdir()
    package(packages, "bitsandbytes", "0.50.2")
    for library in (*(f"cuda{each}" for each in libraries), "cpu", "rocm72"):
        (packages / "bitsandbytes" / f"libbitsandbytes_{library}.so").touch()
    found = found_in(tmp_path, replace(machine(bitsandbytes="0.50.2"), torch_cuda=cuda))
    assert [each.id for each in found] == ["bitsandbytes_without_library"] * (not fits)
    if not fits:
        assert only(found).command.endswith("install --upgrade bitsandbytes")


@pytest.mark.parametrize(
    ("card", "keep"),
    [("H100", "flash-attn-4"), ("B200", "flash-attn-4"), ("RTX 4090", "flash-attn")],
)
@pytest.mark.usefixtures("headers")
def test_of_packages_that_overwrite_each_other_one_is_kept(
    tmp_path: Path, card: str, keep: str
) -> None:
    here = machine(**{"flash-attn": "2.8.3", "flash-attn-4": "4.0.0b36"})
    found = only(found_in(tmp_path, replace(here, gpus=assume(card).gpus)))
    assert found.id == "attention_packages_overwritten"
    assert f"Keep {keep} alone" in found.fix
    removed = {"flash-attn", "flash-attn-4"} if keep == "flash-attn-4" else {"flash-attn-4"}
    first, *rest = found.command.split(" && ")
    assert removed == {word for word in first.split() if word.startswith("flash-attn")}
    assert rest == [install_command("fa4")] * (keep == "flash-attn-4")


INDEX = "--index-url https://download.pytorch.org/whl"
T4 = "gpu name=Tesla_T4 uuid=GPU-t4 total=16106127360 cc=7.5"
V100 = "gpu name=Tesla_V100-SXM2-16GB uuid=GPU-v total=16935682048 cc=7.0"
RTX_5090 = "gpu name=NVIDIA_GeForce_RTX_5090 uuid=GPU-5 total=34190917632 cc=12.0"
# Driver, and the newest CUDA that it runs.
DRIVERS = {"470": 11040, "535": 12020, "570": 12080, "580": 13000}


@pytest.fixture
def torch(packages: Path) -> Path:
    """Where the build of torch on PyPI is installed."""
    install_torch(packages, "2.13.0", cuda="'13.0'")
    return packages


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
        ("2.7.0", None, ("numpy", "nvidia-cuda-runtime-cu12==12.6.77"), "12.6"),
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
        assert command in only([found]).command


def test_a_driver_without_any_build_has_to_be_updated(nvml: FakeDriver, torch: Path) -> None:
    found = about(machine_with(nvml, "470", H100))
    assert found
    assert found.why == (
        "Driver 470.10 runs CUDA up to 11.4;"
        " torch was built for 13.0, which begins with driver 580."
    )
    assert found.fix == "Update the NVIDIA driver to 580 or newer."
    assert "torch" not in found.command


def test_a_driver_silent_on_cuda_is_known_by_its_number(nvml: FakeDriver, torch: Path) -> None:
    unsaid = "err nvmlSystemGetCudaDriverVersion_v2 13"
    nvml.set("driver 535.10", unsaid, H100)
    found = about(read_machine({}))
    assert found
    assert found.id == "driver_too_old_for_torch"
    nvml.set("driver 580.10", unsaid, H100)
    assert about(read_machine({})) is None


def test_of_two_cards_the_one_left_out_is_named(nvml: FakeDriver, torch: Path) -> None:
    machine = machine_with(nvml, "580", H100, V100)
    assert about(machine, 0) is None
    assert "V100-SXM2-16GB" in (about(machine, 1) or machine.problems[0]).what
    # A warning: the other card works, and the build that is proposed has code for both.
    (found,) = [each for each in machine.problems if "torch" in each.id]
    assert (found.id, found.severity) == ("card_not_in_torch", "warning")
    assert "cu126" in found.command


def test_no_build_is_proposed_without_the_other_card(nvml: FakeDriver, torch: Path) -> None:
    found = about(machine_with(nvml, "580", RTX_5090, V100), 1)
    assert found
    assert found.command == ""
    assert found.fix == "Use the other cards: no build of this torch has code for all of them."


def test_the_wheels_of_arm_leave_out_other_cards(
    nvml: FakeDriver, torch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
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


def test_torch_is_looked_at_and_never_imported(nvml: FakeDriver, torch: Path) -> None:
    nvml.set(V100)
    code = "import sys; from engine.hardware import read_machine; print(read_machine().problems)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"],
        env={**dict(nvml.environment), "PYTHONPATH": f"{torch}:{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "card_not_in_torch" in done.stdout
    assert done.stdout.endswith("False\n")

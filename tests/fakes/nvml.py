"""The fake NVIDIA driver for tests: `nvml` is a fixture of every test folder.

`nvml.set("gpu name=... uuid=...", ...)` describes the machine, in the words of nvml.c; the real
pynvml then asks it, in this process and, with `nvml.environment`, in others.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pynvml
import pytest

ABOUT_THE_STACK = {
    *("torch_without_cuda", "driver_too_old_for_torch", "card_not_in_torch"),
    *("cuda_library_missing", "kernels_cannot_be_built", "bitsandbytes_without_library"),
    "attention_packages_overwritten",
}
"""Problems that depend on what is installed where the tests run."""
SOURCE = Path(__file__).with_name("nvml.c")
H100 = (
    "gpu name=NVIDIA_H100_80GB_HBM3 uuid=GPU-aaaa-1 pci=00000000:3B:00.0 total=85520809984"
    " used=1000000000 reserved=600000000 cc=9.0 util=37 temp=55 power=310000 limit=700000 mig=0"
)
RTX_4090 = (
    "gpu name=NVIDIA_GeForce_RTX_4090 uuid=GPU-bbbb-1 pci=00000000:01:00.0 total=25757220864"
    " used=600000000 reserved=400000000 cc=8.9 util=0 temp=41 power=28000 limit=450000"
)


class FakeDriver:
    """A driver whose computer is described by a file."""

    def __init__(self, library: Path, state: Path) -> None:
        self._state = state
        self.environment: Mapping[str, str] = {
            "LD_LIBRARY_PATH": str(library.parent),
            "FAKE_NVML": str(state),
        }

    def set(self, *lines: str) -> None:
        """The computer is like this from now on, also for those who watch it."""
        beside = self._state.with_suffix(".new")
        beside.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        beside.replace(self._state)


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake, built with the system's compiler or, without one, with Zig's."""
    library = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    compiler = shutil.which("cc") or shutil.which("gcc")
    command = [compiler] if compiler else [sys.executable, "-m", "ziglang", "cc"]
    build_library(command, library)
    library.with_name("libcuda.so.1").touch()  # a driver has it, and nothing here computes
    return library


def build_library(command: list[str], library: Path) -> None:
    """Compile nvml.c. It gets no soname: a process that loaded it can still find the real one."""
    subprocess.run(
        [*command, "-D_GNU_SOURCE", "-shared", "-fPIC", "-O1", "-o", library, SOURCE], check=True
    )


@pytest.fixture
def nvml(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A computer with the fake driver and, until `set`, no card."""
    driver = FakeDriver(nvml_library, tmp_path / "nvml.txt")
    driver.set()
    for name, value in driver.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(os.fspath(nvml_library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    return driver

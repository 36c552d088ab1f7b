"""Memory and processors as a process may use them: the computer's, or its container's."""

import os
import sys
from pathlib import Path

import pytest

from engine.hardware import assume
from engine.hardware.reading import count_cpus, cpu_name, read_memory
from engine.units import GIB

MEMINFO = "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 33554432 kB\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A computer of 64 GiB, 32 of them free, and no control group."""
    write(tmp_path / "proc" / "meminfo", MEMINFO)
    write(tmp_path / "proc" / "self" / "cgroup", "0::/pod/app\n")
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", "utf-8")


def group(root: Path, name: str = "pod/app") -> Path:
    return root / "sys" / "fs" / "cgroup" / name


def test_without_a_limit_memory_is_the_computers(root: Path) -> None:
    assert read_memory(root) == (64 * GIB, 32 * GIB)
    write(group(root) / "memory.max", "max")
    assert read_memory(root) == (64 * GIB, 32 * GIB)


@pytest.mark.parametrize("name", ["pod/app", "pod"], ids=["its own", "the one above"])
def test_a_containers_limit_counts(root: Path, name: str) -> None:
    write(group(root, name) / "memory.max", 8 * GIB)
    write(group(root, name) / "memory.current", 5 * GIB)
    assert read_memory(root) == (8 * GIB, 3 * GIB)


def test_file_pages_that_can_be_dropped_are_free(root: Path) -> None:
    write(group(root) / "memory.max", 8 * GIB)
    write(group(root) / "memory.current", 5 * GIB)
    write(group(root) / "memory.stat", f"anon {GIB}\ninactive_file {2 * GIB}")
    assert read_memory(root) == (8 * GIB, 5 * GIB)


def test_a_limit_above_what_there_is_changes_nothing(root: Path) -> None:
    write(group(root) / "memory.max", 512 * GIB)
    assert read_memory(root) == (64 * GIB, 32 * GIB)


def test_without_proc_the_system_is_asked(tmp_path: Path) -> None:
    total, available = read_memory(tmp_path)
    assert total >= available > 0


@linux
def test_processors_are_those_that_this_process_may_use(root: Path) -> None:
    assert count_cpus(root) == len(os.sched_getaffinity(0))
    write(group(root) / "cpu.max", "100000 100000")
    assert count_cpus(root) == 1
    write(group(root) / "cpu.max", "max 100000")
    assert count_cpus(root) == len(os.sched_getaffinity(0))


@linux
def test_the_processor_has_a_name(root: Path) -> None:
    write(root / "proc" / "cpuinfo", "processor : 0\nmodel name : Fast One\n")
    assert cpu_name(root) == "Fast One"


def test_the_disk_is_that_of_a_folder_to_be_made(tmp_path: Path) -> None:
    machine = assume("24 GB", disk=tmp_path / "not" / "yet")
    assert machine.disk_path == str(tmp_path / "not" / "yet")
    assert machine.disk_free_bytes > 0

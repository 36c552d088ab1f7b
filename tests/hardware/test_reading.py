"""CUDA_VISIBLE_DEVICES over the fake driver, with torch's own parser as oracle; and the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.hardware import Machine, assume, cuda_environment, read_machine
from engine.hardware.reading import count_cpus, cpu_name, read_memory
from engine.units import GIB
from tests.fakes.nvml import H100, RTX_4090, FakeDriver
from tests.support.extras import needs_trainer
from tests.support.hardware import SLICES, problem

# Two of a kind that share the beginning of their UUIDs, and one of another kind.
CARDS = (H100, H100.replace("GPU-aaaa-1", "GPU-aaaa-2"), RTX_4090)
UUIDS = ["GPU-aaaa-1", "GPU-aaaa-2", "GPU-bbbb-1"]
ABOUT_CUDA = {"cuda_hidden", "cuda_list_ends", "cuda_order_unsure"}


def seen(
    nvml: FakeDriver, value: str | None, *cards: str, **more: str
) -> tuple[list[str], Machine]:
    """UUIDs that a run could use, and the machine."""
    nvml.set(*(cards or CARDS))
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    machine = read_machine({**environment, **more})
    return [gpu.uuid for gpu in machine.gpus if gpu.state == "ready"], machine


def about_cuda(machine: Machine) -> set[str]:
    return {each.id for each in machine.problems} & ABOUT_CUDA


@pytest.mark.parametrize("value", [None, "GPU-aaaa-1,GPU-aaaa-2,GPU-bbbb-1"])
def test_nothing_is_hidden_and_nothing_is_said(nvml: FakeDriver, value: str | None) -> None:
    uuids, machine = seen(nvml, value)
    assert uuids == UUIDS
    assert about_cuda(machine) == set()


@pytest.mark.parametrize("value", ["", "-1", " ", "NoDevFiles"])
def test_no_card_can_be_asked_for(nvml: FakeDriver, value: str) -> None:
    uuids, machine = seen(nvml, value)
    assert uuids == []
    assert about_cuda(machine) == {"cuda_hidden"}
    assert problem(machine, "cuda_hidden").what.startswith("GPUs 0, 1, 2 are hidden by ")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("1", [1]),
        ("2,0", [0, 2]),
        (" 1 , 0", [0, 1]),
        ("+1", [1]),
        ("1x,0", [0, 1]),
        ("GPU-aaaa-2", [1]),
        ("GPU-b", [2]),
        ("GPU-b,GPU-aaaa-1", [0, 2]),
    ],
)
def test_cards_are_named_by_number_or_by_the_beginning_of_a_uuid(
    nvml: FakeDriver, value: str, shown: list[int]
) -> None:
    uuids, machine = seen(nvml, value, CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert uuids == [UUIDS[index] for index in shown]
    assert about_cuda(machine) == {"cuda_hidden"}
    hidden = [gpu for gpu in machine.gpus if gpu.state == "hidden"]
    assert {gpu.note for gpu in hidden} == {f"hidden by CUDA_VISIBLE_DEVICES={value}"}


@pytest.mark.parametrize(
    ("value", "shown", "message"),
    [
        ("1,7,0", [1], "ends at 7, which is no card"),
        ("1,-1,0", [1], "ends at -1, which is no card"),
        ("1,,0", [1], "ends at an empty entry, which is no card"),
        ("0,GPU-b", [0], "ends at GPU-b, which is no card"),
        ("GPU-b,0", [2], "ends at 0, which is no card"),
        ("GPU-b,GPU-x,GPU-aaaa-1", [2], "ends at GPU-x, which is no card"),
        ("GPU-a", [], "ends at GPU-a, with which 2 UUIDs begin"),
        ("GPU-b,GPU-", [2], "ends at GPU-, with which 3 UUIDs begin"),
        ("all", [], "ends at all, which is no card"),
        ("9" * 5000, [], "which is no card"),
        ("0,0", [], "names a card twice"),
        ("GPU-b,GPU-bbbb", [], "names a card twice"),
        ("MIG-s-1", [], "ends at MIG-s-1, which is no card"),
        ("\x1b[31m", [], "ends at ␛[31m, which"),
    ],
)
def test_a_list_ends_at_a_bad_one(
    nvml: FakeDriver, value: str, shown: list[int], message: str
) -> None:
    uuids, machine = seen(nvml, value, CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert uuids == [UUIDS[index] for index in shown]
    assert message in problem(machine, "cuda_list_ends").what
    assert "\x1b" not in "".join(each.what for each in machine.problems)


@pytest.mark.parametrize(
    ("cards", "order", "unsure"),
    [
        (CARDS, {}, True),
        (CARDS, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, True),
        (CARDS, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, False),
        (CARDS[:2], {}, False),
    ],
)
def test_a_number_is_uncertain_where_cards_differ(
    nvml: FakeDriver, cards: tuple[str, ...], order: dict[str, str], unsure: bool
) -> None:
    _, machine = seen(nvml, "1", *cards, **order)
    assert ("cuda_order_unsure" in about_cuda(machine)) is unsure
    _, machine = seen(nvml, "GPU-aaaa-2", *cards, **order)
    assert "cuda_order_unsure" not in about_cuda(machine)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("MIG-s-2", ["MIG-s-2"]),
        ("MIG-s-1,MIG-s-2", ["MIG-s-1"]),
        ("1", ["MIG-s-1"]),
        ("GPU-aaaa", ["MIG-s-1"]),
        ("0", ["GPU-bbbb-1"]),
        ("MIG-s", []),
        ("MIG-x", []),
    ],
)
def test_of_a_sliced_card_one_is_shown(nvml: FakeDriver, value: str, shown: list[str]) -> None:
    uuids, machine = seen(nvml, value, RTX_4090, *SLICES)
    assert uuids == shown
    assert "cuda_hidden" in about_cuda(machine)
    listed = value in ("MIG-s-1,MIG-s-2", "MIG-s", "MIG-x")
    assert ("cuda_list_ends" in about_cuda(machine)) is listed


def test_a_run_is_given_its_cards_by_uuid(nvml: FakeDriver) -> None:
    nvml.set(*CARDS)
    machine = read_machine({})
    chosen = [machine.gpus[2], machine.gpus[0]]
    environment = cuda_environment(chosen)
    assert environment == {
        "CUDA_VISIBLE_DEVICES": "GPU-bbbb-1,GPU-aaaa-1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    ready = {gpu.uuid for gpu in read_machine(environment).usable_gpus}
    assert ready == {gpu.uuid for gpu in chosen}
    assert read_machine(cuda_environment([])).usable_gpus == ()


def test_a_planned_card_is_given_to_no_run() -> None:
    with pytest.raises(UserError, match="only planned for"):
        cuda_environment(assume("RTX 4090").gpus)


_ENTRIES = st.sampled_from(
    ["0", "1", "2", "3", "-1", "", " 1", "2x", "x", "GPU-a", "GPU-b", "GPU-", "GPU-c", *UUIDS]
)
_ORACLE = """
import json, os, sys, torch
for line in sys.stdin:
    os.environ["CUDA_VISIBLE_DEVICES"] = json.loads(line)
    print(torch.cuda._device_count_nvml(), flush=True)
"""


@needs_trainer
def test_torch_counts_the_same_cards(nvml: FakeDriver) -> None:
    nvml.set(*CARDS)
    with subprocess.Popen(
        [sys.executable, "-c", _ORACLE],
        env={**os.environ, **nvml.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as torch:
        assert torch.stdin
        assert torch.stdout

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(_ENTRIES, min_size=1, max_size=4).map(",".join))
        def check(value: str) -> None:
            assert torch.stdin
            assert torch.stdout
            torch.stdin.write(json.dumps(value) + "\n")
            torch.stdin.flush()
            machine = read_machine({"CUDA_VISIBLE_DEVICES": value})
            assert len(machine.usable_gpus) == int(torch.stdout.readline())

        check()
        torch.stdin.close()


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

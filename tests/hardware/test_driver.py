"""The real pynvml asks a fake driver: what each answer, and each refusal, becomes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.hardware import Machine, poll, read_machine
from tests.fakes.nvml import ABOUT_THE_STACK, H100, RTX_4090, FakeDriver, build_library
from tests.support.hardware import SLICES, problem

GB10 = "gpu name=NVIDIA_GB10 uuid=GPU-cccc-1 total=5 cc=12.1 util=3 temp=35 power=11170"
NO_MEMORY = ("err nvmlDeviceGetMemoryInfo 3", "err nvmlDeviceGetMemoryInfo_v2 3")


def ids(machine: Machine) -> set[str]:
    return {each.id for each in machine.problems} - ABOUT_THE_STACK


def test_a_card_is_read_whole(nvml: FakeDriver) -> None:
    card = f"{H100} procs={os.getpid()}:7340032,4194305:-1,4194306:0"
    nvml.set("driver 575.57.08", "cuda 12090", card)
    machine = read_machine()
    assert (machine.driver_version, machine.cuda_version) == ("575.57.08", "12.9")
    (gpu,) = machine.gpus
    assert (gpu.uuid, gpu.index, gpu.name) == ("GPU-aaaa-1", 0, "NVIDIA H100 80GB HBM3")
    assert (gpu.short_name, gpu.architecture) == ("H100 80GB HBM3", "Hopper")
    assert gpu.memory_total_bytes == 85520809984
    assert gpu.memory_used_bytes == 1000000000
    assert gpu.memory_free_bytes == 85520809984 - 1000000000 - 600000000
    assert gpu.compute_capability == (9, 0)
    assert (gpu.utilization_percent, gpu.temperature_celsius) == (37, 55)
    assert (gpu.power_watts, gpu.power_limit_watts) == (310.0, 700.0)
    assert (gpu.state, gpu.note, gpu.unified, gpu.mig_parent) == ("ready", "", False, None)
    assert machine.usable_gpus == (gpu,)
    assert ids(machine) == set()
    ours, strangers, unnamed = gpu.processes or ()
    assert (ours.pid, ours.memory_bytes) == (os.getpid(), 7340032)
    assert ours.user
    assert "python" in (ours.command or "")
    assert (strangers.memory_bytes, strangers.user, strangers.command) == (None, None, None)
    assert unnamed.memory_bytes is None  # 0 is how a driver says that it cannot tell


@pytest.mark.parametrize(
    ("capability", "generation"),
    [
        ("6.1", "Pascal"),
        ("7.0", "Volta"),
        ("7.5", "Turing"),
        ("8.6", "Ampere"),
        ("8.9", "Ada"),
        ("10.3", "Blackwell"),
        ("12.0", "Blackwell"),
        ("5.2", ""),
        ("99.0", ""),
    ],
)
def test_a_generation_has_its_capability(
    nvml: FakeDriver, capability: str, generation: str
) -> None:
    nvml.set(H100.replace("cc=9.0", f"cc={capability}"))
    assert read_machine().gpus[0].architecture == generation


@pytest.mark.parametrize("code", [3, 13, 25])
def test_an_older_driver_answers_the_older_memory_question(nvml: FakeDriver, code: int) -> None:
    nvml.set(f"err nvmlDeviceGetMemoryInfo_v2 {code}", H100)
    machine = read_machine()
    (gpu,) = machine.gpus
    assert gpu.memory_used_bytes == 1600000000  # with what the driver keeps for itself
    assert gpu.memory_free_bytes == 85520809984 - 1600000000
    assert ids(machine) == set()


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (12, "no_driver", "No NVIDIA driver was found."),
        (9, "driver_not_loaded", "installed and not loaded"),
        (18, "driver_mismatch", "module and its library are of different versions"),
        (4, "driver_refuses", "refuses to show its GPUs here"),
        (999, "driver_error", "Unknown Error (NVML error 999)"),
    ],
)
def test_a_driver_that_cannot_start(nvml: FakeDriver, code: int, name: str, message: str) -> None:
    nvml.set(f"init {code}", H100)
    machine = read_machine()
    assert machine.gpus == machine.usable_gpus == ()
    assert message in problem(machine, name).what
    assert machine.ram_total_bytes > 0


def test_a_library_that_cannot_be_loaded_is_no_driver(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").touch()  # found before any other, and no library
    done = subprocess.run(
        [sys.executable, "-c", "from engine.hardware import *; print(read_machine().problems)"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "id='no_driver'" in done.stdout


def test_a_driver_without_a_card_is_not_a_missing_driver(nvml: FakeDriver) -> None:
    assert ids(read_machine()) == {"no_gpu"}


def test_a_hung_driver_is_given_up_and_found_again(nvml: FakeDriver) -> None:
    nvml.set("hang nvmlDeviceGetCount_v2 1500", H100)
    machine = read_machine(timeout_seconds=0.2)
    assert machine.gpus == ()
    assert "has not answered for 0.2 s" in problem(machine, "driver_silent").what
    nvml.set(H100)
    # It still hangs. The next caller waits for the one that does and does not add a second.
    assert ids(read_machine(timeout_seconds=0.05)) == {"driver_silent"}
    machine = read_machine()
    assert (len(machine.gpus), ids(machine)) == (1, set())


def test_a_driver_that_refuses_process_names_still_gives_the_rest(nvml: FakeDriver) -> None:
    nvml.set("err nvmlDeviceGetComputeRunningProcesses_v3 4", H100)
    machine = read_machine()
    (gpu,) = machine.usable_gpus
    assert gpu.processes is None
    assert gpu.memory_total_bytes == 85520809984
    assert "refuses to tell processes" in problem(machine, "answers_refused").what


def test_what_an_old_driver_does_not_know_is_left_empty(nvml: FakeDriver) -> None:
    nvml.set("err nvmlDeviceGetUtilizationRates 13", "err nvmlDeviceGetPowerUsage 13", H100)
    machine = read_machine()
    (gpu,) = machine.usable_gpus
    assert (gpu.utilization_percent, gpu.power_watts, gpu.power_limit_watts) == (None, None, 700.0)
    assert "does not know how to tell load and power." in problem(machine, "driver_old").what


def test_every_figure_may_be_missing(nvml: FakeDriver) -> None:
    questions = ("CudaComputeCapability", "UtilizationRates", "Temperature", "PowerUsage")
    nvml.set(*(f"err nvmlDeviceGet{each} 3" for each in questions), H100)
    machine = read_machine()
    (gpu,) = machine.usable_gpus
    assert (gpu.compute_capability, gpu.utilization_percent) == (None, None)
    assert (gpu.temperature_celsius, gpu.power_watts, gpu.architecture) == (None, None, "")
    assert ids(machine) == set()


@pytest.mark.parametrize("lines", [NO_MEMORY, ()], ids=["not supported", "odd figures"])
def test_unified_memory_is_the_computers_own(nvml: FakeDriver, lines: tuple[str, ...]) -> None:
    nvml.set(*lines, GB10)
    machine = read_machine()
    (gpu,) = machine.usable_gpus
    assert gpu.unified
    assert gpu.memory_total_bytes == machine.ram_total_bytes
    assert gpu.memory_free_bytes == machine.ram_available_bytes
    assert gpu.memory_used_bytes == machine.ram_total_bytes - machine.ram_available_bytes
    assert (gpu.utilization_percent, gpu.temperature_celsius, gpu.power_watts) == (3, 35, 11.17)


def test_a_discrete_card_without_memory_figures_stays_unknown(nvml: FakeDriver) -> None:
    nvml.set(*NO_MEMORY, H100)
    machine = read_machine()
    (gpu,) = machine.gpus
    assert (gpu.state, gpu.unified, gpu.memory_total_bytes) == ("unknown", False, None)
    assert machine.usable_gpus == ()
    assert "does not say how much memory" in problem(machine, "memory_unknown").what


class TestMig:
    def test_slices_stand_in_place_of_their_card(self, nvml: FakeDriver) -> None:
        nvml.set(RTX_4090, *SLICES)
        machine = read_machine()
        assert [gpu.uuid for gpu in machine.gpus] == ["GPU-bbbb-1", "MIG-s-1", "MIG-s-2"]
        large = machine.gpus[1]
        assert (large.index, large.mig_parent) == (1, "GPU-aaaa-1")
        assert large.short_name == "H100 80GB HBM3 MIG 3g.40gb"
        assert (large.memory_total_bytes, large.compute_capability) == (42949672960, (9, 0))
        assert [process.pid for process in large.processes or ()] == [41]
        assert problem(machine, "mig").what == "GPU 1 is cut into MIG slices."

    def test_a_run_uses_whole_cards_or_the_one_freest_slice(self, nvml: FakeDriver) -> None:
        nvml.set(RTX_4090, *SLICES)
        assert [gpu.uuid for gpu in read_machine().usable_gpus] == ["GPU-bbbb-1"]
        nvml.set(*SLICES)
        assert [gpu.uuid for gpu in read_machine().usable_gpus] == ["MIG-s-1"]

    def test_a_card_in_mig_mode_without_a_slice_cannot_be_used(self, nvml: FakeDriver) -> None:
        nvml.set(SLICES[0])
        machine = read_machine()
        assert machine.usable_gpus == ()
        assert "nvidia-smi -i 0 -mig 0" in problem(machine, "mig_empty").fix
        assert poll(machine).gpus == machine.gpus

    def test_slices_are_polled_like_cards(self, nvml: FakeDriver) -> None:
        nvml.set(*SLICES)
        machine = read_machine()
        nvml.set(*(line.replace("used=10 ", "used=4096 ") for line in SLICES))
        assert poll(machine).gpus[0].memory_used_bytes == 4096


class TestBadCards:
    @pytest.mark.parametrize(
        ("code", "state", "name"),
        [(15, "lost", "gpu_lost"), (16, "lost", "gpu_lost"), (10, "unknown", "gpu_unreadable")],
    )
    def test_one_that_cannot_be_opened_leaves_the_others(
        self, nvml: FakeDriver, code: int, state: str, name: str
    ) -> None:
        nvml.set(f"err nvmlDeviceGetHandleByIndex_v2 {code} 0", RTX_4090, H100)
        machine = read_machine()
        assert [gpu.state for gpu in machine.gpus] == [state, "ready"]
        assert machine.gpus[0].uuid == "unknown-0"
        assert [gpu.uuid for gpu in machine.usable_gpus] == ["GPU-aaaa-1"]
        assert problem(machine, name).what.startswith("GPU 0 ")

    def test_one_that_needs_a_reset_says_so(self, nvml: FakeDriver) -> None:
        nvml.set("err nvmlDeviceGetMemoryInfo_v2 16 1", RTX_4090, H100)
        machine = read_machine()
        assert [gpu.state for gpu in machine.gpus] == ["ready", "lost"]
        assert "has to be reset" in machine.gpus[1].note

    def test_one_without_a_uuid_cannot_be_given_to_a_run(self, nvml: FakeDriver) -> None:
        nvml.set("err nvmlDeviceGetUUID 999 0", RTX_4090, H100)
        machine = read_machine()
        assert [gpu.state for gpu in machine.gpus] == ["unknown", "ready"]
        assert "UUID" in problem(machine, "gpu_unreadable").what

    def test_a_name_that_is_no_text_does_not_hide_the_card(self, nvml: FakeDriver) -> None:
        nvml.set(H100)
        path = Path(nvml.environment["FAKE_NVML"])
        path.write_bytes(path.read_bytes().replace(b"HBM3", b"\xff\xfe"))
        (gpu,) = read_machine().usable_gpus
        assert gpu.name == "GPU 0"

    def test_names_reach_sentences_without_terminal_codes(self, nvml: FakeDriver) -> None:
        nvml.set(*NO_MEMORY, H100.replace("HBM3", "\x1b[31m"))
        assert "\x1b" not in problem(read_machine(), "memory_unknown").what


class TestPoll:
    def test_it_sees_what_changes(self, nvml: FakeDriver) -> None:
        nvml.set(H100)
        machine = read_machine()
        nvml.set(H100.replace("used=1000000000", "used=9").replace("temp=55", "temp=81"))
        gpu = poll(machine).gpus[0]
        assert (gpu.memory_used_bytes, gpu.temperature_celsius) == (9, 81)

    def test_a_card_that_vanishes_stays_and_is_lost(self, nvml: FakeDriver) -> None:
        nvml.set(RTX_4090, H100)
        machine = read_machine()
        nvml.set(RTX_4090)
        watched = poll(machine)
        assert [gpu.state for gpu in watched.gpus] == ["ready", "lost"]
        gone = watched.gpus[1]
        assert (gone.memory_total_bytes, gone.memory_free_bytes) == (85520809984, None)
        assert [gpu.uuid for gpu in watched.usable_gpus] == ["GPU-bbbb-1"]
        assert "GPU 1, H100 80GB HBM3, is lost" in problem(watched, "gpu_lost").what
        nvml.set(RTX_4090, H100)
        assert poll(watched).gpus == watched.gpus
        assert ids(read_machine()) == set()

    def test_a_silent_driver_leaves_the_last_figures(self, nvml: FakeDriver) -> None:
        nvml.set(H100)
        machine = read_machine()
        nvml.set("hang nvmlDeviceGetTemperature 300", H100.replace("used=1000000000", "used=9"))
        silent = poll(machine, timeout_seconds=0.1)
        assert silent.gpus == machine.gpus
        assert "driver_silent" in ids(silent)
        nvml.set(H100)
        assert "driver_silent" not in ids(poll(silent))

    def test_lasting_problems_stay(self, nvml: FakeDriver) -> None:
        nvml.set(RTX_4090, H100)
        machine = read_machine({"CUDA_VISIBLE_DEVICES": "GPU-b"})
        watched = poll(machine)
        assert ids(watched) == {"cuda_hidden"}
        assert [gpu.state for gpu in watched.gpus] == ["ready", "hidden"]


@pytest.mark.slow
def test_the_fake_builds_without_a_c_compiler_too(tmp_path: Path) -> None:
    library = tmp_path / "libnvidia-ml.so.1"
    build_library([sys.executable, "-m", "ziglang", "cc"], library)
    (tmp_path / "state").write_text(f"{H100}\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", "from engine.hardware import *; print(read_machine().gpus)"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "FAKE_NVML": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "GPU-aaaa-1" in done.stdout

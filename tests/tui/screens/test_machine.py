"""The Machine page over a fake driver: every state of a computer, and what Enter then takes."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from engine.hardware import Machine, read_machine
from engine.hardware.packages import torch_problems
from engine.runs import create_run
from engine.units import GIB
from engine.wizard.draft import Draft
from tests.fakes.nvml import ABOUT_THE_STACK, H100, RTX_4090, FakeDriver
from tests.fakes.processes import running_fake
from tests.support.screens import assert_golden
from tests.support.stand_in import Beyond, Screen, opened
from tui.app import WindtunnelApp
from tui.entry import WizardRequest, make_draft
from tui.screens.machine import MachinePage

SECOND = H100.replace("GPU-aaaa-1", "GPU-aaaa-2").replace("3B:00", "5E:00")
SLICE = (
    "slice parent=GPU-aaaa-1 uuid=MIG-s-1 name=NVIDIA_H100_80GB_HBM3_MIG_3g.40gb total=42949672960"
    " used=10"
)
GB10 = "gpu name=NVIDIA_GB10 uuid=GPU-cccc-1 total=5 cc=12.1 util=3 temp=35 power=11170"
STACK = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "datasets": "5.2.0",
    "cut-cross-entropy": "25.1.1",
    "safetensors": "0.8.0",
    "accelerate": "1.15.0",
    "pillow": "13.0.0",
    "flash-attn": "2.8.3",
    "flash-attn-3": None,
    "flash-attn-4": None,
    "mistral-common": "1.13.1",
    "triton": "3.7.1",
}


def fixed(machine: Machine) -> Machine:
    """The same GPUs in a computer that is the same everywhere."""
    return replace(
        machine,
        cpu_name="a CPU",
        cpu_count=8,
        ram_total_bytes=64 * GIB,
        ram_available_bytes=51 * GIB,
        disk_path="/data/sam/runs",
        disk_free_bytes=62 * 10**9,
        stack=STACK,
        torch_cuda="13.0",
        problems=tuple(each for each in machine.problems if each.id not in ABOUT_THE_STACK),
    )


def read_fixed() -> Machine:
    return fixed(read_machine({}))


@asynccontextmanager
async def machine_page(
    size: tuple[int, int] = (80, 24),
    *,
    read: Callable[[], Machine] = read_fixed,
    poll_seconds: float = 60,
    draft: Draft | None = None,
) -> AsyncIterator[Screen]:
    pages: dict[str, Any] = {"Machine": partial(MachinePage, poll_seconds), "Model": Beyond}
    app = WindtunnelApp(draft or Draft(), pages=pages, read=read)
    async with app.run_test(size=size) as pilot:
        yield Screen(app, pilot)


def verdict(screen: Screen) -> str:
    return screen.text.splitlines()[1].strip()


def is_left(screen: Screen) -> bool:
    return isinstance(screen.app.screen, Beyond)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["init 12"], "! no GPU  NVIDIA driver not found (libnvidia-ml.so.1)"),
        (["init 18"], "✗ driver  module and library differ: restart, or reload the module"),
        (["init 9"], "✗ driver  The NVIDIA driver is installed and not loaded"),
        (["init 4"], "✗ driver  The NVIDIA driver refuses to show its GPUs here"),
        ([], "! no GPU  The NVIDIA driver works and has no GPU"),
        ([f"{H100} lost=1"], "lost"),
        (["err nvmlDeviceGetComputeRunningProcesses_v3 4", RTX_4090], "! partial  The driver"),
        ([GB10, "err nvmlDeviceGetMemoryInfo 3", "err nvmlDeviceGetMemoryInfo_v2 3"], "GB10, unif"),
        ([H100.replace("mig=0", "mig=1"), SLICE], "GPU 0 is cut into MIG slices; pick one: H100"),
        ([H100.replace("mig=0", "mig=1")], "! partial  GPU 0, H100 80GB HBM3, cannot be used"),
        ([RTX_4090], "✓ ready  trains up to 24B with QLoRA; can give 21.9 of 24.0 GiB"),
    ],
)
async def test_the_verdict_names_the_computer(
    nvml: FakeDriver, lines: list[str], said: str
) -> None:
    nvml.set(*(line for line in lines if "lost=1" not in line))
    if "lost=1" in "".join(lines):
        nvml.set("err nvmlDeviceGetHandleByIndex_v2 15 0", H100)
    async with machine_page((120, 24)) as screen:
        await screen.until(lambda: said in verdict(screen))


async def test_a_hidden_card_is_grey_with_its_reason_and_cannot_be_taken(nvml: FakeDriver) -> None:
    def read() -> Machine:
        return fixed(read_machine({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}))

    nvml.set(H100, SECOND)
    async with machine_page(read=read) as screen:
        await screen.until("hidden by CUDA_VISIBLE_DEVICES=1")
        assert verdict(screen).startswith("Machine  ! hidden  GPU 0 is hidden by CUDA_VISIBLE")
        await screen.press("home", "enter")
        assert not is_left(screen)
        assert "✗ cannot be used  GPU 0, H100 80GB HBM3: hidden by" in verdict(screen)
        await screen.press("down", "enter")
        assert screen.app.draft.device.uuid == "GPU-aaaa-2"


async def test_the_card_that_gives_most_is_highlighted_and_taken(nvml: FakeDriver) -> None:
    nvml.set(RTX_4090, H100.replace("used=1000000000", "used=70000000000"), SECOND)
    async with machine_page() as screen:
        await screen.until("❯ 2  H100 80GB HBM3")
        await screen.press("enter")
        assert is_left(screen)
        device = screen.app.draft.device
        assert (device.uuid, device.planned) == ("GPU-aaaa-2", False)
        assert screen.app.draft.machine.usable_gpus[2].uuid == device.uuid


async def test_without_a_gpu_enter_takes_the_cpu(nvml: FakeDriver) -> None:
    nvml.set("init 12")
    async with machine_page(draft=Draft(model="demo-tiny")) as screen:
        await screen.until("❯ this computer's CPU  8 cores; trains the demo model")
        await screen.press("enter")
        assert is_left(screen)
        assert screen.app.draft.device.kind == "cpu"
        assert screen.app.draft.model == "demo-tiny"


async def test_enter_before_the_driver_has_answered_waits_and_says_so(nvml: FakeDriver) -> None:
    answers = threading.Event()

    def read() -> Machine:
        answers.wait(60)
        return read_fixed()

    nvml.set(RTX_4090)
    async with machine_page(read=read) as screen:
        await screen.until("❯ asking the driver…")
        await screen.press("enter")
        assert verdict(screen).endswith("asking the driver… goes on when it answers")
        assert not is_left(screen)
        answers.set()
        await screen.until(lambda: is_left(screen))
        assert screen.app.draft.device.uuid == "GPU-bbbb-1"


async def test_enter_before_an_answer_does_not_go_on_over_a_broken_driver(nvml: FakeDriver) -> None:
    nvml.set("init 18")
    async with machine_page() as screen:
        await screen.press("enter")
        await screen.until("✗ driver")
        assert not is_left(screen)
        await screen.press("enter")
        assert is_left(screen)


async def test_a_card_that_vanishes_is_marked_lost_and_no_longer_chosen(nvml: FakeDriver) -> None:
    nvml.set(H100, SECOND)
    async with machine_page(poll_seconds=0.1) as screen:
        await screen.until("❯ H100 80GB HBM3 x2  can give 74.2 GiB each")
        await screen.press("down")
        await screen.until("❯ 0  H100")
        await screen.press("enter")
        device = screen.app.draft.device
        assert (device.uuid, device.count) == ("GPU-aaaa-1", 1)
        screen.app.open_step("Machine")
        nvml.set(SECOND)
        await screen.until("❯ 0  H100 80GB HBM3  lost: the driver no longer reaches it")
        assert screen.app.draft.device is None
        await screen.press("enter")
        assert not is_left(screen)
        await screen.press("r")
        await screen.until(lambda: "lost" not in screen.text)


async def test_load_heat_and_use_are_followed(nvml: FakeDriver) -> None:
    nvml.set(RTX_4090)
    async with machine_page((120, 40), poll_seconds=0.1) as screen:
        await screen.until("0.6 used")
        await screen.until("41 °C")
        nvml.set(RTX_4090.replace("temp=41", "temp=77").replace("used=6", "used=96"))
        await screen.until("77 °C")
        await screen.until("8.9 used")


async def test_memory_that_others_take_changes_what_fits(nvml: FakeDriver) -> None:
    nvml.set(RTX_4090)
    async with machine_page((120, 40), poll_seconds=0.1) as screen:
        await screen.until("can give 21.9")
        nvml.set(RTX_4090.replace("used=6", "used=96"))
        await screen.until("can give 13.")


async def test_a_driver_that_was_silent_is_asked_again_by_itself(nvml: FakeDriver) -> None:
    silent = [True]

    def read() -> Machine:
        if silent:
            silent.clear()
            nvml.set("hang nvmlDeviceGetCount_v2 300", RTX_4090)
            return fixed(read_machine({}, timeout_seconds=0.05))
        nvml.set(RTX_4090)
        return read_fixed()

    async with machine_page(read=read, poll_seconds=0.5) as screen:
        await screen.until("✗ driver  The NVIDIA driver has not answered")
        await screen.until("0  RTX 4090")


async def test_what_runs_on_a_card_is_shown_safe_of_strange_names(nvml: FakeDriver) -> None:
    evil = RTX_4090.replace("NVIDIA_GeForce_RTX_4090", "NVIDIA_[red]X\x1b[31m")
    nvml.set(f"{evil} procs=4194305:71000000000")
    async with machine_page() as screen:
        await screen.until("[red]X␛[31m")
        await screen.press("i")
        assert "66.1 GiB  somebody  process 4194305" in screen.text
        await screen.press("escape")
        await screen.until("what it is good for")


async def test_a_torch_that_cannot_use_the_card_is_said_where_there_is_room(
    nvml: FakeDriver,
) -> None:
    def read() -> Machine:
        machine = replace(read_fixed(), torch_cuda="", stack={**STACK, "torch": "2.13.0+cpu"})
        return replace(machine, problems=tuple(torch_problems(machine)))

    for size, words in (
        ((80, 24), "install torch==2.13.0+cu130 --index-url https://download"),
        ((120, 40), "has the command."),
    ):
        nvml.set(RTX_4090)
        async with machine_page(size, read=read) as screen:
            await screen.until("✗ torch  The installed torch 2.13.0+cpu cannot use a GPU")
            assert words in " ".join(screen.text.replace("│", " ").split())


async def test_each_kind_of_card_says_whether_flash_attention_4_suits_it(nvml: FakeDriver) -> None:
    nvml.set(RTX_4090, H100)
    async with machine_page((120, 40)) as screen:
        await screen.until("flash 4  RTX 4090 is not")
        await screen.until("flash 4  H100 80GB HBM3 is")


async def test_an_h100_that_is_not_here_can_be_planned_for(nvml: FakeDriver) -> None:
    nvml.set("init 12")
    async with machine_page((120, 40)) as screen:
        await screen.until("❯ this computer's CPU")
        await screen.press("p")
        await screen.until("H100 80GB HBM3")
        while "❯ H100 80GB" not in screen.text:
            await screen.press("down")
        assert "$ windtunnel models --assume 'H100 80GB HBM3'" in screen.text
        await screen.press("enter")
        assert is_left(screen)
        device = screen.app.draft.device
        assert (device.name, device.planned) == ("H100 80GB HBM3", True)
        assert screen.app.draft.machine.assumed
        screen.app.open_step("Machine")
        await screen.until("❯ plan for H100 80GB HBM3  can give 75.")


@pytest.mark.slow
async def test_the_list_may_be_left_before_every_card_is_worked_out(nvml: FakeDriver) -> None:
    async with machine_page() as screen:
        await screen.until("❯ this computer's CPU")
        await screen.press("p")
        await screen.until("Ministral 3 8B ")
        await screen.press("escape", "p")
        await screen.until("Ministral 3 8B ")
        await screen.press("enter")
        assert is_left(screen)
        await asyncio.sleep(2)  # what was begun for the next card ends here


async def test_the_largest_model_of_each_planned_card_is_proposed(nvml: FakeDriver) -> None:
    async with machine_page((120, 40)) as screen:

        def listed(*parts: str) -> bool:
            return any(all(p in line for p in parts) for line in screen.text.splitlines())

        await screen.until("❯ this computer's CPU")
        await screen.press("p")
        for card, can_give, model in (
            ("T4", "14.2", "Ministral 3 8B"),
            ("A10", "21.4", "Magistral Small 1.2"),
        ):
            await screen.until(partial(listed, f" {card} ", can_give, model))


@pytest.mark.parametrize(("typed", "gibibytes"), [("4090", 24), ("H100 x2", 79.6)])
async def test_memory_or_names_can_be_typed(nvml: FakeDriver, typed: str, gibibytes: float) -> None:
    async with machine_page((120, 40)) as screen:
        await screen.until("❯ this computer's CPU")
        await screen.press("p")
        await screen.until("H100 80GB HBM3")
        await screen.press("end", "enter")
        await screen.type("H1")
        await screen.press("enter")
        await screen.until("what  There is no GPU named H1.")
        assert "┃ H1 " in screen.text
        await screen.press("backspace", "backspace")
        await screen.type(typed)
        await screen.press("enter")
        assert is_left(screen)
        assert screen.app.draft.device.total_bytes / GIB == pytest.approx(gibibytes, abs=0.1)


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
@pytest.mark.parametrize("name", ["cpu", "rtx-4090"])
async def test_the_whole_page(nvml: FakeDriver, name: str, size: tuple[int, int]) -> None:
    if name == "cpu":
        nvml.set("init 12")
    else:
        nvml.set("driver 580.95.05", "cuda 13000", RTX_4090)
    async with machine_page(size) as screen:
        await screen.until("proposed")
        assert_golden(f"machine-{name}-{size[0]}x{size[1]}", screen.text)


async def test_the_card_of_assume_is_under_the_cursor_and_enter_takes_it_however_many() -> None:
    draft = make_draft(WizardRequest(assumed="H100 x2"))
    before = draft.device
    async with opened(draft, "Machine", (100, 30)) as screen:
        await screen.until("❯ plan for H100 80GB HBM3 x2  can give 75.")
        await screen.press("p")
        await screen.until("❯ H100 80GB HBM3")
        await screen.press("escape")
        await screen.press("enter")
        assert screen.went_on
        assert draft.device is before


async def test_a_run_that_trains_is_named_on_the_first_page() -> None:
    app = WindtunnelApp(Draft())
    with running_fake(create_run("live"), steps=10**6, step_seconds=0.05):
        async with app.run_test(size=(100, 30), notifications=True) as pilot:
            await Screen(app, pilot).until("live is still training")

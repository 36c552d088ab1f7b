"""What is missing for a machine, and what keeps an installed torch from its GPUs."""

from dataclasses import replace
from importlib.metadata import version

import pytest

from engine.hardware import Machine, assume, known_gpus, missing_packages
from engine.hardware.packages import install_command, read_stack
from engine.plan import Heads, Task, best_device, choose_attention

INSTALLED = dict.fromkeys(read_stack(), "1.0") | {"torch": "2.13.0", "flash-attn": None}
INSTALLED |= {"flash-attn-3": None, "flash-attn-4": None}


def machine(gpu: str | None, **versions: str | None) -> Machine:
    stack = INSTALLED | {name.replace("_", "-"): found for name, found in versions.items()}
    planned = assume(gpu or "RTX 4090")
    cuda = "" if (stack["torch"] or "").endswith("+cpu") else "13.0"
    return replace(planned, stack=stack, torch_cuda=cuda, gpus=planned.gpus if gpu else ())


def test_versions_come_from_metadata() -> None:
    stack = read_stack()
    assert stack["mistral-common"] == version("mistral-common")
    assert stack["flash-attn-3"] is None


@pytest.mark.parametrize(
    ("gpu", "extras"),
    [
        (None, []),
        ("T4", []),
        ("24 GB", []),
        ("RTX 3090", []),  # PyTorch has the algorithm of flash-attn
        ("RTX 4090", []),
        ("RTX PRO 6000", []),
        ("H100", ["fa4"]),
        ("B200", ["fa4"]),
    ],
)
def test_only_what_suits_the_gpu_is_named(gpu: str | None, extras: list[str]) -> None:
    found = missing_packages(machine(gpu))
    assert [each.extra for each in found] == extras
    assert all(f"[{each.extra}]" in each.command for each in found)


def test_the_training_stack_is_one_command() -> None:
    first, *_ = missing_packages(machine("RTX 4090", torch=None, peft=None))
    assert (first.packages, first.command) == (("torch", "peft"), install_command("train"))


def test_nothing_is_missing_when_all_is_there() -> None:
    assert missing_packages(machine("H100", flash_attn_4="4.0")) == ()


def test_flash_attention_is_not_named_for_a_torch_without_cuda() -> None:
    assert missing_packages(machine("H100", torch="2.13.0+cpu")) == ()


@pytest.mark.parametrize("here", ["flash_attn", "flash_attn_4"])
def test_of_two_packages_that_overwrite_each_other_one_is_enough(here: str) -> None:
    assert missing_packages(machine("H100", **{here: "1.0"})) == ()


@pytest.mark.parametrize("name", [gpu.name for gpu in known_gpus()])
def test_a_plan_and_the_doctor_name_the_same_package(name: str) -> None:
    here = machine(name)
    named = [package for each in missing_packages(here) for package in each.packages]
    device = best_device(here)
    chosen = choose_attention(device, Task(Heads("ministral3", 128, 128)))
    assert named == [chosen.worth_installing] * bool(chosen.worth_installing)

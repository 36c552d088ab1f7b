"""What is missing for a machine, and what keeps an installed torch from its GPUs."""

from dataclasses import replace
from importlib.metadata import version

import pytest

from engine.hardware import Machine, assume, missing_packages
from engine.hardware.requirements import install_command
from engine.hardware.software import read_stack

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
        ("RTX 3090", ["fa2"]),
        ("RTX 4090", ["fa2"]),
        ("RTX PRO 6000", ["fa2"]),
        ("H100", ["fa2", "fa4"]),
        ("B200", ["fa2", "fa4"]),
    ],
)
def test_only_what_suits_the_gpu_is_named(gpu: str | None, extras: list[str]) -> None:
    found = missing_packages(machine(gpu))
    assert [each.extra for each in found] == extras
    assert all(f"[{each.extra}]" in each.command for each in found)


def test_the_training_stack_is_one_command() -> None:
    first, *_ = missing_packages(machine("RTX 4090", torch=None, peft=None))
    assert (first.packages, first.command) == (
        ("torch", "peft"),
        install_command("train"),
    )


def test_nothing_is_missing_when_all_is_there() -> None:
    assert missing_packages(machine("H100", flash_attn="2.8", flash_attn_4="4.0")) == ()


def test_flash_attention_is_not_named_for_a_torch_without_cuda() -> None:
    assert missing_packages(machine("H100", torch="2.13.0+cpu")) == ()


def test_on_hopper_the_backward_pass_of_flash_attention_4_is_mentioned() -> None:
    assert "built from source" in missing_packages(machine("H100"))[1].why
    assert "built from source" not in missing_packages(machine("B200"))[1].why

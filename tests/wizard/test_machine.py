"""The first step as data: which devices are offered, which is recommended, what an answer does."""

from dataclasses import replace

import pytest

from engine.errors import UserError
from engine.hardware import Machine, assume, read_machine
from engine.plan import best_device
from engine.wizard.draft import Draft
from engine.wizard.flow import Wizard, perform
from engine.wizard.machine import ALL, CPU, PLAN, PLANNED
from tests.fakes.nvml import H100, RTX_4090, FakeDriver
from tui.entry import WizardRequest, make_draft


def asked(draft: Draft | None = None) -> Wizard:
    """The wizard with this computer read."""
    wizard = Wizard(draft or Draft(), read=read_machine)
    work = wizard.work()
    assert work is not None
    assert wizard.receive(work, perform(work, lambda _done: None))
    assert wizard.work() is None
    return wizard


def keys(wizard: Wizard) -> list[str]:
    return [choice.key for choice in wizard.question().choices]


def recommended(wizard: Wizard) -> str:
    question = wizard.question()
    return question.choices[question.recommended].label


def test_without_a_gpu_the_cpu_is_recommended_and_the_reason_is_a_fact() -> None:
    wizard = asked()
    assert keys(wizard) == [CPU, PLAN]
    assert recommended(wizard) == "this computer's CPU"
    assert any("NVIDIA driver" in fact.text for fact in wizard.question().facts)
    wizard.take(CPU)
    assert wizard.at == 1
    assert wizard.draft.device is not None
    assert wizard.draft.device.kind == "cpu"


def test_the_card_with_the_most_memory_is_recommended(nvml: FakeDriver) -> None:
    nvml.set(RTX_4090, H100)
    wizard = asked()
    assert recommended(wizard) == "H100 80GB HBM3"
    labels = [choice.label for choice in wizard.question().choices[:2]]
    assert labels == ["RTX 4090", "H100 80GB HBM3"]


def test_cards_of_a_kind_are_used_together_unless_one_is_picked(nvml: FakeDriver) -> None:
    second, busy = (H100.replace("GPU-aaaa-1", f"GPU-aaaa-{n}") for n in (2, 3))
    busy = busy.replace("used=1000000000", "used=70000000000")
    nvml.set(H100, second.replace("3B:00", "5E:00"), busy.replace("3B:00", "86:00"))
    wizard = asked()
    assert recommended(wizard) == "H100 80GB HBM3 x2"
    assert "left out: GPU 2, 65.2 GiB in use" in wizard.question().choice(ALL).note
    wizard.take(ALL)
    assert wizard.draft.device is not None
    assert wizard.draft.device.count == 2
    one = asked()
    one.take("GPU-aaaa-2")
    assert one.draft.device is not None
    assert (one.draft.device.uuid, one.draft.device.count) == ("GPU-aaaa-2", 1)


@pytest.mark.parametrize(
    ("assumed", "label"),
    [("RTX 4090", "plan for RTX 4090"), ("H100 x2", "plan for H100 80GB HBM3 x2")],
)
def test_any_assumed_cards_are_recommended(assumed: str, label: str, nvml: FakeDriver) -> None:
    nvml.set(RTX_4090)
    draft = make_draft(WizardRequest(assumed=assumed))
    wizard = asked(draft)
    assert keys(wizard)[:2] == [PLANNED, keys(wizard)[1]]
    assert recommended(wizard) == label
    before = draft.device
    wizard.take(PLANNED)
    assert draft.device is before
    assert draft.device is not None
    assert draft.device.count == (2 if "x2" in assumed else 1)


@pytest.mark.parametrize(("text", "name"), [("24", "24 GB GPU"), ("4090", "RTX 4090")])
def test_another_gpu_is_planned_for_by_memory_or_name(text: str, name: str) -> None:
    wizard = asked()
    wizard.take(PLAN, text)
    assert wizard.draft.device is not None
    assert (wizard.draft.device.name, wizard.draft.device.planned) == (name, True)


def test_an_unknown_gpu_leaves_all_as_it_was() -> None:
    wizard = asked()
    with pytest.raises(UserError, match="There is no GPU named"):
        wizard.take(PLAN, "H1000000")
    assert (wizard.at, wizard.draft.device) == (0, None)


def test_a_card_that_a_run_cannot_use_is_refused_and_no_answer_any_more(nvml: FakeDriver) -> None:
    nvml.set(RTX_4090)
    wizard = asked()
    (card, *_) = keys(wizard)
    wizard.take(card)
    wizard.back()
    assert wizard.machine.machine is not None
    busy = replace(wizard.machine.machine.gpus[0], state="lost", note="it fell off the bus")
    look = wizard.machine.machine
    wizard.machine.receive(wizard.machine.look_again(), replace(look, gpus=(busy,)))
    assert wizard.draft.device is None
    choice = wizard.question().choice(card)
    assert choice.refusal == "lost: it fell off the bus"
    with pytest.raises(UserError, match="cannot be used"):
        wizard.take(card)
    assert wizard.at == 0


def test_work_that_nobody_asks_for_any_more_is_dropped() -> None:
    wizard = Wizard(Draft(), read=read_machine)
    work = wizard.work()
    assert work is not None
    machine: Machine = assume("H100")
    assert wizard.receive(work, machine)
    assert not wizard.receive(work, machine)


def test_a_planned_device_survives_another_look_at_the_machine(nvml: FakeDriver) -> None:
    nvml.set(RTX_4090)
    draft = Draft(device=best_device(assume("H100 x2")))
    wizard = asked(draft)
    wizard.machine.receive(wizard.machine.look_again(), read_machine())
    assert recommended(wizard) == "plan for H100 80GB HBM3 x2"

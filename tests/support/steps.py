"""The steps of the wizard without a printer: their work done here, their choices by key."""

from engine.config import DatasetConfig
from engine.hardware import assume, read_machine
from engine.plan import Device, best_device, cpu_device
from engine.units import GIB
from engine.wizard.draft import Draft
from engine.wizard.flow import perform
from engine.wizard.question import Choice, Step

SAMPLE = DatasetConfig(path="sample:harbour-pilot")
CPU = Device("this computer's CPU", "cpu", 64 * GIB, 46 * GIB)


def on(gpu: str, **answers: object) -> Draft:
    """A draft for that card, with further answers."""
    draft = Draft(device=best_device(assume(gpu)))
    for name, answer in answers.items():
        setattr(draft, name, answer)
    return draft


def ready(step: Step) -> list[str]:
    """Do what the step waits for; what was waited for."""
    waited = []
    while work := step.work():
        waited.append(work.waiting)
        step.receive(work, perform(work, lambda _done: None))
    return waited


def choices(step: Step) -> dict[str, Choice]:
    return {choice.key: choice for choice in step.question().choices}


def recommended(step: Step) -> str:
    question = step.question()
    return question.choices[question.recommended].key


def facts(step: Step) -> str:
    return "\n".join(map(str, step.question().facts))


def for_the_demo() -> Draft:
    machine = read_machine()
    return Draft(machine=machine, device=cpu_device(machine), model="demo-tiny", dataset=SAMPLE)


def for_a_planned_card() -> Draft:
    machine = assume("H100 80GB HBM3")
    device = best_device(machine)
    return Draft(machine=machine, device=device, model="ministral-3-8b", dataset=SAMPLE)

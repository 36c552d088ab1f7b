"""The first two questions: which machine, which model.

Each function asks one question and writes the answer into the draft; it returns when the person
goes on, and lets Back and Leave through.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine.catalog import ModelCard, read_architecture
from engine.chat.tokenizer_file import check_tokenizer, tokenizer_name
from engine.errors import UserError
from engine.plan import Device, Prospect, best_device, cpu_device, gpu_device, propose, survey
from engine.units import gib
from engine.visible import visible
from engine.wizard.draft import Draft
from engine.wizard.request import find_machine
from tui.plain.dialogue import Back, Choice, Dialogue

if TYPE_CHECKING:
    from engine.chat.tokenizer import ChatTokenizer
    from engine.data.checkup import Checkup


@dataclass(slots=True)
class Setup:
    """What the questions share: the draft, the person, and what was found in the rows."""

    draft: Draft
    dialogue: Dialogue
    home: Path | None = None
    """Folder that holds runs/, None for the usual one."""
    found: "Checkup | None" = None
    """Of the draft's datasets under the model's tokenizer and the switches."""
    _tokenizers: dict[str, "ChatTokenizer"] = field(default_factory=dict)

    def plan_for(self, gpus: str) -> None:
        """Plan for GPUs that are not here. Raises UserError for one that is not known."""
        self.draft.device = best_device(find_machine(gpus))

    def take_model(self, name: str) -> None:
        """Take a model. Raises UserError where its shape or its tokenizer cannot be read."""
        read_architecture(name)
        check_tokenizer(name)
        self.draft.model = name

    def tokenizer(self) -> "ChatTokenizer":
        """Of the draft's model; opening one takes seconds, so each is kept.

        Raises UserError where it cannot be read.
        """
        from engine.chat.tokenizer import open_tokenizer

        name = tokenizer_name(self.draft.config())
        if name not in self._tokenizers:
            self.dialogue.say(f"  Opening the tokenizer of {name}.")
            self._tokenizers[name] = open_tokenizer(name, Path.cwd())
        return self._tokenizers[name]


def ask_machine(setup: Setup) -> None:
    """Question 1: the GPU or the CPU that is here, or a GPU to plan for."""
    draft, dialogue = setup.draft, setup.dialogue
    if draft.machine is None:
        dialogue.say("  Asking the driver.")
        draft.machine = find_machine(None)
    machine = draft.machine
    here = [] if machine.assumed else [gpu_device(gpu, machine) for gpu in machine.usable_gpus]
    devices = [*here, cpu_device(machine)]
    if draft.device is not None and draft.device.planned:
        devices.insert(0, draft.device)
    for problem in machine.problems:
        dialogue.say(f"  {problem.what} {problem.why}")
    chosen = draft.device or best_device(machine)
    marked = next((at for at, each in enumerate(devices) if each == chosen), 0)
    choices = [_describe_device(device) for device in devices]
    choices.append(
        Choice(
            "plan for another GPU",
            "Everything but the start works for a GPU that is not here; the config is saved.",
        )
    )
    while (index := dialogue.choose(choices, marked)) == len(devices):
        if ask_text(dialogue, "  GPU, such as RTX 4090, H100 x2 or 24 GB: ", setup.plan_for):
            return
    draft.device = devices[index]


def _describe_device(device: Device) -> Choice:
    name = visible(device.name, one_line=True)
    give = f"{gib(device.can_give_bytes)} of {gib(device.total_bytes)}"
    if device.planned:
        return Choice(
            f"plan for {name}, can give {give}",
            "It is not here: the config is saved, and the run starts on the computer that has it.",
        )
    if device.kind == "cpu":
        return Choice(
            f"use {name}, can give {give}",
            "It trains the demo model in about a minute; a real model takes very long on it.",
        )
    return Choice(
        f"use {name}, can give {give}",
        "What it can give is its memory less what others use and 5% kept free.",
    )


def ask_text(dialogue: Dialogue, prompt: str, take: Callable[[str], None]) -> bool:
    """Ask until `take` accepts what was typed, or raises UserError; False where b was."""
    while True:
        try:
            take(dialogue.answer(prompt))
        except UserError as error:
            dialogue.refuse(error)
        except Back:
            return False
        else:
            return True


def ask_model(setup: Setup) -> None:
    """Question 2: a model of the catalog by what it needs here, or an own one."""
    draft, dialogue = setup.draft, setup.dialogue
    device = draft.device
    assert device is not None
    prospects = survey(device)
    dialogue.say(f"  needs, of {gib(device.can_give_bytes)} that can be given")
    proposed = propose(prospects, device)
    names = [prospect.card.name for prospect in prospects]
    choices = [_describe_model(each, each is proposed) for each in prospects]
    choices.append(
        Choice(
            "another: a folder or org/name",
            "A folder with config.json, model*.safetensors and tekken.json, or a hub id.",
        )
    )
    marked = names.index(proposed.card.name)
    if draft.model is not None:
        own = draft.model not in names
        marked = len(names) if own else names.index(draft.model)
        if own:
            choices.insert(marked, Choice(f"{draft.model}, as chosen before"))
    while (index := dialogue.choose(choices, marked)) == len(choices) - 1:
        if ask_text(dialogue, "  Folder or org/name: ", setup.take_model):
            return
    if index < len(names):
        setup.take_model(names[index])


def _describe_model(prospect: Prospect, proposed: bool) -> Choice:
    card, needs = prospect.card, prospect.plan.estimate
    label = f"{card.title:<22} {gib(needs.device_bytes):>10}  {needs.verdict}"
    if prospect.plan.not_trained:
        label += ", not trained yet"
    if proposed:
        label += ": recommended here"
    return Choice(label, _explain_model(card, prospect))


def _explain_model(card: ModelCard, prospect: Prospect) -> str:
    billions = prospect.plan.estimate.total_parameters / 10**9
    parts = [
        card.description,
        f"{billions:,.2f} B parameters, {card.context_tokens:,} tokens of context,"
        f" licence {card.licence}.",
        f"Planned with {prospect.plan.config.adapter or 'a full fine-tune'}.",
        prospect.plan.not_trained or "",
    ]
    return " ".join(part for part in parts if part)

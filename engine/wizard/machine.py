"""The first step: the device that the run computes on, or one that is not here to plan for.

It is imported before the planner, which the first frame of a screen does not wait for.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from engine.errors import UserError
from engine.report import SEVERITY_MARKS, Line
from engine.units import GIB, counted, gib
from engine.wizard.question import Choice, Question, Step, Work

if TYPE_CHECKING:
    from engine.hardware import Gpu, Machine
    from engine.plan import Device
    from engine.wizard.draft import Draft

CPU: Final = "cpu"
ALL: Final = "all"
"""Every card that can be used beside the best one."""
PLANNED: Final = "planned"
"""The GPU that is planned for already."""
PLAN: Final = "plan"
"""Another that is not here, named in the text."""
PLAN_REASON: Final = "Everything but the start works for it; the config is saved and taken there."
ASKING: Final = "asking the driver…"
PLAN_ONLY: Final = Line("·", "plan only", "for a GPU elsewhere; preview, plan and save work")
HELP: Final = (
    ("can give", "its memory, less what others use, less 5% for safety"),
    ("used", "memory that other programs hold on it now"),
    ("Ada 8.9", "its generation and compute capability; bf16 begins with 8.0"),
    ("MIG", "a slice of a card; a run can use one slice and nothing beside it"),
    ("CPU", "enough for the demo model, and for looking at everything else"),
    ("plan", "work out a run for a GPU elsewhere, and take its config there"),
)
# What a run cannot ignore, the gravest first: the verdict's word, and its sentence where the
# problem's own is too long for a row.
_FIRST_PROBLEMS: Final[Mapping[str, tuple[str, str]]] = {
    "driver_silent": ("driver", ""),
    "driver_mismatch": ("driver", "module and library differ: restart, or reload the module"),
    "driver_not_loaded": ("driver", ""),
    "driver_refuses": ("driver", ""),
    "driver_error": ("driver", ""),
    "no_driver": ("no GPU", "NVIDIA driver not found (libnvidia-ml.so.1)"),
    "no_gpu": ("no GPU", ""),
    "driver_too_old_for_torch": ("driver", ""),
    "torch_without_cuda": ("torch", ""),
    "card_not_in_torch": ("torch", ""),
    "cuda_library_missing": ("driver", ""),
    "gpu_lost": ("lost", ""),
    "gpu_unreadable": ("partial", ""),
    "memory_unknown": ("partial", ""),
    "mig_empty": ("partial", ""),
    "cuda_list_ends": ("hidden", ""),
    "cuda_hidden": ("hidden", ""),
    "answers_refused": ("partial", ""),
    "kernels_cannot_be_built": ("kernels", ""),
    "bitsandbytes_without_library": ("4-bit", ""),
    "attention_packages_overwritten": ("attention", ""),
}


class MachineStep(Step):
    """Which device. `read` looks at this computer; it is called again when asked to look again."""

    title = "Machine"

    def __init__(self, draft: "Draft", read: "Callable[[], Machine]") -> None:
        self._draft = draft
        self._read = read
        self.machine: Machine | None = None
        """This computer, whatever is planned for."""

    def work(self) -> Work | None:
        return None if self.machine is not None else self.look_again()

    def look_again(self) -> Work:
        return Work(self.title, (), ASKING, lambda _progress: self._read())

    def watch(self) -> Work:
        """The same cards again; all anew where the driver has shown none yet: it may wake them."""
        machine = self.machine
        assert machine is not None

        def look(_progress: object) -> "Machine":
            from engine.hardware import poll

            silent = any(problem.id == "driver_silent" for problem in machine.problems)
            return self._read() if silent and not machine.gpus else poll(machine)

        return Work("watch", (), ASKING, look)

    def receive(self, _work: Work, result: object) -> None:
        """Take in this computer, read for the first time or again.

        A card of the draft that a run cannot use any more is no answer any more.
        """
        from engine.hardware import Machine

        assert isinstance(result, Machine)
        self.machine = result
        device = self._draft.device
        chosen = [each.uuid for each in (device, *device.others)] if device else []
        gone = (gpu for gpu in result.gpus if gpu.uuid in chosen)
        if any(gpu.refusal for gpu in gone):
            self._draft.device = None

    def question(self) -> Question:
        """The device that is planned for, every card in the driver's order, the CPU, another."""
        assert self.machine is not None
        machine, planned = self.machine, self._planned
        choices = [_card(gpu) for gpu in machine.gpus]
        if (several := self._several()) is not None:
            choices.insert(0, _together(several))
        if planned is not None:
            label = f"plan for {named_cards(planned)}"
            note = f"can give {planned.can_give_bytes / GIB:.1f} of {gib(planned.total_bytes)}"
            choices.insert(0, Choice(PLANNED, label, note, reason=PLAN_REASON))
        cores = counted(machine.cpu_count, "core")
        choices += [
            Choice(
                CPU,
                "this computer's CPU",
                f"{cores}; trains the demo model in about a minute",
                reason="A real model takes days on it.",
            ),
            Choice(
                PLAN,
                "plan for another GPU",
                "what it holds, without having it",
                reason=PLAN_REASON,
                asks="GPU, such as RTX 4090, H100 x2 or 24 GB",
                completes="gpu",
            ),
        ]
        keys = [choice.key for choice in choices]
        recommended = self._recommended(machine)
        place = keys.index(recommended if recommended in keys else CPU)
        problems = tuple(
            Line(SEVERITY_MARKS[problem.severity], "", f"{problem.what} {problem.why}")
            for problem in machine.problems
        )
        return Question(self.verdict(keys[place]), tuple(choices), place, problems)

    def verdict(self, key: str) -> Line:
        """What is wrong with the computer, else what the choice is."""
        assert self.machine is not None
        if key in (PLANNED, PLAN):
            return PLAN_ONLY
        several = self._several()
        if key == ALL and several is not None:
            first = machine_verdict(self.machine, self._gpu(several.uuid or ""))
            if first.mark == "✓":
                return Line("✓", "ready", f"{several.name} x{several.count} together")
            return first
        return machine_verdict(self.machine, self._gpu(key))

    def is_plain(self, key: str) -> bool:
        """Whether the verdict only names a card: what fits on it can stand in its place."""
        gpu = self._gpu(key)
        if gpu is None or self.verdict(key).mark != "✓":
            return False
        return not gpu.mig_parent and not gpu.unified

    def device(self, key: str) -> "Device":
        """The device that a choice stands for. Raises UserError where a run cannot use it."""
        from engine.plan import cpu_device, gpu_device

        assert self.machine is not None
        if key == PLANNED and self._planned is not None:
            return self._planned
        if key == CPU:
            return cpu_device(self.machine)
        several = self._several()
        if key == ALL and several is not None:
            return several
        gpu = self._gpu(self.question().choice(key).key)
        assert gpu is not None
        if gpu.refusal:
            raise UserError(
                f"GPU {gpu.index}, {gpu.short_name}, cannot be used.",
                f"{gpu.refusal}.",
                "Take another of the list, or look again once it is ready.",
            )
        device = gpu_device(gpu, self.machine)
        return replace(device, others=(), left_out=(), unused=len(device.others))

    def _several(self) -> "Device | None":
        """The cards that one run can use together; None where there are no two."""
        from engine.plan import best_device

        assert self.machine is not None
        device = best_device(self.machine)
        return device if device.others else None

    def take(self, key: str, text: str) -> bool:
        """Compute on a device that is here, or plan for one by its name or its memory in GB."""
        from engine.hardware import assume
        from engine.plan import best_device

        if key == PLAN:
            gigabytes = text.replace(".", "", 1).isdecimal()
            try:
                machine = assume(text)
            except UserError:  # a card's number, such as 4090, goes before its memory
                if not gigabytes:
                    raise
                machine = assume(f"{text} GB")
            self._draft.machine, self._draft.device = machine, best_device(machine)
        elif key != PLANNED or self._planned is None:
            self._draft.device = self.device(key)
            self._draft.machine = self.machine
        return True

    def _gpu(self, key: str) -> "Gpu | None":
        assert self.machine is not None
        return next((gpu for gpu in self.machine.gpus if gpu.uuid == key), None)

    @property
    def _planned(self) -> "Device | None":
        device = self._draft.device
        return device if device is not None and device.planned else None

    def _recommended(self, machine: "Machine") -> str:
        from engine.plan import best_device

        device = self._draft.device or best_device(machine)
        if device.planned:
            return PLANNED
        return ALL if device.others else device.uuid or CPU


def listed_machines() -> "list[Machine]":
    """This computer with each known GPU in it, the smallest first."""
    from engine.hardware import assume, listed_gpus
    from engine.plan import best_device

    machines = [assume(gpu.name) for gpu in listed_gpus()]
    return sorted(machines, key=lambda machine: best_device(machine).total_bytes)


def named_cards(device: "Device") -> str:
    """A device as --assume takes it: H100 80GB HBM3 x2, 8 x 8 x H100 80GB HBM3."""
    if device.nodes > 1:
        return f"{device.nodes} x {device.count} x {device.name}"
    return f"{device.name} x{device.count}" if device.count > 1 else device.name


def card_figures(gpu: "Gpu") -> tuple[str, ...]:
    """What is known of a card that can be used, what matters most first; "" for what is not."""
    capability = "" if gpu.compute_capability is None else "{}.{}".format(*gpu.compute_capability)
    used, load, heat = gpu.memory_used_bytes, gpu.utilization_percent, gpu.temperature_celsius
    return (
        f"{(gpu.memory_total_bytes or 0) / GIB:.1f} GiB",
        "" if used is None else f"{used / GIB:.1f} used",
        f"{gpu.architecture} {capability}".strip(),
        "" if heat is None else f"{heat} °C",
        "" if gpu.power_watts is None else f"{gpu.power_watts:.0f} W",
        "" if load is None else f"busy {load}%",
    )


def machine_verdict(machine: "Machine", gpu: "Gpu | None") -> Line:
    """What is wrong with the machine, else what the card is; the CPU where there is none."""
    if gpu is not None and (refusal := gpu.refusal):
        return Line("✗", "cannot be used", f"GPU {gpu.index}, {gpu.short_name}: {refusal}")
    found = {problem.id: problem for problem in machine.problems}
    for name, (word, short) in _FIRST_PROBLEMS.items():
        if problem := found.get(name):
            return Line(SEVERITY_MARKS[problem.severity], word, short or problem.what.rstrip("."))
    if gpu is None:
        return Line("✓", "ready", "this computer's CPU trains the demo model in about a minute")
    return Line("✓", "ready", _sentence(gpu))


def _sentence(gpu: "Gpu") -> str:
    name = gpu.short_name
    total, free = (gpu.memory_total_bytes or 0) / GIB, (gpu.memory_free_bytes or 0) / GIB
    if gpu.mig_parent:
        return f"GPU {gpu.index} is cut into MIG slices; pick one: {name}, {total:.1f} GiB"
    if gpu.unified:
        return f"{name}, unified memory: {total:.1f} GiB total, {free:.1f} free now"
    return f"{name}, {free:.1f} of {total:.1f} GiB free"


def _together(device: "Device") -> Choice:
    """All cards that are free, and why another of their kind is none of them."""
    note = f"can give {device.among(device.count).can_give_bytes / GIB:.1f} GiB each"
    note += "".join(f"; left out: {reason}" for reason in device.left_out)
    return Choice(
        ALL,
        f"{device.name} x{device.count}",
        note,
        reason="A model that one card holds is learned faster, a larger one is shared by them.",
    )


def _card(gpu: "Gpu") -> Choice:
    refusal = gpu.refusal
    note = refusal or ", ".join(filter(None, card_figures(gpu)))
    margin = "What it can give is its memory, less what others use, less 5% for safety."
    return Choice(gpu.uuid, gpu.short_name, note, reason=refusal or margin, refusal=refusal)

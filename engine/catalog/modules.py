"""The table of every parameter of a model: its name, shape, group and whether 4-bit.

Everything that plans (memory, LoRA targets, what is trained) reads this table and nothing else, so
that it never disagrees with the model that transformers builds. The rows and their order are those
of `named_parameters()` in transformers 5.23; a test builds each model on the meta device and
compares them one by one.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Literal, get_args

_LAYER = re.compile(r"\blayers\.(\d+)\.")
Group = Literal[
    "embedding", "head", "attention", "mlp", "experts", "router", "norm", "vision", "projector"
]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the model in memory."""

    name: str
    """As in `named_parameters()`; on disk Mistral 3 models order the prefixes differently."""
    shape: tuple[int, ...]
    group: Group
    """`vision` and `projector` hold everything below them, their norms too."""
    quantizable: bool
    """A Linear weight that bitsandbytes makes 4-bit. False for the experts, which are raw 3-D
    tensors that it leaves alone: their group says which they are."""
    tied: bool = False
    """Shares the embedding's memory: counted there, not here."""

    @property
    def count(self) -> int:
        """Numbers that the parameter itself adds to the model."""
        return 0 if self.tied else prod(self.shape)

    @property
    def module(self) -> str:
        """Qualified name of the module that holds it."""
        return self.name.rpartition(".")[0]


# eq=False: a plan is made at each keystroke, and hashing and comparing a thousand rows would take
# most of its time.
@dataclass(frozen=True, slots=True, eq=False)
class ModuleTable:
    """Every parameter of a model, in the model's own order."""

    class_name: str
    """The transformers class that builds it."""
    parameters: tuple[Parameter, ...]
    routed_share: Fraction
    """Share of the experts that one token passes through: 4/128, or 1 where there are none."""

    @property
    def total_parameters(self) -> int:
        """All parameters, vision tower included, a tied head counted once."""
        return sum(row.count for row in self.parameters)

    @property
    def active_parameters(self) -> int:
        """Parameters that one text token passes through: no vision tower, the routed experts."""
        counts = self.counts_by_group()
        idle = counts["experts"] * (1 - self.routed_share)
        return self.total_parameters - counts["vision"] - counts["projector"] - int(idle)

    def counts_by_group(self) -> dict[Group, int]:
        """Number of parameters in each group; 0 for a group that the model lacks."""
        counts: dict[Group, int] = dict.fromkeys(get_args(Group), 0)
        for row in self.parameters:
            counts[row.group] += row.count
        return counts


def ending(name: str) -> str:
    return name.rpartition(".")[2]


def layer_of(name: str) -> int:
    """The number in a parameter's or a module's name; -1 outside the layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else -1


def linear_targets(table: ModuleTable) -> tuple[str, ...]:
    """Modules of the language model that LoRA can adapt: every Linear of attention and MLP.

    Never the vision tower, whose modules end in the same names, nor the projector, nor the head,
    nor the experts, which are no Linear modules.
    """
    return tuple(
        row.module
        for row in table.parameters
        if row.group in ("attention", "mlp") and row.quantizable
    )

"""Every key of a run's config, unjudged: its sections together, in the order of a written file."""

from engine.config.data_keys import DataKeys, LearningKeys, SequenceKeys
from engine.config.model_keys import AdapterKeys, ModelKeys
from engine.config.output_keys import OutputKeys, TrackerKeys
from engine.config.section import Section
from engine.config.training_keys import DistributedKeys, MemoryKeys, OptimizationKeys

SECTIONS: tuple[type[Section], ...] = (
    ModelKeys,
    DataKeys,
    LearningKeys,
    AdapterKeys,
    SequenceKeys,
    OptimizationKeys,
    MemoryKeys,
    DistributedKeys,
    OutputKeys,
    TrackerKeys,
)
"""In the order of the written file."""


def section_title(section: type[Section]) -> str:
    """Its heading in a written file: its docstring without the full stop."""
    return (section.__doc__ or "").removesuffix(".")


# pydantic collects the fields from the last base to the first, and a default may read the fields
# before it (learning_rate reads adapter): hence the reverse of SECTIONS.
class RunKeys(
    TrackerKeys,
    OutputKeys,
    DistributedKeys,
    MemoryKeys,
    OptimizationKeys,
    SequenceKeys,
    AdapterKeys,
    LearningKeys,
    DataKeys,
    ModelKeys,
):
    """The keys of one run."""

    def always_written(self) -> tuple[str, ...]:
        """Those for which Axolotl, which shares the format, has no default or another one."""
        keys: tuple[str, ...] = ("base_model", "learning_rate")
        if self.adapter:
            keys += ("lora_r", "lora_alpha")
            keys += ("lora_target_linear",) if self.lora_target_linear else ()
        return keys

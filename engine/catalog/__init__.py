"""What a model is made of, before any weight is read.

`cards` are the named models of presets/; `architecture` reads a name, a folder or a cached hub id,
refuses what may not be built and holds it against the model's card; `modules` is the one table of
parameters that everything that plans reads. `rows` makes it; it loads pydantic and is imported
where a table is made. No torch: tests prove the tables equal to the models that transformers
builds.
"""

from engine.catalog.architecture import (
    Architecture,
    Contradiction,
    UnknownModel,
    attention_factor,
    contradictions,
    read_architecture,
    repaired_rope,
    window_of,
    with_overrides,
)
from engine.catalog.cards import (
    ModelCard,
    TokenizerSpec,
    find_card,
    find_model,
    find_repository,
    list_models,
    model_names,
    official_sampling,
)
from engine.catalog.modules import ModuleTable, Parameter, linear_targets

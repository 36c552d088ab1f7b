"""What of a model is trained, by name and by count, before anything is loaded.

The trainer puts its adapter on exactly these modules and trains exactly these parameters. An entry
that matches nothing is refused, and none lands in the vision tower by its modules' endings, which
are the language model's.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from engine.catalog import ModuleTable, linear_targets
from engine.catalog.modules import Group, Parameter, ending, layer_of
from engine.config import RunConfig
from engine.config.finding import shown
from engine.errors import UserError
from engine.pattern import How, PatternError, find_matches
from engine.visible import visible

Matches: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
"""Each entry of a config's targets with the names that it matches."""
ALL_LINEAR = "lora_target_linear"
"""The entry of `count_targets` for every linear layer."""
VISION: dict[str, Group] = {"vision_tower": "vision", "multi_modal_projector": "projector"}
"""What an expression has to spell to reach beyond the language model."""


def linear_endings(table: ModuleTable, *, group: Group | None = None) -> list[str]:
    """Ends of the names of every linear layer that an adapter can sit on, as a config lists them.

    What `lora_target_linear` means where that key is not allowed: beside quantized experts. `group`
    leaves out the layers of the others.
    """
    modules = set(linear_targets(table))
    rows = (row for row in table.parameters if row.module in modules)
    return sorted({ending(row.module) for row in rows if group in (None, row.group)})


def choose_targets(table: ModuleTable, config: RunConfig) -> tuple[str, ...]:
    """Full names of the modules that get an adapter.

    A list in `lora_target_modules` matches ends of names, one text is a regular expression for the
    whole name, `lora_target_linear` adds every linear layer; all of them inside the language model
    only, unless the expression spells `vision_tower` or `multi_modal_projector`. Raises UserError
    for an entry that matches nothing.
    """
    found = _adapted(table, _modules(table, config)).names
    if not found and not config.lora_target_parameters:
        raise UserError(
            "The adapter would sit on no module at all.",
            "lora_target_linear is false and lora_target_modules names nothing.",
            "Leave both out to adapt every linear layer.",
        )
    return found


def choose_stacks(table: ModuleTable, config: RunConfig) -> tuple[str, ...]:
    """Full names of the fused expert tensors that get an adapter, in the model's order.

    Raises UserError for an entry of `lora_target_parameters` that matches none.
    """
    chosen = {name for _, names in _stacks(table, config) for name in names}
    return tuple(row.name for row in table.parameters if row.name in chosen) if chosen else ()


def choose_saved(table: ModuleTable, config: RunConfig) -> tuple[str, ...]:
    """Full names of the modules that are trained whole beside the adapter.

    A head that shares the embedding's weights is the embedding. Raises UserError for anything but
    those two.
    """
    if not config.lora_modules_to_save:
        return ()
    rows = {row.module: row for row in table.parameters if row.group in ("embedding", "head")}
    embedding = next(name for name, row in rows.items() if row.group == "embedding")
    found: dict[str, None] = {}
    for entry in config.lora_modules_to_save:
        named = [name for name in rows if _ends(name, entry)]
        if not named:
            raise UserError(
                f"lora_modules_to_save: {entry} cannot be trained whole beside an adapter.",
                f"Only {' and '.join(rows)} can; other matrices get an adapter.",
                "Write [embed_tokens, lm_head], or name the matrix in lora_target_modules.",
            )
        found |= dict.fromkeys(embedding if rows[name].tied else name for name in named)
    return tuple(found)


def count_targets(table: ModuleTable, config: RunConfig) -> dict[str, int]:
    """How many modules or expert tensors each entry of the config's targets matches.

    Raises UserError for an entry that matches nothing.
    """
    matches = (*_modules(table, config), *_stacks(table, config))
    return {entry: len(names) for entry, names in matches}


def adapter_parameters(table: ModuleTable, config: RunConfig) -> int:
    """Numbers in the adapter: rank x (inputs + outputs) of each adapted module and expert.

    DoRA adds one for each output of a module.
    """
    adapted = _adapted(table, _modules(table, config))
    linears = config.lora_r * adapted.edges + (adapted.outputs if config.peft_use_dora else 0)
    return linears + expert_adapter_parameters(table, config)


def adapter_inputs(table: ModuleTable, config: RunConfig) -> int:
    """Widths of what enters the adapted modules, added up: numbers of all A matrices at rank 1."""
    adapted = _adapted(table, _modules(table, config))
    return adapted.edges - adapted.outputs


def expert_adapter_parameters(table: ModuleTable, config: RunConfig) -> int:
    """Numbers of the adapter on the experts alone."""
    return config.lora_r * _fused(table, choose_stacks(table, config))[0]


def trainable_parameters(table: ModuleTable, config: RunConfig) -> int:
    adapter = adapter_parameters(table, config) if config.adapter else 0
    return adapter + _whole(table, config).numbers


def largest_trainable(table: ModuleTable, config: RunConfig) -> int:
    """Numbers of the largest trainable tensor: a weight, or one of the two factors of a module's
    or of a fused expert tensor's adapter."""
    whole = _whole(table, config).largest
    if not config.adapter:
        return whole
    longest = _adapted(table, _modules(table, config)).longest
    fused = _fused(table, choose_stacks(table, config))[1]
    return max(whole, config.lora_r * max(longest, fused))


def trains_head(table: ModuleTable, config: RunConfig) -> bool:
    """Whether the head's own weight is trained, or the embedding that it shares."""
    groups = _whole(table, config).groups
    return "head" in groups or (is_tied(table) and "embedding" in groups)


@lru_cache(maxsize=32)
def is_tied(table: ModuleTable) -> bool:
    return any(row.tied for row in table.parameters)


def trains_embedding(table: ModuleTable, config: RunConfig) -> bool:
    return "embedding" in _whole(table, config).groups


def trains_vision(table: ModuleTable, config: RunConfig) -> bool:
    """Whether anything of the vision tower or the projector is trained."""
    groups = _whole(table, config).groups
    if config.adapter:
        groups |= _adapted(table, _modules(table, config)).groups
    return not groups.isdisjoint(VISION.values())


class _Whole(NamedTuple):
    """The parameters that are trained themselves, a tied head not among them."""

    numbers: int
    largest: int
    """Numbers of the largest."""
    groups: frozenset[Group]


def _whole(table: ModuleTable, config: RunConfig) -> _Whole:
    if not config.adapter:
        return _named(table, trainable_names(table, config))
    return _named(table, frozenset(f"{module}.weight" for module in choose_saved(table, config)))


@lru_cache(maxsize=32)
def _named(table: ModuleTable, names: frozenset[str]) -> _Whole:
    rows = [row for row in table.parameters if row.name in names]
    counts = [row.count for row in rows]
    return _Whole(sum(counts), max(counts, default=0), frozenset(row.group for row in rows))


def trainable_names(table: ModuleTable, config: RunConfig) -> frozenset[str]:
    """Names of the parameters that a full fine-tune trains; a tied head goes by the embedding's.

    Without `unfrozen_parameters` that is the language model: tower and projector stay. An
    expression is held against the start of every name, and where none starts so, against the start
    of each part of the language model's names. Raises UserError for one that matches nothing.
    """
    expressions = config.unfrozen_parameters
    return _trainable(table, None if expressions is None else tuple(expressions))


@lru_cache(maxsize=32)
def _trainable(table: ModuleTable, expressions: tuple[str, ...] | None) -> frozenset[str]:
    language = [row for row in table.parameters if row.group not in VISION.values()]
    if expressions is None:
        return _names(table, language)
    found: list[Parameter] = []
    for expression in expressions:
        matches = _match("unfrozen_parameters", expression, table.parameters, "start")
        matches = matches or _match("unfrozen_parameters", expression, language, "part")
        if not matches:
            raise UserError(
                f"unfrozen_parameters: {expression} matches no parameter.",
                f"Names look like {table.parameters[-3].name}.",
                "Correct the expression; `model.layers.*` means all layers of a text model.",
            )
        found += matches
    return _names(table, found)


def _match(key: str, expression: str, rows: Sequence[Parameter], how: How) -> list[Parameter]:
    found = set(_match_names(key, expression, tuple(row.name for row in rows), how))
    return [row for row in rows if row.name in found]


def _match_names(
    key: str, expression: str, names: tuple[str, ...], how: How = "whole"
) -> tuple[str, ...]:
    """The names that a config's expression matches; UserError where it is no usable one."""
    try:
        return find_matches(expression, names, how)
    except PatternError as error:
        raise UserError(
            f"{key} is not a regular expression that is read: {shown(expression)}",
            visible(str(error), one_line=True),
            "Correct it, or give a list of endings such as [q_proj, v_proj].",
        ) from error


def _names(table: ModuleTable, rows: Iterable[Parameter]) -> frozenset[str]:
    """The rows' names, a tied head's replaced by the embedding's."""
    embedding = next(row.name for row in table.parameters if row.group == "embedding")
    return frozenset(embedding if row.tied else row.name for row in rows)


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


class _Adapted(NamedTuple):
    """The linear layers that get an adapter."""

    names: tuple[str, ...]
    edges: int
    """Inputs plus outputs of all."""
    outputs: int
    longest: int
    """The most inputs or outputs of one."""
    groups: frozenset[Group]


@lru_cache(maxsize=128)
def _adapted(table: ModuleTable, matches: Matches) -> _Adapted:
    names = dict.fromkeys(name for _, names in matches for name in names)
    rows = [row for row in table.parameters if row.quantizable and row.module in names]
    shapes = [row.shape for row in rows]
    return _Adapted(
        tuple(names),
        sum(map(sum, shapes)),
        sum(shape[0] for shape in shapes),
        max(map(max, shapes), default=0),
        frozenset(row.group for row in rows),
    )


@lru_cache(maxsize=32)
def _fused(table: ModuleTable, names: tuple[str, ...]) -> tuple[int, int]:
    """Of fused expert tensors, (experts, outputs, inputs): inputs plus outputs of each expert, and
    the most inputs or outputs of all experts of one tensor."""
    shapes = [row.shape for row in table.parameters if row.name in names]
    edges = sum(experts * (outputs + inputs) for experts, outputs, inputs in shapes)
    return edges, max((shape[0] * max(shape[1:]) for shape in shapes), default=0)


def _modules(table: ModuleTable, config: RunConfig) -> Matches:
    entries = config.lora_target_modules
    named = tuple(entries) if isinstance(entries, list | tuple) else entries
    return _find(table, config.lora_target_linear, named, _layers(config))


def _stacks(table: ModuleTable, config: RunConfig) -> Matches:
    entries = config.lora_target_parameters or ()
    endings = (entries,) if isinstance(entries, str) else tuple(entries)
    return _find_stacks(table, endings, _layers(config))


def _layers(config: RunConfig) -> tuple[int, ...] | None:
    layers = config.peft_layers_to_transform
    if layers is None:
        return None
    return (layers,) if isinstance(layers, int) else tuple(layers)


# Kept, since every keystroke of the wizard makes a plan.
@lru_cache(maxsize=128)
def _find(
    table: ModuleTable,
    every: bool,
    named: str | tuple[str, ...] | None,
    layers: tuple[int, ...] | None,
) -> Matches:
    modules = _in_layers(linear_targets(table), layers)
    found = [(ALL_LINEAR, modules)] if every else []
    if isinstance(named, str):
        spelled = [group for word, group in VISION.items() if word in named]
        seeing = (r.module for r in table.parameters if r.quantizable and r.group in spelled)
        reachable = (*modules, *seeing)
        if not (matches := _match_names("lora_target_modules", named, reachable)):
            raise _no_match(named, reachable)
        return (*found, (named, matches))
    for entry in named or ():
        matches = tuple(name for name in modules if _ends(name, entry))
        if not matches:
            raise _no_match(entry, modules)
        found.append((entry, matches))
    return tuple(found)


@lru_cache(maxsize=32)
def _find_stacks(
    table: ModuleTable, endings: tuple[str, ...], layers: tuple[int, ...] | None
) -> Matches:
    names = tuple(row.name for row in table.parameters if row.group == "experts")
    found = []
    for entry in endings:
        matches = tuple(n for n in _in_layers(names, layers) if _ends(n, entry)) if names else ()
        if not matches:
            raise UserError(
                f"lora_target_parameters: {entry} matches no expert tensor.",
                f"They are called {names[0]} and so on." if names else "The model has no experts.",
                "Write [mlp.experts.gate_up_proj, mlp.experts.down_proj]."
                if names
                else "Remove lora_target_parameters.",
            )
        found.append((entry, matches))
    return tuple(found)


def _in_layers(names: tuple[str, ...], layers: tuple[int, ...] | None) -> tuple[str, ...]:
    """Those of the language model's `names` in `layers`; UserError for a layer it has not."""
    if layers is None:
        return names
    numbers = [layer_of(name) for name in names]
    if missing := sorted(set(layers) - set(numbers)):
        raise UserError(
            f"peft_layers_to_transform: there is no layer {missing[0]}.",
            f"The model's layers are numbered from {min(numbers)} to {max(numbers)}.",
            "Correct the number, or leave peft_layers_to_transform out to adapt all layers.",
        )
    return tuple(name for name, number in zip(names, numbers, strict=True) if number in layers)


def _no_match(entry: str, modules: tuple[str, ...]) -> UserError:
    endings = sorted({ending(name) for name in modules})
    return UserError(
        f"lora_target_modules: {entry} matches no module of the language model.",
        f"Its linear layers are called {', '.join(endings)}, under names such as {modules[0]}.",
        "Use those names, or leave lora_target_modules out to adapt all of them.",
    )

"""The named models: each file of presets/models as a typed card.

A card also says what no config.json does: the licence, the tokenizer, how the model thinks and is
sampled, and where each fact comes from. Files are read when first asked for, and once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from engine.errors import UserError
from engine.files import read_preset
from engine.visible import visible

Confidence = Literal["high", "medium", "low"]


@dataclass(frozen=True, slots=True)
class Repository:
    """One place on the hub that holds weights of the model."""

    id: str
    variant: Literal["instruct", "base", "reasoning"]
    checkpoint: Literal["bf16", "fp8"]


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """Which tokenizer the model speaks, enough to make it without a download."""

    version: str
    """Tekken version, such as v11 or v15."""
    think: bool = False
    """Whether [THINK] and [/THINK] are tokens."""
    image: tuple[int, int, int] | None = None
    """Patch size and largest side in pixels, patches merged a side; None reads no images."""
    settings: bool = False
    """Whether settings, such as the reasoning effort, go to the model in tokens."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Official generation settings; None where the model's page says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None


GREEDY = Sampling(temperature=0.0, top_p=1.0)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a fact of the card comes from, and how sure it is."""

    fact: str
    link: str
    confidence: Confidence
    keys: tuple[str, ...] = ()
    """Of the text model's config, those that it vouches for: a config.json that says otherwise is
    contradicted where the confidence is high. A section stands for all that is in it."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model of the catalog."""

    name: str
    """What a person types."""
    title: str
    description: str
    repositories: tuple[Repository, ...]
    """The first is what the name stands for; none means that the model is made here."""
    licence: str
    context_tokens: int
    modalities: tuple[Literal["text", "vision"], ...]
    thinking: Literal["none", "text tags", "tokens", "effort"]
    tokenizer: TokenizerSpec
    sampling: Mapping[Literal["answering", "thinking"], Sampling]
    config: Mapping[str, Any]
    """The content of config.json, shared by all readers: copy it before changing it."""
    sources: tuple[Source, ...]
    corrected: Mapping[str, Any] = field(default_factory=dict)
    """By key of the text model's config, what its makers published at first and corrected since: a
    copy of the weights may still have it."""
    notes: tuple[str, ...] = ()
    offered: bool = True
    """Whether lists offer it; the vision demo's base is of use to that demo alone."""

    @property
    def hub_id(self) -> str | None:
        """The repository that a run loads: the first in bfloat16, which FP8 was rounded from, else
        the first; None where the model is made here."""
        ordered = sorted(self.repositories, key=lambda repository: repository.checkpoint != "bf16")
        return ordered[0].id if ordered else None


@cache
def model_names() -> tuple[str, ...]:
    """The catalog's names in alphabetical order."""
    folder = files("presets") / "models"
    return tuple(sorted(f.name[:-4] for f in folder.iterdir() if f.name.endswith(".yml")))


def find_model(name: str) -> ModelCard:
    """The card of a catalog name.

    Raises UserError with the nearest names where there is no such model.
    """
    if name not in model_names():
        # Three, since `ministral-3b` is as close to the 8B's name as to the 3B's.
        near = get_close_matches(name.lower(), model_names(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"There is no model named {visible(name, one_line=True)}.",
            "It is neither a name of the catalog nor a folder nor a hub id like org/name.",
            f"{hint}`windtunnel models` lists the names; any other Mistral model is given by its"
            " folder or its hub id, such as mistralai/Devstral-Small-2507.",
        )
    return _read_card(name)


def list_models() -> tuple[ModelCard, ...]:
    """All cards, in the order of their names."""
    return tuple(_read_card(name) for name in model_names())


def find_repository(repo_id: str) -> tuple[ModelCard, Repository] | None:
    """The card that lists a hub id, with its entry there; None where no card does."""
    for card in list_models():
        for repository in card.repositories:
            if repository.id == repo_id:
                return card, repository
    return None


def find_card(base_model: str) -> ModelCard | None:
    """The card of a catalog name or of a hub id that a card lists; None for anything else."""
    return _find(base_model)[0]


def _find(base_model: str) -> tuple[ModelCard | None, Repository | None]:
    """The same with the repository that is meant, where there is one."""
    if base_model in model_names():
        card = find_model(base_model)
        return card, next(iter(card.repositories), None)
    return find_repository(base_model) or (None, None)


@cache
def _read_card(name: str) -> ModelCard:
    # Imported here so that `import engine.catalog` stays light.
    from pydantic import TypeAdapter

    content = {"name": name, **read_preset("models", f"{name}.yml")}
    return TypeAdapter(ModelCard).validate_python(content)


def official_sampling(base_model: str, reasoning_effort: str | None = None) -> Sampling:
    """The official settings for an answer of a catalog name or hub id; greedy where none are known.

    A model that thinks on request thinks unless the effort is absent or `none`; of one that comes
    in two variants the reasoning one thinks. Only `max_tokens` may be None in what is returned.
    """
    card, repository = _find(base_model)
    if card is None:
        return GREEDY
    thinks = repository is not None and repository.variant == "reasoning"
    if card.thinking == "effort":
        thinks = reasoning_effort not in (None, "none")
    answering, thinking = card.sampling.get("answering"), card.sampling.get("thinking")
    said = (thinking or answering if thinks else answering or thinking) or GREEDY
    if said.temperature is None:
        return Sampling(0.0, 1.0, said.max_tokens)
    return Sampling(said.temperature, said.top_p or 1.0, said.max_tokens)

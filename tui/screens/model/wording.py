"""How a model is told: one line of the list, and why it is the one or not.

Pure: from plans to text. Every size is the planner's; only the download is counted here, from the
number of parameters and how the repository stores them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from textual.content import Content

from engine.catalog import Architecture, ModelCard
from engine.plan import WEIGHTS, Device, Recommendation
from engine.units import GIB, gib
from engine.visible import visible
from engine.wizard.draft import reads_images
from tui.screens.machine.prospects import TITLE_CELLS, mark_of, method, title_cells

TITLE: Final = f"{'models':<{TITLE_CELLS + 8}}{'needs':>6}  verdict     reads  thinks   download"
OWN: Final = "own folder or hub id"

_STORED_BYTES: Final = {"bf16": 2, "fp8": 1}
_PLAN_ONLY: Final = "Preview, plan and save work; the start does not."
_THINKS: Final = {"none": "-", "text tags": "<think>", "tokens": "[THINK]", "effort": "on/off"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model on the page: its plan on the device, and what is known beside it."""

    name: str
    """What the config will say: a catalog name, or what was typed."""
    title: str
    plan: Recommendation
    card: ModelCard | None = None
    architecture: Architecture | None = None
    """Of a model that was typed."""
    shows_images: bool = False
    """Whether rows that were read have images."""

    @property
    def sees(self) -> bool:
        """Whether it reads images."""
        if self.architecture:
            return reads_images(self.architecture)
        return self.card is not None and "vision" in self.card.modalities

    @property
    def is_blind(self) -> bool:
        """Whether the rows have images that it cannot read."""
        return self.shows_images and not self.sees

    @property
    def doubt(self) -> str:
        """Why a person is asked again before it is taken; empty where it can be trained here."""
        needs = self.plan.estimate
        if self.plan.not_trained:
            return f"This version cannot train it. {self.plan.not_trained} {_PLAN_ONLY}"
        if needs.verdict == "does not fit":
            given = gib(needs.can_give_bytes)
            return f"It needs {gib(needs.device_bytes)}, and {given} can be given. {_PLAN_ONLY}"
        if self.is_blind:
            return "It reads only text, and the rows have images: those rows would be left out."
        return ""


def verdict_words(plan: Recommendation) -> str:
    """The verdict on the device in a few letters: fits, tight, slow, 46.1 over, plan only."""
    needs = plan.estimate
    if needs.verdict == "does not fit":
        return f"{-needs.spare_bytes / GIB:.1f} over"
    if plan.not_trained:
        return "plan only"
    return "slow" if plan.config.layer_offloading and needs.verdict == "fits" else needs.verdict


def model_line(candidate: Candidate, cached: Collection[str]) -> Content:
    """One line of the list; `cached` are the names of models that are on this computer."""
    card, plan = candidate.card, candidate.plan
    mark, style = mark_of(plan)
    verdict = verdict_words(plan)
    if candidate.is_blind:
        mark, style, verdict = "✗", "$muted", "no images"
    reads = "image" if candidate.sees else "text"
    thinks = "-" if card is None else _THINKS[card.thinking]
    return Content.assemble(
        title_cells(candidate.title).stylize("$muted" if candidate.is_blind else ""),
        f" {size(plan.estimate.total_parameters):>6}",
        f"{plan.estimate.device_bytes / GIB:>6.1f}  ",
        (f"{mark} {verdict:<10}", style),
        (f"{reads:<7}{thinks:<9}{_where_from(candidate, cached)}", "$muted"),
    )


def size(parameters: int) -> str:
    """A number of parameters as people say it: 24.0B."""
    if parameters < 10**9:
        return f"{parameters / 10**6:.1f}M"
    return f"{parameters / 10**9:.1f}B"


def _where_from(candidate: Candidate, cached: Collection[str]) -> str:
    card = candidate.card
    if candidate.name in cached or (candidate.architecture and candidate.architecture.folder):
        return "on disk"
    if card is None or not card.repositories:
        return "made here"
    stored = _STORED_BYTES[card.repositories[0].checkpoint]
    return f"{candidate.plan.estimate.total_parameters * stored / 1e9:.0f} GB"


def headline(candidate: Candidate, device: Device, proposed: str) -> tuple[str, str, str]:
    """Mark, the model's title, and the verdict on the device in one sentence."""
    mark, _ = mark_of(candidate.plan)
    needs = candidate.plan.estimate
    given = f"{needs.device_bytes / GIB:.1f} of {gib(needs.can_give_bytes)}"
    title = visible(candidate.title, one_line=True)
    if candidate.plan.not_trained:
        return mark, title, "can be planned and previewed, and is not trained yet"
    if needs.verdict == "does not fit":
        return mark, title, f"does not fit: needs {given}"
    if candidate.is_blind:
        return "✗", title, "reads only text, and the rows have images"
    if candidate.plan.config.layer_offloading:
        return mark, title, f"fits with layers in RAM, slow: needs {given}"
    if candidate.name != proposed:
        return mark, title, f"{needs.verdict}: needs {given}"
    if device.kind == "cpu":
        return mark, title, "made here, and trains in about a minute on this CPU"
    return mark, title, f"largest that fits: needs {given}"


def why(candidate: Candidate, device: Device, others: Sequence[Candidate]) -> Content:
    """Sizes, needs, thinking and licence of a model, and what else is good on the device."""
    plan, card = candidate.plan, candidate.card
    parts = [_sizes(candidate, device)]
    if plan.not_trained:
        parts.append(f"Not trained yet: {plan.not_trained}")
    if card:
        parts.append(f"{card.description} {_tokenizer(card)}")
        parts.append(" ".join([f"Licence {card.licence}.", *card.notes]))
    if candidate.architecture:
        parts += candidate.architecture.notes
    if others:
        named = ", ".join(
            f"{other.title} ({other.plan.estimate.device_bytes / GIB:.1f} GiB)" for other in others
        )
        parts.append(f"Also good here: {named}.")
    return Content("\n").join(Content(visible(part, one_line=True)) for part in parts)


def _sizes(candidate: Candidate, device: Device) -> str:
    plan, needs = candidate.plan, candidate.plan.estimate
    held = "In 4 bit" if plan.config.load_in_4bit else "Not quantized,"
    rank = f" at rank {plan.config.lora_r}" if plan.config.adapter else ""
    return (
        f"{size(needs.total_parameters)} parameters. {held} the weights take"
        f" {_weights(candidate)}; with {method(plan)}{rank} and {needs.tokens_at_once:,} tokens at"
        f" once the run needs {needs.device_bytes / GIB:.1f} ± {needs.uncertainty:.0%} of the"
        f" {gib(needs.can_give_bytes)} that {device.name} can give."
    )


def _weights(candidate: Candidate) -> str:
    parts = candidate.plan.estimate.parts
    held = sum(parts.get(name, 0) for name in WEIGHTS)
    return gib(held) if held >= GIB / 10 else f"{held / 2**20:.0f} MiB"


def _tokenizer(card: ModelCard) -> str:
    thinks = "" if card.thinking == "none" else f", thinks with {_THINKS[card.thinking]}"
    context = f"{card.context_tokens:,} tokens of context"
    return f"Tokenizer {card.tokenizer.version}{thinks}, {context}."

"""The second step: the model that the run starts from, each with what it comes to on the device."""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from engine.catalog import Architecture, ModelCard, read_architecture
from engine.chat.tokenizer_file import check_tokenizer
from engine.errors import UserError
from engine.plan import Device, Place, Prospect, Recommendation, propose, recommend, survey
from engine.report import Line
from engine.report.plan import method, model_verdict, size, weights_sentence
from engine.units import GIB, gib
from engine.wizard.draft import Draft, reads_images
from engine.wizard.question import Choice, Confirm, Question, Step, Work

OWN: Final = "own"
"""A folder or hub id, named in the text."""
OWN_LABEL: Final = "own folder or hub id"
OWN_REASON: Final = "A folder with config.json of a model that is trained here, or a hub id."
PLANNING: Final = "working out what fits…"
HELP: Final = (
    ("needs", "GiB on the device at the peak, with the recommended values"),
    ("tight", "less than 1 GiB would be left"),
    ("plan only", "fits, and this version cannot train it yet"),
    ("reads", "image: text too; no images: the rows have some, and it reads only text"),
    ("thinks", "[THINK] are tokens, <think> is plain text, on/off is asked for"),
    ("download", "the weights, once; on disk: in the hub cache already"),
)
OWN_HELP: Final = (
    ("folder", "one that holds config.json and the weights"),
    ("org/name", "a repository that the hub cache or the catalog knows"),
    ("", "nothing is fetched, and no code of a model is ever run"),
)
_ALSO_GOOD: Final = 2
_STORED_BYTES: Final = {"bf16": 2, "fp8": 1}
_PLAN_ONLY: Final = "Preview, plan and save work; the start does not."
_THINKS: Final = {"none": "-", "text tags": "<think>", "tokens": "[THINK]", "effort": "on/off"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model: its plan on the device, and what is known beside it."""

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
        if self.architecture:
            return reads_images(self.architecture)
        return self.card is not None and "vision" in self.card.modalities

    @property
    def is_blind(self) -> bool:
        return self.shows_images and not self.sees

    @property
    def thinks(self) -> str:
        """How it marks its thinking."""
        return "-" if self.card is None else _THINKS[self.card.thinking]

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

    def verdict(self) -> Line:
        """Its verdict on the device, or that it cannot read the rows."""
        found = model_verdict(self.plan)
        if self.is_blind:
            return Line("✗", "no images", "reads only text, and the rows have images")
        return found


@dataclass(frozen=True, slots=True)
class Survey:
    """Every model of the catalog on one device, the one to begin with, and which are here."""

    device: Device
    prospects: tuple[Prospect, ...]
    proposed: Prospect
    cached: frozenset[str] = frozenset()

    def holds_for(self, device: Device) -> bool:
        """Whether a device can give what it could then, but for less than a tight plan spares."""
        return abs(self.device.can_give_bytes - device.can_give_bytes) < GIB


class ModelStep(Step):
    """Which model. Own ones are candidates, too, once they were read."""

    title = "Model"

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._surveys: list[Survey] = []
        self._own: dict[str, tuple[Device, Candidate]] = {}

    def work(self) -> Work | None:
        device = self._draft.device
        return None if device is None or self.found(device) else self.survey(device)

    def survey(self, device: Device) -> Work:
        """Planning every model on a device: half a second."""

        def look(_progress: object) -> Survey:
            prospects = survey(device)
            cached = _find_cached([prospect.card for prospect in prospects])
            return Survey(device, prospects, propose(prospects, device), cached)

        return Work(self.title, (device,), PLANNING, look)

    def receive(self, _work: Work, result: object) -> None:
        assert isinstance(result, Survey)
        self._surveys.append(result)

    def found(self, device: Device) -> Survey | None:
        """What is known of a device already."""
        return next((found for found in self._surveys if found.device == device), None)

    def last(self, device: Device) -> Survey | None:
        """What was found last for that card, whatever of it was used then."""

        def named(card: Device) -> tuple[object, ...]:
            return card.name, card.uuid, card.count

        same = (each for each in reversed(self._surveys) if named(each.device) == named(device))
        return next(same, None)

    def forget(self) -> None:
        """Have every device planned for anew."""
        self._surveys.clear()

    def question(self) -> Question:
        """Every model of the catalog, the smallest first, then a folder or hub id of one's own."""
        found, candidates = self._survey, self.candidates()
        choices = [self._choice(candidate) for candidate in candidates]
        choices.append(
            Choice(
                OWN,
                OWN_LABEL,
                reason=OWN_REASON,
                asks="a folder, or org/name",
                completes="model",
            )
        )
        names = [candidate.name for candidate in candidates]
        wanted = self._draft.model if self._draft.model in names else found.proposed.card.name
        place = names.index(wanted)
        return Question(self.verdict(candidates[place]), tuple(choices), place)

    def candidates(self) -> list[Candidate]:
        """The models of the list, marked where they cannot read the images of the rows.

        Own models that were read are among them, planned again where the device is another.
        """
        found = self._survey
        listed = [Candidate(p.card.name, p.card.title, p.plan, p.card) for p in found.prospects]
        names = {candidate.name for candidate in listed}
        for name in dict.fromkeys((self._draft.model, *self._own)):
            if name is not None and name not in names:
                with suppress(UserError):  # its folder is gone
                    listed.append(self.read_own(name))
        return [replace(each, shows_images=self._draft.shows_images) for each in listed]

    def read_own(self, name: str) -> Candidate:
        """A model that was typed, on the draft's device.

        Raises UserError where its shape or its tokenizer cannot be read.
        """
        device = self._survey.device
        if name not in self._own or self._own[name][0] != device:
            self._own.pop(name, None)
            architecture = read_architecture(name)
            check_tokenizer(name)
            plan = recommend(Place(architecture, device))
            own = Candidate(name, name, plan, architecture.card, architecture)
            self._own[name] = device, own
        return replace(self._own[name][1], shows_images=self._draft.shows_images)

    def where_from(self, candidate: Candidate) -> str:
        if candidate.name in self._survey.cached:
            return "on disk"
        if candidate.architecture and candidate.architecture.folder:
            return "on disk"
        if candidate.card is None or not candidate.card.repositories:
            return "made here"
        stored = _STORED_BYTES[candidate.card.repositories[0].checkpoint]
        return f"{candidate.plan.estimate.total_parameters * stored / 1e9:.0f} GB"

    def verdict(self, candidate: Candidate) -> Line:
        """The model's title and its verdict on the device in one sentence."""
        found, needs = self._survey, candidate.plan.estimate
        line = candidate.verdict()
        given = f"{needs.device_bytes / GIB:.1f} of {gib(needs.can_give_bytes)}"
        text = line.text
        if line.label in ("fits", "tight"):
            text = f"{line.label}: needs {given}"
            if candidate.name == found.proposed.card.name:
                text = f"largest that fits: needs {given}"
                if found.device.kind == "cpu":
                    text = "made here, and trains in about a minute on this CPU"
        elif line.label.endswith("over"):
            text = f"does not fit: needs {given}"
        return Line(line.mark, candidate.title, text)

    def reason(self, candidate: Candidate) -> str:
        """Sizes, needs, thinking and licence of a model, and what else is good on the device."""
        plan, card = candidate.plan, candidate.card
        parts = [_sizes(candidate, self._survey.device)]
        if plan.not_trained:
            parts.append(f"Not trained yet: {plan.not_trained}")
        if card:
            parts.append(f"{card.description} {_tokenizer(candidate, card)}")
            parts.append(" ".join([f"Licence {card.licence}.", *card.notes]))
        if candidate.architecture:
            parts += candidate.architecture.notes
        if others := self._also_good(candidate):
            named = ", ".join(
                f"{other.title} ({gib(other.plan.estimate.device_bytes)})" for other in others
            )
            parts.append(f"Also good here: {named}.")
        return "\n".join(parts)

    def confirm(self, key: str, text: str) -> Confirm | None:
        """Whether a model is planned all the same that cannot be trained here."""
        candidate = self._candidate(key, text)
        if not candidate.doubt:
            return None
        title = f"plan {candidate.title} anyway?"
        return Confirm(title, candidate.doubt, "plans it", "goes back to the list")

    def take(self, key: str, text: str) -> bool:
        """Start from a model of the list, or from the one that is named in the text."""
        name = self._candidate(key, text).name
        if self._draft.model != name:
            self._draft.model, self._draft.statistics, self._draft.counted = name, None, None
        return True

    @property
    def _survey(self) -> Survey:
        found = self.found(self._draft.chosen_device())
        assert found is not None  # `work` is done first
        return found

    def _candidate(self, key: str, text: str) -> Candidate:
        name = text if key == OWN else key
        listed = (candidate for candidate in self.candidates() if candidate.name == name)
        return next(listed, None) or self.read_own(name)

    def _choice(self, candidate: Candidate) -> Choice:
        needs = candidate.plan.estimate
        note = (
            f"{size(needs.total_parameters)}, needs {gib(needs.device_bytes)} with"
            f" {method(candidate.plan)}, {self.where_from(candidate)}"
        )
        return Choice(
            candidate.name,
            candidate.title,
            note,
            candidate.verdict(),
            self.reason(candidate),
        )

    def _also_good(self, candidate: Candidate) -> list[Candidate]:
        if self._survey.device.kind != "cuda":
            return []
        others = [
            each for each in self.candidates() if each.name != candidate.name and not each.doubt
        ]
        others.sort(key=lambda each: -each.plan.estimate.total_parameters)
        return others[:_ALSO_GOOD]


def _find_cached(cards: list[ModelCard]) -> frozenset[str]:
    from huggingface_hub import try_to_load_from_cache

    return frozenset(
        card.name
        for card in cards
        for repository in card.repositories[:1]
        if isinstance(try_to_load_from_cache(repository.id, "config.json"), str)
    )


def _sizes(candidate: Candidate, device: Device) -> str:
    plan, needs = candidate.plan, candidate.plan.estimate
    rank = f" at rank {plan.config.lora_r}" if plan.config.adapter else ""
    each = f"each of {needs.cards} " if needs.cards > 1 else ""
    return (
        f"{size(needs.total_parameters)} parameters. {weights_sentence(plan)};"
        f" with {method(plan)}{rank} and {needs.tokens_at_once:,} tokens at once the run needs"
        f" {needs.device_bytes / GIB:.1f} ± {needs.uncertainty:.0%} of the"
        f" {gib(needs.can_give_bytes)} that {each}{device.name} can give."
    )


def _tokenizer(candidate: Candidate, card: ModelCard) -> str:
    thinks = "" if card.thinking == "none" else f", thinks with {candidate.thinks}"
    context = f"{card.context_tokens:,} tokens of context"
    return f"Tokenizer {card.tokenizer.version}{thinks}, {context}."

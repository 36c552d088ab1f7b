"""What the person has answered so far, and the config that follows from it.

Pure state, without Textual: every page writes its answer here, and reads the same recommendation.
A value that the person chose is kept in `changes` and never recommended over.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from engine.catalog import Architecture, read_architecture
from engine.chat.tokenizer_file import check_tokenizer, tokenizer_name
from engine.config import ConfigFile, DatasetConfig, RunConfig, write_config
from engine.data.sources import with_absolute_paths
from engine.errors import UserError
from engine.hardware import Machine
from engine.plan import Device, Recommendation, Statistics, assess, plan_document, recommend

_FOLLOWS: Final[Mapping[str, tuple[str, ...]]] = {"adapter": ("load_in_4bit",)}
"""Keys that a change of another key takes along."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What a count of rows holds for."""

    which: str
    """The rows and the tokenizer."""
    switches: str
    """What becomes of each row, and what of it is learned."""


@dataclass(slots=True)
class Draft:
    """The answers of one wizard."""

    machine: Machine | None = None
    device: Device | None = None
    """Where the run is to compute; chosen on the Machine page."""
    model: str | None = None
    """Catalog name, hub id or folder."""
    dataset: DatasetConfig | None = None
    statistics: Statistics | None = None
    """Of the dataset under the model's tokenizer."""
    counted: Counted | None = None
    """What `statistics`, or the reason why there are none, hold for."""
    uncounted: str = ""
    """Why the plan is without its rows, or with those of other switches, in a few words."""
    shows_images: bool = False
    """Whether rows that were read have images; the tokenizer of a text model cannot say."""
    changes: dict[str, object] = field(default_factory=dict)
    """Values that the person chose, by key of the config."""
    name: str | None = None
    """Of the run; None follows from dataset and model."""
    opened: ConfigFile | None = None
    """The file that the wizard was opened on: its text and comments are kept."""
    path: Path | None = None
    """Where that file lies, as it was named; None once its text was edited here."""
    own: RunConfig | None = None
    """What that file says, its paths absolute: nothing is recommended over it."""
    _made: tuple[object, Recommendation] | None = field(default=None, repr=False, compare=False)

    def change(self, key: str, value: object) -> None:
        """Keep a value that the person chose."""
        self.changes[key] = value

    def reset(self, key: str) -> None:
        """Go back to the recommended value."""
        self.changes.pop(key, None)
        for other in _FOLLOWS.get(key, ()):
            self.changes.pop(other, None)

    def architecture(self) -> Architecture:
        """Of the chosen model. Raises UserError where it cannot be read."""
        if self.model is None:
            raise UserError(
                "No model is chosen.", "The plan follows from it.", "Choose one on the Model page."
            )
        return read_architecture(self.model)

    @property
    def is_blind(self) -> bool:
        """Whether the rows have images and the model reads only text."""
        return self.shows_images and not reads_images(self.architecture())

    def advice(self) -> Recommendation:
        """The recommendation for the answers so far, the person's values in it.

        Raises UserError where an answer is missing or where values contradict each other.
        """
        if self.device is None:
            raise UserError(
                "No device is chosen.",
                "What fits depends on it.",
                "Choose one on the Machine page.",
            )
        state = (
            self.model,
            self.device,
            self.statistics,
            repr(self.dataset),
            repr(sorted(self.changes.items())),
        )
        if self._made is None or self._made[0] != state:
            self._made = (state, self._advise(self.device))
        return self._made[1]

    def _advise(self, device: Device) -> Recommendation:
        if self.own is None:
            return recommend(
                self.architecture(),
                device,
                self.statistics,
                dataset=self.dataset,
                fixed=self.changes,
            )
        changes = dict(self.changes)
        if self.model != self.own.base_model:
            changes["base_model"] = self.model
        if self.dataset is not None and self.dataset not in self.own.datasets:
            changes["datasets"] = (self.dataset,)
        architecture = self.architecture()
        return assess(self.own, architecture, device, self.statistics, changes=changes)

    def look_again(self) -> None:
        """Make the plan anew: something was measured meanwhile."""
        self._made = None

    def config(self) -> RunConfig:
        """The recommended values with the person's changes. Raises what `advice` raises."""
        return self.advice().config

    def take(self, other: "Draft") -> None:
        """Become another draft: every page holds this one."""
        for name in self.__slots__:
            setattr(self, name, getattr(other, name))

    def run_name(self) -> str:
        """The run's name: the person's, else from the dataset and the model."""
        if self.name:
            return self.name
        data = self.dataset.path.removeprefix("sample:") if self.dataset else "run"
        words = (Path(data).stem, Path(self.model or "").name)
        shown = "-".join(word for word in words if word)
        kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in shown)
        return kept.strip("-._")[:80] or "run"

    def config_text(self, config: RunConfig | None = None) -> str:
        """config.yml as it would be written: the reason of each value beside it.

        `config` may hold the same values with other paths. A file that the wizard was opened on
        keeps its own text and comments.
        """
        advice = self.advice()
        reasons = {key: text for key, text in advice.reasons.items() if key != "datasets"}
        document = self.opened.document if self.opened else None
        return write_config(config or advice.config, reasons, document=document)

    def plan(self) -> dict[str, object]:
        """The content of plan.json."""
        advice = self.advice()
        assert self.device is not None
        return plan_document(advice.estimate, self.device, advice.reasons)


def reads_images(architecture: Architecture) -> bool:
    """Whether the model has a vision tower."""
    return architecture.table.counts_by_group()["vision"] > 0


def is_named_by_path(dataset: DatasetConfig) -> bool:
    """Whether a command can name it by its path alone, as no column of it is mapped."""
    return dataset == DatasetConfig(path=dataset.path)


def draft_from(file: ConfigFile, folder: Path) -> Draft:
    """The answers in a config file of `folder`, which stays as it is but for what is changed.

    Raises UserError where a key of it would not be acted on, and where rows cannot be rendered by
    its model's tokenizer.
    """
    file.require_supported()
    config = with_absolute_paths(file.config, folder)
    check_tokenizer(tokenizer_name(config), folder)
    draft = Draft(model=config.base_model, opened=file, own=config)
    draft.dataset = config.datasets[0] if config.datasets else None
    return draft

"""What the person has answered so far, the config that follows from it, and its rows, counted.

Pure state, without Textual: every page writes its answer here, and reads the same recommendation.
A value that the person chose is kept in `changes` and never recommended over; every printer takes
and refuses the same texts for one, as a config file does. Each answer can change what a row
becomes: another model, another dataset, images of another size, an edited file. Whoever shows a
plan asks for the rows first, and says why they are not counted: rows that are not here, on the hub,
or too many to read before an answer leave `sequence_len` to count with.
"""

import json
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.catalog import Architecture, read_architecture
from engine.chat.tokenizer_file import check_tokenizer, tokenizer_name
from engine.config import (
    FULL,
    NONE,
    ConfigFile,
    DatasetConfig,
    RunConfig,
    override,
    require_supported,
    spell,
    write_config,
)
from engine.data.sources import with_absolute_paths
from engine.data.statistics import Checkup
from engine.errors import UserError, WorkError
from engine.hardware import Machine
from engine.plan import Device, Place, Recommendation, Statistics, assess, plan_document, recommend
from engine.runs.comparison import LABEL_KEYS, RENDER_KEYS
from engine.visible import visible

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
        return self.shows_images and not reads_images(self.architecture())

    def advice(self) -> Recommendation:
        """The recommendation for the answers so far, the person's values in it.

        Raises UserError where an answer is missing or where values contradict each other.
        """
        state = (
            self.model,
            self.device,
            self.statistics,
            repr(self.dataset),
            repr(sorted(self.changes.items())),
        )
        if self._made is None or self._made[0] != state:
            self._made = (state, self._advise())
        return self._made[1]

    def chosen_device(self) -> Device:
        """Raises UserError where none is."""
        if self.device is None:
            raise UserError(
                "No device is chosen.",
                "What fits depends on it.",
                "Choose one on the Machine page.",
            )
        return self.device

    def place(self) -> Place:
        """What is planned for. Raises UserError where device or model is missing."""
        device = self.chosen_device()
        return Place(self.architecture(), device, self.statistics)

    def _advise(self) -> Recommendation:
        place = self.place()
        if self.own is None:
            return recommend(place, dataset=self.dataset, fixed=self.changes)
        changes = dict(self.changes)
        if self.model != self.own.base_model:
            changes["base_model"] = self.model
        if self.dataset is not None and self.dataset not in self.own.datasets:
            changes["datasets"] = (self.dataset,)
        return assess(self.own, place, changes=changes)

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


EXPERTS: Final = "experts"
"""lora_target_parameters as the page says it: the adapter sits on every expert."""


def expert_tensors(architecture: Architecture) -> list[str]:
    """How a config names the model's fused expert tensors; empty where it has none."""
    names = (row.name for row in architecture.table.parameters if row.group == "experts")
    return list(dict.fromkeys(".".join(name.split(".")[-3:]) for name in names))


def spelled(key: str, config: RunConfig) -> str:
    """A value of a config as it is shown, and as `set_value` takes it."""
    value = getattr(config, key)
    if key == "lora_target_parameters":
        return EXPERTS if value else NONE
    return spell(key, value)


def set_value(draft: Draft, key: str, text: str) -> None:
    """Take a typed value into the draft; where it cannot be kept the draft stays as it was.

    Raises UserError for a value that the config refuses or that contradicts another.
    """
    given = "null" if text in (FULL, NONE) else text
    if key == "lora_target_parameters" and text == EXPERTS:
        given = json.dumps(expert_tensors(draft.architecture()))
    assignments = [f"{key}={given}"]
    if key == "adapter":
        assignments.append(f"load_in_4bit={json.dumps(text == 'qlora')}")
    kept = dict(draft.changes)
    try:
        _set(draft, key, assignments)
    except UserError as error:
        draft.changes = kept
        # Without the place of the value: it was typed here.
        what = error.what.removeprefix("The command line: ").removeprefix("The config: ")
        raise UserError(what, error.why, error.fix) from None


def _set(draft: Draft, key: str, assignments: list[str]) -> None:
    before = draft.config()
    if key == "val_set_size" and "test_datasets" not in draft.changes:
        # A share of the rows takes the place of the sets that a recipe holds out.
        before = before.model_copy(update={"test_datasets": ()})
    after = override(before, assignments)
    require_supported(after)
    for name in before.model_fields_set | after.model_fields_set:
        value = getattr(after, name)
        if name == key or value != getattr(before, name):
            draft.change(name, value)
    draft.advice()


if TYPE_CHECKING:
    from engine.chat.tokenizer import ChatTokenizer
    from engine.wizard.question import Work
    from engine.wizard.reading import Read

NO_ROW: Final = "no row of it can be used, or its tokenizer is not here"
MOST_BYTES: Final = 256 * 2**20
"""Files beyond this are not read for an estimate: some 100,000 conversations, a minute or two."""
COUNTING: Final = "its rows are being counted"
WHICH_KEYS: Final = ("base_model", "tokenizer_config", "datasets")
"""Which rows, in the tokens of which model."""


def counted_of(config: RunConfig) -> Counted:
    def text(*keys: str) -> str:
        return json.dumps(config.model_dump(mode="json", include={*keys}), sort_keys=True)

    return Counted(text(*WHICH_KEYS), text(*RENDER_KEYS, *LABEL_KEYS))


def next_count(draft: Draft) -> RunConfig | None:
    """The config whose rows are to be counted now; None where its plan has them or cannot.

    Counts of other rows are taken out of the plan; those of the same rows under other switches
    stay until there are better ones. Raises what `Draft.config` raises.
    """
    config = draft.config()
    now = counted_of(config)
    if draft.counted == now and draft.uncounted == COUNTING:
        draft.uncounted = ""  # of switches that were turned back
    if draft.counted == now and (draft.statistics or draft.uncounted):
        return None
    if draft.counted is None or draft.counted.which != now.which:
        draft.statistics = None
        config = draft.config()  # what was recommended for other rows goes with them
        now = counted_of(config)
    reason = why_uncounted(config, draft.architecture(), Path.cwd())
    if reason:
        draft.counted, draft.uncounted = now, reason
        return None
    draft.uncounted = COUNTING
    return config


def with_rows(draft: Draft, dataset: DatasetConfig) -> RunConfig:
    """What decides what the rows of `dataset` alone become: an opened config has its say."""
    other = copy(draft)
    other.dataset, other.statistics = dataset, None
    try:
        config = other.config()
    except UserError:  # it is Plan that says what does not go together
        config = RunConfig(base_model=draft.model or "")
    return config.model_copy(update={"datasets": (dataset,)})


def rows_config(config: RunConfig, *, labels: bool = True) -> RunConfig:
    """What of a config its rows follow from; without `labels` it is the same whatever is learned.

    It is no config to run, and is checked by who reads the rows.
    """
    keys = (*WHICH_KEYS, *RENDER_KEYS, *(LABEL_KEYS if labels else ()))
    return RunConfig.model_construct(**{key: getattr(config, key) for key in keys})


def take_count(draft: Draft, config: RunConfig, statistics: Statistics | None) -> None:
    draft.statistics = statistics
    draft.counted = counted_of(config)
    draft.uncounted = "" if draft.statistics else NO_ROW


def take_answer(draft: Draft, answer: object) -> None:
    """Put what came of counting the rows of the draft's config into the plan: a checkup, or the
    UserError that ended it."""
    config = draft.config()
    if isinstance(answer, UserError):
        draft.counted = counted_of(config)
        draft.uncounted = f"its rows could not be counted: {answer.what}"
    else:
        assert isinstance(answer, Checkup)
        take_count(draft, config, answer.statistics())


def count_work(draft: Draft, read: "Read") -> "Work | None":
    from engine.data.requests import CheckRows  # loads numpy, which most commands do not wait for

    config = next_count(draft)
    if config is None:
        return None
    names = ", ".join(dataset.path for dataset in config.datasets)
    return read.work(CheckRows(rows_config(config), Path.cwd()), f"Counting {names}.")


def check_rows(config: RunConfig, folder: Path) -> "Checkup":
    """Every row of a config, read if it is not prepared, and counted in tokens where the tokenizer
    can be had.

    Raises UserError where a dataset cannot be read.
    """
    from engine.data.checkup import count_rows

    tokenizer = open_if_here(config, folder)
    return count_rows(config, folder, tokenizer, sequence_len=config.sequence_len)


def require_usable(found: "Checkup", name: str, of: str = "") -> None:
    """Raises UserError where no row can be used `of` the dataset or config of this name."""
    if not found.usable:
        shown = visible(name, one_line=True)
        raise UserError(
            f"No row of {of}{shown} can be used.",
            f"{found.rows:,} were read, and each has a problem.",
            f"`windtunnel check {shown}` lists them, with repairs.",
        )


def open_if_here(config: RunConfig, folder: Path) -> "ChatTokenizer | None":
    """The config's tokenizer; None where it is not here and cannot be fetched."""
    from engine.chat.tokenizer import open_tokenizer

    try:
        return open_tokenizer(tokenizer_name(config), folder)
    except WorkError:
        return None


def count_config_rows(
    config: RunConfig, architecture: Architecture, folder: Path
) -> tuple[Statistics | None, str]:
    """The counts of a config's rows, or None with the reason in a few words; nothing is fetched."""
    reason = why_uncounted(config, architecture, folder)
    if reason:
        return None, reason
    try:
        statistics = check_rows(config, folder).statistics()
    except UserError as error:
        return None, _unreadable(error)
    return statistics, "" if statistics else NO_ROW


def why_uncounted(config: RunConfig, architecture: Architecture, folder: Path) -> str:
    """Why the rows of a config are not counted for a plan, in a few words; empty where they can be.

    Looks at the names and sizes of files alone.
    """
    from engine.data.sources import locate

    if not config.datasets:
        return "the config names no dataset"
    if architecture.card is None and architecture.folder is None:
        return "its tokenizer is not here"
    size = 0
    try:
        for dataset in config.datasets:
            location = locate(dataset, folder)
            if location.hub_id is not None:
                return "its rows are on the hub"
            size += sum(file.stat().st_size for file in location.files)
    except UserError as error:
        return _unreadable(error)
    return "its rows are too many to count for an estimate" if size > MOST_BYTES else ""


def _unreadable(error: UserError) -> str:
    return f"its rows could not be read: {error.what}"

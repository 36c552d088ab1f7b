"""The rows of a config in its plan: what their lengths follow from, and when they are counted.

Each answer can change what a row becomes: another model, another dataset, images of another size,
an edited file. Whoever shows a plan asks for the rows first, and says why they are not counted:
rows that are not here, on the hub, or too many to read before an answer leave `sequence_len` to
count with.
"""

import json
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.catalog import Architecture
from engine.chat.tokenizer_file import tokenizer_name
from engine.config import DatasetConfig, RunConfig
from engine.data.statistics import Checkup
from engine.errors import UserError, WorkError
from engine.plan import Statistics
from engine.wizard.draft import Counted, Draft

if TYPE_CHECKING:
    from engine.wizard.question import Work
    from engine.wizard.reading import DataWorker, Read

NO_ROW: Final = "no row of it can be used, or its tokenizer is not here"
MOST_BYTES: Final = 256 * 2**20
"""Files beyond this are not read for an estimate: some 100,000 conversations, a minute or two."""
COUNTING: Final = "its rows are being counted"
WHICH_KEYS: Final = frozenset({"base_model", "tokenizer_config", "datasets"})
"""Which rows, in the tokens of which model."""
RENDER_KEYS: Final = frozenset(
    {
        *("history_thinking", "chat_template_kwargs", "train_on_inputs"),
        *("image_folder", "image_size", "image_resize_algorithm"),
    }
)
"""What a row becomes: its tokens and their kinds."""
LABEL_KEYS: Final = frozenset({"train_on_thinking"})
"""What of it is learned, beside them."""


def counted_of(config: RunConfig) -> Counted:
    """What a count of a config's rows holds for."""

    def text(keys: frozenset[str]) -> str:
        return json.dumps(config.model_dump(mode="json", include=set(keys)), sort_keys=True)

    return Counted(text(WHICH_KEYS), text(RENDER_KEYS | LABEL_KEYS))


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
    keys = WHICH_KEYS | RENDER_KEYS | (LABEL_KEYS if labels else frozenset())
    return RunConfig.model_construct(**{key: getattr(config, key) for key in keys})


def take_count(draft: Draft, config: RunConfig, statistics: Statistics | None) -> None:
    """Put what was found in the rows of `config` into the plan."""
    draft.statistics = statistics
    draft.counted = counted_of(config)
    draft.uncounted = "" if draft.statistics else NO_ROW


def take_answer(draft: Draft, config: RunConfig, answer: object) -> bool:
    """Put what came of counting the rows of `config` into the plan, a checkup or the UserError
    that ended it; whether the draft still asks for them."""
    try:
        if counted_of(draft.config()) != counted_of(config):
            return False
    except UserError:  # the answers have come to contradict each other
        return False
    if isinstance(answer, UserError):
        draft.counted = counted_of(config)
        draft.uncounted = f"its rows could not be counted: {answer.what}"
    else:
        assert isinstance(answer, Checkup)
        take_count(draft, config, answer.statistics())
    return True


async def count_rows(draft: Draft, config: RunConfig, worker: "DataWorker") -> bool:
    """Count the rows of `config` for the plan; whether the draft still asks for them."""
    from engine.data.requests import CheckRows

    try:
        found = await worker.ask(CheckRows(rows_config(config), Path.cwd()))
    except UserError as error:
        return take_answer(draft, config, error)
    return take_answer(draft, config, found)


def count_work(draft: Draft, read: "Read") -> "Work | None":
    """Counting the rows of the draft's config, where its plan is without them."""
    from engine.data.requests import CheckRows  # loads numpy, which most commands do not wait for

    config = next_count(draft)
    if config is None:
        return None
    names = ", ".join(dataset.path for dataset in config.datasets)
    return read.work(CheckRows(rows_config(config), Path.cwd()), f"Counting {names}.")


def check_rows(config: RunConfig, folder: Path) -> "Checkup":
    """Every row of a config read, and counted in tokens where the tokenizer can be had.

    Raises UserError where a dataset cannot be read.
    """
    from engine.chat.tokenizer import open_tokenizer
    from engine.data.checkup import check_config

    try:
        tokenizer = open_tokenizer(tokenizer_name(config), folder)
    except WorkError:  # offline, and the tokenizer is not here yet
        tokenizer = None
    return check_config(config, folder, tokenizer, sequence_len=config.sequence_len)


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

"""The rows of a config, counted for its plan: how long they are decides what fits.

Separate from `planning` because counting reads files, and because it has to say why it did not:
rows that are not here, on the hub, or too many to read before an answer leave `sequence_len` to
count with.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from engine.catalog import Architecture
from engine.chat.tokenizer_file import tokenizer_name
from engine.config import RunConfig
from engine.errors import UserError, WorkError
from engine.plan import Statistics

if TYPE_CHECKING:
    from engine.data.checkup import Checkup

NO_ROW = "no row of it can be used, or its tokenizer is not here"
MOST_BYTES = 256 * 2**20
"""Files beyond this are not read for an estimate: some 100,000 conversations, a minute or two."""


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

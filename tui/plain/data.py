"""Question 3: which rows, and what is in them.

The tokenizer is imported when the first row is read. There is no event loop to stall, so rows are
read in this process.
"""

import time
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.config import DatasetConfig
from engine.data.samples import SAMPLE_PREFIX, list_samples
from engine.data.sources import KNOWN_ENDINGS, locate
from engine.errors import UserError
from engine.report.data import image_lines, list_remarks
from engine.wizard.counting import counted_of, take_count
from engine.wizard.draft import Draft
from tui.plain.dialogue import Answer, Dialogue
from tui.plain.setup import Setup, ask_text

if TYPE_CHECKING:
    from engine.data.statistics import Checkup

_SHOWN: Final = 5
_TOLD_SECONDS: Final = 10.0


def ask_data(setup: Setup) -> None:
    """Question 3: a sample, a file, a folder or a hub dataset, read whole before it is taken."""
    while True:
        dataset = _choose_dataset(setup)
        if dataset is None:
            return
        try:
            taken = _consider(setup, dataset)
        except UserError as error:
            setup.dialogue.refuse(error)
            continue
        if taken:
            return


def _choose_dataset(setup: Setup) -> DatasetConfig | None:
    """What the person names; None where a config's own datasets stay as they are."""
    draft, dialogue = setup.draft, setup.dialogue
    paths = [SAMPLE_PREFIX + sample.name for sample in list_samples()]
    choices = [
        Answer(f"{SAMPLE_PREFIX}{each.name}, {each.title}: {each.rows:,} rows", each.description)
        for each in list_samples()
    ]
    kept = draft.dataset
    own = draft.own.datasets if draft.own else ()
    together = len(own) > 1 and kept in own
    if together:
        choices.insert(0, Answer(f"the {len(own)} datasets of the config"))
    elif kept is not None and kept.path not in paths:
        choices.insert(0, Answer(f"{kept.path}, as chosen before"))
    before = len(choices) - len(paths)
    choices.append(Answer("a file or folder", f"{KNOWN_ENDINGS}; one conversation a row."))
    choices.append(
        Answer("huggingface.co", "A dataset there by org/name. It asks before it connects.")
    )
    marked = before + paths.index(kept.path) if kept and kept.path in paths and not together else 0
    named: list[str] = []

    def take(path: str) -> None:
        locate(DatasetConfig(path=path), Path.cwd())
        named.append(path)

    while (index := int(dialogue.choose(choices, marked))) >= before + len(paths):
        prompt = "  Path: " if index == before + len(paths) else "  org/name: "
        if ask_text(dialogue, prompt, take):
            return DatasetConfig(path=named[0])
    if index < before:
        return None if together else kept
    return DatasetConfig(path=paths[index - before])


def _consider(setup: Setup, dataset: DatasetConfig) -> bool:
    """Read a dataset and say what is in it; whether the person takes it."""
    dialogue = setup.dialogue
    if not _may_connect(dialogue, dataset):
        return False
    trial = copy(setup)
    trial.draft, trial.found = _with_dataset(setup.draft, dataset), None
    found = count(trial)
    assert found is not None
    remarks = describe_remarks(trial)
    length = found.tokens.row_length if found.tokens else None
    remarks[:0] = [f"  {line}" for line in image_lines(found)]
    told = f"  Read {found.rows:,} rows: {found.usable:,} usable"
    if found.tokens and length and found.usable:
        told += f", {found.tokens.total:,} tokens, longest row {length.max:,}"
    dialogue.say(f"{told}.", *remarks[:_SHOWN])
    if not found.usable:
        return _offer_mapping(setup, dataset)
    choices = [Answer("use it", "Rows that cannot be used are left out.")]
    if len(remarks) > _SHOWN:
        choices.append(Answer(f"list all {len(remarks)} findings"))
    choices.append(Answer("take other rows"))
    while (index := int(dialogue.choose(choices))) not in (0, len(choices) - 1):
        dialogue.say(*remarks)
    if index:
        return False
    setup.draft.take(trial.draft)
    setup.found = found
    return True


def _may_connect(dialogue: Dialogue, dataset: DatasetConfig) -> bool:
    hub_id = locate(dataset, Path.cwd()).hub_id
    if hub_id is None:
        return True
    dialogue.say(f"  {hub_id} is not here. The hub is told this name, and its rows are downloaded.")
    return dialogue.choose([Answer("connect to huggingface.co"), Answer("take other rows")]) == 0


def _offer_mapping(setup: Setup, dataset: DatasetConfig) -> bool:
    """Read the rows again by the names that they use, where these are usual ones."""
    from engine.data.shape import mapped, read_shape

    proposed = read_shape(dataset, Path.cwd(), _SHOWN).proposed
    if not proposed or mapped(dataset, proposed) == dataset:
        setup.dialogue.say("  No row can be used: repair the rows or take others.")
        return False
    named = ", ".join(
        f"{ours.removeprefix('field_')} = {theirs}" for ours, theirs in proposed.items()
    )
    if setup.dialogue.choose([Answer(f"map columns: {named}"), Answer("take other rows")]):
        return False
    return _consider(setup, mapped(dataset, proposed))


def _with_dataset(draft: Draft, dataset: DatasetConfig) -> Draft:
    trial = copy(draft)
    trial.dataset, trial.statistics = dataset, None
    return trial


def is_local(draft: Draft) -> bool:
    """Whether all rows are on this computer. Raises UserError for a file that is not there."""
    datasets = draft.config().datasets
    return all(locate(dataset, Path.cwd()).hub_id is None for dataset in datasets)


def count(setup: Setup) -> "Checkup | None":
    """Read and tokenize all rows of the draft's datasets, unless that is done already.

    Keeps what was found, and the draft's statistics; None where there is no dataset. Raises
    UserError where the rows or the tokenizer cannot be read.
    """
    from engine.data.checkup import check_config

    config = setup.draft.config()
    known = setup.found is not None and setup.draft.counted == counted_of(config)
    if not config.datasets or known:
        return setup.found
    names = ", ".join(dataset.path for dataset in config.datasets)
    tokenizer = setup.tokenizer()
    setup.dialogue.say(f"  Reading {names}.")
    told_at = time.monotonic()

    def tell(rows: int, _read_bytes: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= _TOLD_SECONDS:
            told_at = time.monotonic()
            setup.dialogue.say(f"  {rows:,} rows so far.")

    setup.found = check_config(config, Path.cwd(), tokenizer, progress=tell)
    take_count(setup.draft, config, setup.found.statistics())
    return setup.found


def describe_remarks(setup: Setup) -> list[str]:
    """What to know about the rows, a line each, the worst first."""
    assert setup.found is not None
    return [f"  {remark.line.whole}" for remark in list_remarks(setup.found)]

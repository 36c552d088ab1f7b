"""The third step: which rows, read whole before they are taken.

What is offered before anything is typed is looked up by name alone; no file is opened.
"""

import os
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Final, Literal

from engine.config import DatasetConfig
from engine.data.folders import is_metadata
from engine.data.formats import READERS, ending_of
from engine.data.requests import CheckRows, ReadShape, Shape
from engine.data.shape import mapped
from engine.data.sources import SAMPLE_PREFIX, list_samples, locate
from engine.data.statistics import Checkup
from engine.errors import UserError
from engine.report import Line
from engine.report.data import list_remarks, mapping_text, row_lines, rows_verdict, shape_lines
from engine.wizard.draft import Draft, is_named_by_path, rows_config, take_count, with_rows
from engine.wizard.question import Choice, Confirm, Question, Step, Work
from engine.wizard.reading import Read

_NEWEST: Final = 3
_DEEPEST: Final = 3
# A home folder may hold a million files; what lies in the first few thousand is offered.
_LOOKED_AT: Final = 5000


TYPED: Final = "typed"
HUB: Final = "hub"


def list_sources(newest: list[str]) -> list[Choice]:
    """Samples and the newest files by their path, then a path to type, and the hub."""
    samples = list_samples()
    paths = [SAMPLE_PREFIX + sample.name for sample in samples]
    titles = [f"{SAMPLE_PREFIX} {sample.name}" for sample in samples]
    notes = [f"{sample.rows:,} {sample.description}" for sample in samples]
    formats = "JSON, CSV, Parquet, Arrow; also .gz and .zst"
    return [
        *map(Choice, paths, titles, notes),
        *(Choice(name, name, "newest here") for name in newest),
        Choice(TYPED, "file or folder", formats, asks="path", completes="path"),
        Choice(HUB, "huggingface.co", "org/name; asks before it connects", asks="org/name"),
    ]


def find_newest(folder: Path) -> list[str]:
    """The newest .jsonl files at most three folders below, as paths that start at `folder`."""
    found = []
    for looked_at, (path, changed) in enumerate(_walk(str(folder), _DEEPEST)):
        if path.endswith((".jsonl", ".jsonl.gz")) and not is_metadata(Path(path)):
            found.append((changed, os.path.relpath(path, folder)))
        if looked_at >= _LOOKED_AT:
            break
    return [name for _, name in sorted(found, reverse=True)[:_NEWEST]]


def _walk(folder: str, depth: int) -> Iterator[tuple[str, float]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith((".", "_")) or entry.name in ("node_modules", "venv"):
            continue
        try:
            if entry.is_file():
                yield entry.path, entry.stat().st_mtime
            elif depth and entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, depth - 1)
        except OSError:
            continue


def complete_path(text: str, folder: Path) -> tuple[str, list[str]]:
    """`text` as far as the names on the disk agree, and the names that it may become.

    A folder ends in a slash. Relative paths start at `folder`; `~` stays as it was typed.
    """
    head, tail = os.path.split(text)
    place = folder / os.path.expanduser(head)
    try:
        entries = sorted(os.scandir(place), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return text, []
    names = [
        entry.name + "/" if entry.is_dir() else entry.name
        for entry in entries
        if entry.name.startswith(tail)
        and (tail.startswith(".") or not entry.name.startswith("."))
        and (entry.is_dir() or ending_of(Path(entry.name)) in READERS)
    ]
    common = os.path.commonprefix(names)  # noqa: RUF071 (characters, as they are typed)
    return (os.path.join(head, common) if common else text), names


KEPT: Final = "kept"
"""The datasets of an opened config, as they are."""
USE: Final = "use"
MAP: Final = "map"
HOLD_OUT: Final = "hold out"
EVALUATE: Final = "evaluate"
OTHERS: Final = "others"
_SHARES: Final = (0.0, 0.05, 0.1, 0.2)


class DataStep(Step):
    """Where the rows come from; once some are considered, what is in them and whether to use them.

    `found` is what was read of `dataset`, `problem` why it could not be.
    """

    title = "Data"

    def __init__(self, draft: Draft, read: Read) -> None:
        self._draft = draft
        self._read = read
        self._agreed: set[str] = set()
        self.dataset: DatasetConfig | None = None
        self.shape: Shape | None = None
        self.found: Checkup | None = None
        self.problem: UserError | None = None
        self._model: str | None = None

    def work(self) -> Work | None:
        if self.dataset is None or self.problem is not None:
            return None
        if self._draft.model != self._model:
            self.consider(self.dataset)  # their lengths follow from the model's tokenizer
        config, here = rows_config(with_rows(self._draft, self.dataset)), Path.cwd()
        if self.shape is None:
            return self._read.work(ReadShape(config, here), f"Reading {self.dataset.path}.")
        if self.found is None:
            return self._read.work(CheckRows(config, here), f"Counting {self.dataset.path}.")
        return None

    def receive(self, _work: Work, result: object) -> None:
        if isinstance(result, UserError):
            self.problem = result
        elif isinstance(result, Shape):
            self.shape = result
            self._draft.shows_images = result.shows_images
        else:
            assert isinstance(result, Checkup)
            self.found = result

    @property
    def state(self) -> Literal["idle", "reading", "read", "refused"]:
        """Whether rows are considered, and what has come of it."""
        if self.dataset is None:
            return "idle"
        if self.problem is not None:
            return "refused"
        if self.found is None:
            return "reading"
        return "read" if self.found.usable else "refused"

    def consider(self, dataset: DatasetConfig) -> None:
        if dataset != self.dataset:
            self._forget_split()
        self.dataset, self._model = dataset, self._draft.model
        self.shape = self.found = self.problem = None

    def question(self) -> Question:
        if self.found is not None:
            return self._about(self.found)
        choices = list_sources(find_newest(Path.cwd()))
        kept, own = self._draft.dataset, self._draft.own.datasets if self._draft.own else ()
        paths = [choice.key for choice in choices]
        if len(own) > 1 and kept in own:
            choices.insert(0, Choice(KEPT, f"the {len(own)} datasets of the config"))
        elif kept is not None and kept.path not in paths:
            choices.insert(0, Choice(kept.path, kept.path, "as chosen before"))
        keys = [choice.key for choice in choices]
        wanted = KEPT if KEPT in keys else kept.path if kept is not None else keys[0]
        headline = Line("·", "no data", "conversations to learn from, one a row")
        if self.problem is not None:
            headline = Line("✗", "cannot be read", f"{self.problem}")
        return Question(headline, tuple(choices), keys.index(wanted))

    def verdict(self) -> Line:
        assert self.found is not None
        line = rows_verdict(self.found, *self.held_out())
        if self._draft.is_blind:
            text = "the model reads only text, and rows have images: choose one that sees"
            return Line(line.mark, line.label, text)
        return line

    def held_out(self) -> tuple[float, int]:
        """val_set_size and the number of test sets that would go with what was read here."""
        assert self.found is not None
        draft = copy(self._draft)
        self._write(draft, self.found)
        try:
            config = draft.config()
        except UserError:  # it is Plan that says what does not go together
            return 0.0, 0
        return config.val_set_size, len(config.test_datasets)

    def confirm(self, key: str, text: str) -> Confirm | None:
        if self.found is not None or key == KEPT:
            return None
        return self.consent(self._named(key, text))

    def consent(self, dataset: DatasetConfig) -> Confirm | None:
        """What is asked before the hub is; None for rows that are here, and once it was agreed to.

        Raises UserError where there are no such rows.
        """
        hub_id = locate(dataset, Path.cwd()).hub_id
        if hub_id is None or hub_id in self._agreed:
            return None
        return Confirm(
            "connect to huggingface.co?",
            f"There is no local {hub_id}. The hub is told this name, and its rows are downloaded"
            " as they are read.",
            "connects",
            "does not",
        )

    def agree(self, dataset: DatasetConfig) -> None:
        if hub_id := locate(dataset, Path.cwd()).hub_id:
            self._agreed.add(hub_id)

    def take(self, key: str, text: str) -> bool:
        """Have rows read, or use those that were; the last is the answer of the step."""
        if self.found is None:
            if key == KEPT:
                return True
            dataset = self._named(key, text)
            self.agree(dataset)
            self.consider(dataset)
        elif key == USE:
            if not self.found.usable:
                raise UserError(
                    "No row can be used.",
                    f"{self.found.rows:,} were read, and each has a problem.",
                    "Repair the rows, map the columns, or take others.",
                )
            self._write(self._draft, self.found)
            return True
        elif key == MAP:
            assert self.shape is not None
            self.map(self.shape.proposed)
        elif key == HOLD_OUT:
            self.hold_out()
        elif key == EVALUATE:
            self._evaluate(self._other_split())
        else:
            self.back()
        return False

    def map(self, mapping: dict[str, str]) -> None:
        assert self.dataset is not None
        self.consider(mapped(self.dataset, mapping))

    def hold_out(self) -> None:
        """The next larger share of the rows; after the largest the split for evaluation that lies
        beside them, if one does, and then none."""
        now, _ = self.held_out()
        larger = [share for share in _SHARES if share > now]
        split = self._other_split()
        if not larger and split is not None:
            self._evaluate(split)
            return
        first = _SHARES[0] if self._evaluates() else (*larger, _SHARES[0])[0]
        self._draft.reset("test_datasets")
        self._draft.change("val_set_size", first)

    def _other_split(self) -> str | None:
        """The split for evaluation in the folder of these rows, which is not learned."""
        assert self.dataset is not None
        chosen = locate(self.dataset, Path.cwd()).chosen
        return chosen.held_out if chosen else None

    def _evaluates(self) -> bool:
        sets = self._draft.changes.get("test_datasets")
        return isinstance(sets, tuple) and any(
            isinstance(each, DatasetConfig) and self.dataset and each.path == self.dataset.path
            for each in sets
        )

    def _forget_split(self) -> None:
        if self._evaluates():
            self._draft.reset("test_datasets")
            self._draft.reset("val_set_size")

    def _evaluate(self, split: str | None) -> None:
        assert self.dataset is not None
        held_out = self.dataset.model_copy(update={"split": split})
        self._draft.change("test_datasets", (held_out,))
        self._draft.change("val_set_size", 0.0)

    def back(self) -> bool:
        self._forget_split()
        considered, self.dataset = self.dataset, None
        self.shape = self.found = self.problem = None
        return considered is not None

    def _about(self, found: Checkup) -> Question:
        assert self.shape is not None
        assert self.dataset is not None
        choices = [Choice(OTHERS, "take other rows")]
        if self.shape.reads_more:
            reason = "They are read again by these names."
            choices.insert(0, Choice(MAP, "map columns", mapping_text(self.shape), reason=reason))
        if found.usable:
            left_out = "rows that cannot be used are left out" if found.bad_rows else ""
            choices.insert(0, Choice(USE, "use it", left_out))
            reason = "Rows that are only evaluated show whether it learns by heart."
            choices.insert(-1, Choice(HOLD_OUT, "hold out another share", reason=reason))
            split = self._other_split()
            if split is not None and not self._evaluates():
                text = f"evaluate the split {split}"
                choices.insert(-1, Choice(EVALUATE, text, "it is not learned", reason=reason))
        about = row_lines(found, self.shape) if found.usable else shape_lines(self.shape)
        facts = (*about, *(remark.line for remark in list_remarks(found)))
        return Question(self.verdict(), tuple(choices), 0, facts)

    def _named(self, key: str, text: str) -> DatasetConfig:
        kept = self._draft.dataset
        if kept is not None and key == kept.path and not key.startswith(SAMPLE_PREFIX):
            return kept
        return DatasetConfig(path=text if key in (TYPED, HUB) else key)

    def _write(self, draft: Draft, found: Checkup) -> None:
        assert self.dataset is not None
        draft.dataset = self.dataset
        take_count(draft, with_rows(draft, self.dataset), found.statistics())


def check_command(draft: Draft, dataset: DatasetConfig) -> list[str]:
    """The words after `windtunnel` that report on the same rows; none where no command does.

    Those of an opened config are read as it says: with its image folder, its switches.
    """
    own = draft.own
    if own is not None and dataset in own.datasets:
        same = draft.path is not None and not draft.changes and draft.model == own.base_model
        return ["check", str(draft.path)] if same and len(own.datasets) == 1 else []
    words = ["check", dataset.path, "--model", draft.model or ""]
    return words if is_named_by_path(dataset) else []

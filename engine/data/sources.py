"""Where the rows of a dataset are: its files, the samples that ship, the hub.

What is in a file is for `formats`.
"""

import difflib
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from engine.catalog import model_names
from engine.config import DatasetConfig, RunConfig
from engine.data.content import PASSED, SourceRow, Wants, every_row
from engine.data.folders import TRAIN, Chosen, choose_files, is_metadata, require_split
from engine.data.formats import CAPTION_READERS, KNOWN_ENDINGS, READERS, ending_of, file_notes
from engine.data.statistics import FileNote
from engine.errors import UserError
from engine.hub_id import is_hub_id
from engine.units import counted
from engine.visible import visible

SAMPLE_PREFIX = "sample:"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a dataset's rows are: local files in reading order, or a hub id."""

    root: Path
    files: tuple[Path, ...]
    hub_id: str | None = None
    chosen: Chosen | None = None
    """Of a folder: what else is in it."""

    @property
    def folder(self) -> Path | None:
        """The folder that holds the dataset, where images of its rows are first looked up."""
        if self.hub_id is not None:
            return None
        return self.root if self.root.is_dir() else self.root.parent

    def name(self, file: Path) -> str:
        """The file's name as messages show it: relative to the folder that the dataset names."""
        return file.name if file == self.root else os.path.relpath(file, self.root)

    def stamps(self) -> tuple[tuple[int, ...], ...]:
        """(size, time of change, inode) of each file: what a change of its content alters."""
        found = [file.stat() for file in self.files]
        return tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in found)


def locate(dataset: DatasetConfig, folder: Path) -> Location:
    """The files that `dataset.path` names; relative paths start at `folder`.

    Raises `UserError` for a missing file, an unknown ending, a folder without a data file, what
    is neither a file nor a folder, and a `sample:NAME` that does not ship.
    """
    if not dataset.path.strip():
        raise UserError(
            "The path of a dataset is empty.",
            "It names no file, no folder and no hub id.",
            "Give one of them; `.` is the folder itself.",
        )
    # os.path, unlike pathlib, answers a name that no file system can hold with False.
    root = folder / os.path.expanduser(dataset.path)
    if dataset.path.startswith(SAMPLE_PREFIX) and not os.path.exists(root):
        path = _locate_sample(dataset.path.removeprefix(SAMPLE_PREFIX))
        return Location(path, (path,))
    if dataset.name is not None and os.path.exists(root):
        root = _subset(root, dataset.name)
    if os.path.isfile(root):
        return Location(root, (_require_data(root, dataset.split),))
    if os.path.isdir(root):
        if dataset.data_files:
            return Location(root, _chosen_files(root, dataset))
        chosen = choose_files(root, dataset.split)
        return Location(root, chosen.files, chosen=chosen)
    if os.path.exists(root):
        raise UserError(
            f"{dataset.path} is neither a file nor a folder.",
            "Rows are read more than once, which a pipe or a device does not allow.",
            "Write the rows into a .jsonl file and name that.",
        )
    if _is_hub_id(dataset.path, folder):
        return Location(root, (), dataset.path)
    raise _missing(root, dataset.path)


def iterate_rows(
    dataset: DatasetConfig, folder: Path, wants: Wants = every_row
) -> Iterator[SourceRow]:
    """Every row of `dataset`, in order, as a stream; `PASSED` may stand for one not wanted.

    Raises what `locate` raises, and `UserError` when a file is damaged or no row was found.
    """
    location = locate(dataset, folder)
    stream = _local_rows(location, wants) if location.hub_id is None else _hub_rows(dataset)
    found = False
    for row in stream:
        found = True
        yield row
    if not found:
        empty = location.files and not any(file.stat().st_size for file in location.files)
        raise UserError(
            f"{dataset.path} holds no rows.",
            "It is empty: 0 bytes." if empty else "It was read to its end and every line is blank.",
            "Write one conversation a line, or name another file.",
        )


def config_notes(config: RunConfig, folder: Path) -> tuple[FileNote, ...]:
    """What to know of the files of all that a config learns. Raises what `iterate_rows` raises."""
    return tuple(note for each in config.datasets for note in dataset_notes(each, folder))


def dataset_notes(dataset: DatasetConfig, folder: Path) -> tuple[FileNote, ...]:
    """What to know of how the files of a dataset are read. Raises what `iterate_rows` raises."""
    location = locate(dataset, folder)
    notes = [
        FileNote(location.name(file), text) for file in location.files for text in file_notes(file)
    ]
    if (chosen := location.chosen) is not None:
        notes += _notes_of_splits(dataset, location, chosen)
    return tuple(notes)


def _notes_of_splits(
    dataset: DatasetConfig, location: Location, chosen: Chosen
) -> Iterator[FileNote]:
    def named(files: tuple[Path, ...]) -> str:
        return location.name(files[0]) if len(files) == 1 else counted(len(files), "file")

    for split, files in chosen.others.items():
        offer = f"test_datasets: [{{path: {dataset.path}, split: {split}}}] evaluates it"
        yield FileNote(named(files), f"the split {split}, which is not learned; {offer}")
    if chosen.unread:
        text = "of no split beside files that are, so not read; data_files names what is read"
        yield FileNote(named(chosen.unread), text)
    if chosen.missing:
        yield FileNote(
            named(chosen.files), f"only {chosen.missing} are here: some rows are missing"
        )


def _local_rows(location: Location, wants: Wants) -> Iterator[SourceRow]:
    before = 0
    for file in location.files:
        name = location.name(file)
        read = READERS.get(ending_of(file)) or CAPTION_READERS[file.suffix.lower()]
        for row in read(file, wants):
            if row is PASSED:
                yield row
            else:
                yield replace(row, file=name, read_bytes=before + row.read_bytes)
        before += file.stat().st_size


def _hub_rows(dataset: DatasetConfig) -> Iterator[SourceRow]:
    # Imported here: it starts a process, which a local file never needs.
    from engine.data.requests import ReadHub, ask_worker

    for found in ask_worker(ReadHub(dataset)):
        yield SourceRow(found.line, found.row, None, 0, dataset.path, "row")


def _require_data(path: Path, split: str | None) -> Path:
    """The file. Raises UserError where its name says that it holds no rows, or another split."""
    if is_metadata(path):
        raise UserError(
            f"{path} holds no rows.",
            "Its name says that it is about a dataset, a model or a run.",
            "Name the folder, or the file of rows beside it.",
        )
    require_split(path, split)
    if ending_of(path) not in READERS:
        raise UserError(
            f"{path} is not a data file that we read.",
            f"Its name ends in {ending_of(path) or 'nothing'}; we read {KNOWN_ENDINGS}.",
            "Convert it to .jsonl (one JSON object a line), or rename it if it is one of these.",
        )
    return path


def _subset(root: Path, name: str) -> Path:
    """The folder of a subset in the copy of a hub dataset. Raises UserError where there is none."""
    parts = Path(name).parts
    if len(parts) == 1 and parts != ("..",) and os.path.isdir(root / name):
        return root / name
    has = sorted(below.name for below in root.iterdir() if below.is_dir()) if root.is_dir() else []
    raise UserError(
        f"{root} has no subset named {visible(name, one_line=True)}.",
        f"Its folders are {', '.join(has[:8])}."
        if has
        else "It holds no folders, and all of its rows are read.",
        "Name one of them, or remove `name`." if has else "Remove `name`.",
    )


def held_out_sets(config: RunConfig, folder: Path) -> tuple[DatasetConfig, ...]:
    """`test_datasets`, those without a split with the one that is for evaluation.

    Raises what `locate` raises, and UserError where only the rows for training would be left.
    """
    return tuple(_for_evaluation(each, folder) for each in config.test_datasets)


def _for_evaluation(dataset: DatasetConfig, folder: Path) -> DatasetConfig:
    if dataset.split is not None or dataset.data_files:
        return dataset
    location = locate(dataset, folder)
    chosen = location.chosen
    if location.hub_id is None:
        if chosen is None or chosen.split is None or not chosen.split.startswith(TRAIN):
            return dataset
        if chosen.held_out is not None:
            return dataset.model_copy(update={"split": chosen.held_out})
    raise UserError(
        f"test_datasets names {dataset.path} without a split.",
        "Absent, it is train: the rows that are learned would be evaluated."
        if location.hub_id
        else f"Its files are the split {chosen.split if chosen else TRAIN} alone.",
        "Write `split: validation` or `split: test` beside its path, or val_set_size: 0.05 in the"
        " place of test_datasets."
        if location.hub_id
        else "Write val_set_size: 0.05 in the place of test_datasets, or `split: train` to evaluate"
        " these rows.",
    )


def _chosen_files(root: Path, dataset: DatasetConfig) -> tuple[Path, ...]:
    """The files that `data_files` names, with `*` and `?` as in a shell."""
    given = dataset.data_files
    files: list[Path] = []
    for name in [given] if isinstance(given, str) else given or ():
        matching = glob.glob(name, root_dir=root, recursive=True)
        several = [name] if os.path.isfile(root / name) else matching
        if not several:
            raise _missing(root / name, name)
        files += [_require_data(root / each, dataset.split) for each in sorted(several)]
    return tuple(files)


def _is_hub_id(text: str, folder: Path) -> bool:
    # "data/train.jsonl" and "data/chats" beside an existing data/ are local names gone wrong.
    if not is_hub_id(text) or ending_of(Path(text)) in READERS:
        return False
    return not os.path.isdir((folder / text).parent)


def _missing(root: Path, given: str) -> UserError:
    parent = root.parent
    if not os.path.isdir(parent):
        return UserError(
            f"There is no {given}.",
            f"The folder {parent} does not exist.",
            "Check the path; a relative one in a config starts where the config is.",
        )
    names = sorted(path.name for path in parent.iterdir() if not path.name.startswith("."))
    near = difflib.get_close_matches(root.name, names, n=3, cutoff=0.5)
    near = near or [name for name in names if ending_of(Path(name)) in READERS][:3]
    return UserError(
        f"There is no {given}.",
        f"{parent} holds no file or folder of that name.",
        f"Did you mean {' or '.join(near)}?" if near else "Give the path of a file or folder.",
    )


def with_absolute_paths(config: RunConfig, folder: Path) -> RunConfig:
    """The same config with paths that mean the same from any folder."""

    def absolute(path: str) -> str:
        # os.path, unlike pathlib, answers a name that no file system can hold with False.
        place = os.path.join(folder, os.path.expanduser(path))
        return os.path.realpath(place) if path and os.path.exists(place) else path

    def model(name: str) -> str:
        return name if name in model_names() else absolute(name)

    def rows(datasets: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(d.model_copy(update={"path": absolute(d.path)}) for d in datasets)

    changed: dict[str, Any] = {
        "base_model": model(config.base_model),
        "datasets": rows(config.datasets),
        "test_datasets": rows(config.test_datasets),
    }
    if config.lora_model_dir:
        changed["lora_model_dir"] = absolute(config.lora_model_dir)
    if config.tokenizer_config:
        changed["tokenizer_config"] = model(config.tokenizer_config)
    for key in ("output_dir", "dataset_prepared_path"):
        if value := getattr(config, key):
            changed[key] = os.path.realpath(os.path.join(folder, os.path.expanduser(value)))
    # Absent it is the folder of the config, which a copy elsewhere must still name.
    image_folder = os.path.expanduser(config.image_folder or "")
    changed["image_folder"] = os.path.realpath(os.path.join(folder, image_folder))
    return config.model_copy(update=changed)


@dataclass(frozen=True, slots=True)
class Sample:
    """One dataset that ships; `rows` counts the conversations of the file at `path`."""

    name: str
    title: str
    rows: int
    description: str
    path: Path


@cache
def list_samples() -> tuple[Sample, ...]:
    """All samples in the order of their names."""
    folder = Path(str(resources.files("presets"))) / "samples"
    return tuple(_read_sample(path.parent) for path in sorted(folder.glob("*/train.jsonl")))


def _read_sample(folder: Path) -> Sample:
    # Imported here so that a path that is no sample costs nothing.
    from ruamel.yaml import YAML

    about = YAML(typ="safe", pure=True).load(folder / "about.yml")
    path = folder / "train.jsonl"
    rows = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    return Sample(folder.name, about["title"], rows, about["description"], path)


def _locate_sample(name: str) -> Path:
    """The file of `NAME`, its training rows, or of `NAME/SET`, one of its held-out sets."""
    name, _, held_out = name.partition("/")
    paths = {sample.name: sample.path for sample in list_samples()}
    if name not in paths:
        near = difflib.get_close_matches(name.lower(), paths, n=1, cutoff=0.5)
        raise UserError(
            f"There is no sample named {visible(name, one_line=True)}.",
            f"Windtunnel comes with {', '.join(paths)}.",
            f"Name {SAMPLE_PREFIX}{(near or list(paths))[0]}, or a file of your own.",
        )
    path = paths[name]
    sets = sorted(other.stem for other in path.parent.glob("*.jsonl") if other != path)
    if held_out and held_out not in sets:
        raise UserError(
            f"The sample {name} has no set named {visible(held_out, one_line=True)}.",
            f"Beside its training rows it has {', '.join(sets)}.",
            f"Name {SAMPLE_PREFIX}{name}/{sets[0]}, or {SAMPLE_PREFIX}{name} alone.",
        )
    return path.with_stem(held_out) if held_out else path

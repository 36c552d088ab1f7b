"""Which files of a folder are rows, to which split they belong, and which are about other files.

Files that are named `train`, `validation`, `test` and the like are never read together: the split
train is learned unless another is chosen, and the others are named to whoever reports rows.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from engine.chat.image_values import IMAGE_ENDINGS
from engine.data.content import damaged
from engine.data.formats import KNOWN_ENDINGS, READERS, ending_of
from engine.errors import UserError
from engine.units import counted

TRAIN: Final = "train"
_WORD: Final = re.compile(
    r"(?P<train>train)(ing|set|data|file)?s?"
    r"|(?P<validation>valid|validation|val|dev)(set|data|file)?s?"
    r"|(?P<test>test|eval|evaluation)(ing|set|data|file)?s?"
)
_SHARD: Final = re.compile(r"(.+)-\d{5}-of-(\d{5})")
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Of `datasets`' save_to_disk, for one split and for several."""
_ABOUT: Final = frozenset(
    {
        *("dataset_info.json", "dataset_infos.json", _SAVED, _SAVED_SPLITS),
        *("config.json", "tokenizer.json", "tokenizer_config.json", "package.json"),
    }
)
_OF_A_RUN: Final = frozenset({"events.jsonl", "control.jsonl", "plan.json"})


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files that are read, of the split `split` where files name any. `others` are the files of
    each split that is not, by its name, and `unread` those of no split where others have one;
    `missing` says which parts are not there."""

    files: tuple[Path, ...]
    others: dict[str, tuple[Path, ...]]
    unread: tuple[Path, ...] = ()
    missing: str = ""
    split: str | None = None

    @property
    def held_out(self) -> str | None:
        """The split beside the one that is read which is for evaluation: validation before test."""
        kinds = {name: split_of(Path(name)) for name in self.others}
        return next(
            (name for kind in ("validation", "test") for name in kinds if kinds[name] == kind), None
        )


def is_metadata(path: Path) -> bool:
    """Whether a file is about a dataset, a model or a run, and holds no rows; by its name alone."""
    if path.name in _OF_A_RUN:
        return any((path.parent / mark).exists() for mark in ("lock", "config.yml"))
    return path.name in _ABOUT or (path.name.startswith("cache-") and path.suffix == ".arrow")


def split_of(path: Path) -> str | None:
    """The split that a file or a folder belongs to by its name; None where that names none.

    `train_sft-00000-of-00003` is of the split train_sft, `my_train.jsonl` of train.
    """
    name = path.name[: -len(ending_of(path)) or None] if ending_of(path) in READERS else path.name
    shard = _SHARD.fullmatch(name)
    words = re.split(r"[^a-z]+", (shard[1] if shard else name).lower())
    found = [match for word in (words[0], words[-1]) if (match := _WORD.fullmatch(word))]
    if not found:
        return None
    split = next(iter(kind for kind, text in found[0].groupdict().items() if text))
    return shard[1] if shard and found[0].string == words[0] and len(words) > 1 else split


def choose_files(root: Path, split: str | None) -> Chosen:
    """The files of a folder's split, train by default. Raises UserError where there is none."""
    saved = _saved_splits(root)
    files = _splits(root) if saved is None else saved
    files = {name: paths for name, paths in files.items() if paths}
    if not files:
        raise _holds_none(root)
    names = [name for name in files if name is not None]
    wanted = _wanted(root, split, names, None in files)
    return Chosen(
        files[wanted],
        {name: files[name] for name in names if name != wanted},
        () if wanted is None else files.get(None, ()),
        _missing_parts(files[wanted]),
        wanted,
    )


def require_split(path: Path, split: str | None) -> None:
    """Raises UserError where one file is asked for a split that it is not."""
    if split in (None, TRAIN) or split == split_of(path):
        return
    raise UserError(
        f"{path} has no split named {split}.",
        "It is one file, and all of its rows are read.",
        "Remove `split`, or name the folder whose files are the splits.",
    )


def _wanted(root: Path, split: str | None, names: list[str], any_other: bool) -> str | None:
    """Which of the splits `names` is read; None for the files of no split."""
    if split is not None:
        near = split_of(Path(split))
        if split in names or near in names:
            return split if split in names else near
        if split == TRAIN and any_other:
            return None
        has = f"It has the splits {', '.join(names)}." if names else "Its files name no split."
        fix = f"Write `split: {names[0]}`." if names else "Remove `split`."
        raise UserError(f"{root} has no split named {split}.", has, fix)
    training = [name for name in names if name.startswith(TRAIN)]
    if TRAIN in names or len(training) == 1:
        return TRAIN if TRAIN in names else training[0]
    if not training and (any_other or len(names) == 1):
        return None if any_other else names[0]
    raise UserError(
        f"{root} has the splits {', '.join(names)}.",
        "None of them is train, and splits are not read together.",
        f"Choose one in a config: `split: {(training or names)[0]}`, or name its file.",
    )


def _splits(root: Path) -> dict[str | None, tuple[Path, ...]]:
    """The files in `root`, in its folder `data` and in folders named like a split, by split."""
    found: dict[str | None, tuple[Path, ...]] = {}

    def add(split: str | None, files: Iterable[Path]) -> None:
        found[split] = (*found.get(split, ()), *files)

    own = rows_in(root)
    for file in own:
        add(split_of(file), [file])
    data = rows_in(root / "data")
    for folder in (root, root / "data"):
        for below in _entries(folder):
            if below.is_dir() and (split := split_of(below)):
                add(split, rows_in(below))
    if data and (not own or any(map(split_of, data))):
        for file in data:
            add(split_of(file), [file])
    return found


def rows_in(folder: Path) -> tuple[Path, ...]:
    """The data files right in a folder; else its images with captions, if any has one."""
    files = tuple(
        path
        for path in _entries(folder)
        if ending_of(path) in READERS and path.is_file() and not is_metadata(path)
    )
    return files or _captioned_images(folder)


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _captioned_images(root: Path) -> tuple[Path, ...]:
    """The captions of a folder of images, with the images that lack one; none without a caption."""
    names = {path.name for path in _entries(root)}
    images = sorted(name for name in names if name.lower().endswith(IMAGE_ENDINGS))
    files: dict[Path, None] = {}  # two images may share a caption
    for name in images:
        caption = f"{os.path.splitext(name)[0]}.txt"
        files[root / (caption if caption in names else name)] = None
    return tuple(files) if any(ending_of(file) == ".txt" for file in files) else ()


def _saved_splits(root: Path) -> dict[str | None, tuple[Path, ...]] | None:
    """The files of each split of a folder that save_to_disk wrote, None where it did not."""
    if (root / _SAVED_SPLITS).is_file():
        names = _read_object(root / _SAVED_SPLITS).get("splits")
        if not isinstance(names, list) or not all(_is_name(name) for name in names):
            raise damaged(root / _SAVED_SPLITS, 'Its "splits" is not a list of names.')
        return {name: _saved_files(root / name) for name in names}
    if not (root / _SAVED).is_file() or not (root / "dataset_info.json").is_file():
        return None
    return {_read_object(root / _SAVED).get("_split"): _saved_files(root)}


def _saved_files(folder: Path) -> tuple[Path, ...]:
    state = _read_object(folder / _SAVED)
    listed = state.get("_data_files")
    given = [each.get("filename") for each in listed] if isinstance(listed, list) else [None]
    names = [name for name in given if _is_name(name)]
    if names != given or state.get("_indices_data_files"):
        raise UserError(
            f"{folder / _SAVED} does not list files of rows.",
            "It names files elsewhere, or an order of rows that is kept apart.",
            "Save the dataset again with save_to_disk, or with to_parquet.",
        )
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"There is no {folder / name}.",
                f"{_SAVED} lists it among the files of the dataset.",
                "Copy the whole folder again.",
            )
    return tuple(folder / name for name in names)


def _is_name(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        what = f"There is no {path}."
        raise UserError(what, "save_to_disk writes one.", "Copy the whole folder again.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"{error}.") from error
    if not isinstance(value, dict):
        raise damaged(path, "It is not a JSON object.")
    return value


def _missing_parts(files: tuple[Path, ...]) -> str:
    """Which numbered files are not there, in a few words."""
    shards = [_SHARD.fullmatch(path.name[: -len(ending_of(path))]) for path in files]
    groups = {(shard[1], int(shard[2])) for shard in shards if shard}
    short = [
        f"{counted(there, 'file')} of the {parts:,} of {name}"
        for name, parts in sorted(groups)
        if (there := sum(bool(s and s[1] == name) for s in shards)) < parts
    ]
    return "; ".join(short)


def _holds_none(root: Path) -> UserError:
    deeper = sorted(
        below for below in _entries(root) if below.is_dir() and any(_splits(below).values())
    )
    return UserError(
        f"{root} holds no data file.",
        f"A dataset folder holds files ending in {KNOWN_ENDINGS}, or images with a caption of the"
        " same name in a .txt file; of its subfolders only data and those of splits are read.",
        f"Name {deeper[0]} instead." if deeper else "Name another folder, or a file.",
    )

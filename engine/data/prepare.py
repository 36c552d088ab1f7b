"""Tokenizes datasets once: a folder of arrays named after everything that their bytes depend on.

The name is a hash of the rows, the format keys, the tokenizer and the renderer, and of nothing
that labels or length rules can decide at load; so a changed switch costs nothing and an unchanged
dataset is never tokenized twice. Writing streams and survives SIGKILL: everything since the last
durable point may be lost, nothing before it, and a second writer goes on from there to
byte-identical files. A lock keeps two processes off the same folder.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from msgspec import convert, to_builtins

from engine.chat.conversation import RowProblem
from engine.chat.images import ImageSpec
from engine.chat.render import RENDERER_VERSION, LabelRule, Rendered
from engine.chat.tokenizer import ChatTokenizer
from engine.config import DatasetConfig, RunConfig
from engine.data.prepared import ARRAYS, META, Counts, Prepared, count_elements, read_meta
from engine.data.requests import Progress, ResolveRevision, ask_worker
from engine.data.rows import (
    ImageFinder,
    ImageName,
    ImageRules,
    RenderedRow,
    adapt_tokenizer,
    effective_datasets,
    image_digest,
    iterate_rendered,
)
from engine.data.sources import Location, locate
from engine.data.web_images import NetworkDown, WebImages, check_url, is_web
from engine.errors import UserError, WorkError
from engine.files import PRIVATE, sweep, sync, write_whole

# Raised when the files in a folder of arrays change their meaning.
LAYOUT_VERSION = 2
_HASH_BLOCK_BYTES = 2**20
_PROGRESS_ROWS = 64
_LOCK_POLL_SECONDS = 0.2
_COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
_STATE = "progress.json"
_LISTED_PROBLEMS = 100
_SECOND_LOOK_SECONDS = 10.0

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Interval:
    """How much is written between two durable points, each of which costs one fsync a file.

    The tokens bound the memory too: 9 bytes a token wait here.
    """

    rows: int = 10_000
    tokens: int = 2_000_000


def label_rule(config: RunConfig) -> LabelRule:
    """Which kinds of tokens the run learns."""
    return LabelRule(thinking=config.train_on_thinking, inputs=config.train_on_inputs)


def default_store(config: RunConfig, folder: Path) -> Path:
    """Where prepared arrays are kept: `dataset_prepared_path`, else the user's cache folder."""
    if config.dataset_prepared_path:
        return folder / os.path.expanduser(config.dataset_prepared_path)
    from platformdirs import user_cache_path

    return user_cache_path("windtunnel") / "prepared"


def prepare(
    config: RunConfig,
    folder: Path,
    tokenizer: ChatTokenizer,
    store: Path,
    progress: OnProgress | None = None,
    *,
    datasets: Sequence[DatasetConfig] | None = None,
    interval: Interval | None = None,
) -> Prepared:
    """The arrays of `datasets` (the config's training sets by default), made or found in `store`.

    Relative data paths start at `folder`. `interval` is how much may be lost to a kill.
    `progress` may raise to cancel; the work so far is kept.

    Raises `UserError` when a dataset cannot be read, no row is usable or nothing would be learned,
    `WorkError` when a file changes while it is read or the disk fails.
    """
    report = progress or (lambda _: None)
    chosen = config if datasets is None else config.model_copy(update={"datasets": tuple(datasets)})
    if not chosen.datasets:
        raise UserError(
            "The config names no dataset.",
            "Its list of datasets is empty.",
            "Add `datasets:` with a `path:` to the config.",
        )
    job = _plan(chosen, folder, tokenizer, report)
    try:
        store.mkdir(PRIVATE, parents=True, exist_ok=True)
        with _locked(store / f"{job.key}.lock", report):
            reused = _is_whole(store / job.key) and not _is_stale(store / job.key, job, report)
            if not reused:
                _make(store / job.key, job, interval or Interval(), report)
    except OSError as error:
        raise WorkError(
            f"The rows cannot be made into arrays in {store}.",
            f"{error.strerror or error}: {error.filename or 'the last file written'}.",
            "Free space there or set dataset_prepared_path; what is done so far is kept.",
        ) from error
    prepared = Prepared(store / job.key, reused=reused)
    prepared.refuse_if_nothing_learned(label_rule(config))
    return prepared


@dataclass(frozen=True, slots=True)
class _Job:
    """Where the rows and images are, the key of their arrays, and the rows from one on."""

    locations: tuple[Location, ...]
    stamps: tuple[tuple[int, ...], ...]
    total_bytes: int
    key: str
    rows: Callable[[int], Iterator[RenderedRow]]
    finders: tuple[ImageFinder, ...]
    image_spec: ImageSpec | None


def _plan(config: RunConfig, folder: Path, tokenizer: ChatTokenizer, report: OnProgress) -> _Job:
    datasets = tuple(_pinned(dataset, folder) for dataset in effective_datasets(config))
    pinned = config.model_copy(update={"datasets": datasets})
    locations = tuple(locate(dataset, folder) for dataset in datasets)
    stamps = _stamps(locations)
    total_bytes = sum(size for size, *_ in stamps)
    rules = ImageRules.from_config(config, folder)
    spec = adapt_tokenizer(tokenizer, rules).image
    private = config.allow_private_image_hosts
    again = WebImages(private=private, pauses=())
    recipe = {
        "layout": LAYOUT_VERSION,
        "rendering": RENDERER_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "image": asdict(spec) if spec else None,
        "history_thinking": config.history_thinking,
        **({"private_images": True} if private else {}),
        # All keys that can reach the arrays: one too many costs a tokenization, one too few a run.
        "formats": [each.model_dump(mode="json", exclude={"path", "weight"}) for each in datasets],
        "rows": [_content(location, total_bytes, report) for location in locations],
    }
    text = json.dumps(recipe, sort_keys=True)
    return _Job(
        locations,
        stamps,
        total_bytes,
        hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        lambda skip: iterate_rendered(
            pinned,
            folder,
            tokenizer,
            skip=skip,
            web=WebImages(private=private),
        ),
        tuple(ImageFinder(index, place, rules, again) for index, place in enumerate(locations)),
        spec,
    )


def _pinned(dataset: DatasetConfig, folder: Path) -> DatasetConfig:
    if locate(dataset, folder).hub_id is None or _COMMIT_HASH.fullmatch(dataset.revision or ""):
        return dataset
    (commit,) = ask_worker(ResolveRevision(dataset))
    return dataset.model_copy(update={"revision": commit})


def _stamps(locations: Sequence[Location]) -> tuple[tuple[int, ...], ...]:
    return tuple(stamp for location in locations for stamp in location.stamps())


def _content(location: Location, total_bytes: int, report: OnProgress) -> list[list[str]]:
    """Name and hash of each file. The name is the one that messages show, so a moved set is known.

    Nothing is remembered by size and time: hashing costs a second a gigabyte, an unseen edit costs
    a run.
    """
    if location.hub_id is not None:
        return [["hub", location.hub_id]]
    hashes, done = [], 0
    for file in location.files:
        digest = hashlib.blake2b(digest_size=16)
        with file.open("rb") as stream:
            while block := stream.read(_HASH_BLOCK_BYTES):
                digest.update(block)
                done += len(block)
                report(Progress("hashing", 0, done, total_bytes))
        hashes.append([location.name(file), digest.hexdigest()])
    return hashes


@contextmanager
def _locked(path: Path, report: OnProgress) -> Iterator[None]:
    """Holds the lock file; the system lets go of it when the process ends, however it ends."""
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                report(Progress("waiting"))
                time.sleep(_LOCK_POLL_SECONDS)
        yield


def _is_whole(folder: Path) -> bool:
    try:
        read_meta(folder)
    except WorkError:
        return False
    return True


def _is_stale(folder: Path, job: _Job, report: OnProgress) -> bool:
    """Whether an image that the rows name has other bytes than in the arrays, or has appeared.

    One that is gone leaves them as they are: they hold its bytes. Of each host of the web that had
    none, one is asked for again.
    """
    missing: dict[str, ImageName] = {}
    for name in read_image_names(folder):
        if is_web(name.name):
            if name.digest is None:
                with suppress(RowProblem):
                    missing.setdefault(check_url(name.name)[1], name)
            continue
        report(Progress("hashing", 0, job.total_bytes, job.total_bytes))
        try:
            content = job.finders[name.dataset].read(name.name, name.beside)
        except RowProblem:
            continue
        if image_digest(content) != name.digest:
            return True
    deadline = time.monotonic() + _SECOND_LOOK_SECONDS
    for name in missing.values():
        if time.monotonic() > deadline:
            break
        with suppress(RowProblem, WorkError):
            job.finders[name.dataset].read(name.name, name.beside)
            return True
    return False


def _make(target: Path, job: _Job, interval: Interval, report: OnProgress) -> None:
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists() and _is_stale(partial, job, report):
        shutil.rmtree(partial)
    if not _is_whole(partial):
        _fill(partial, job, interval, report)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    sync(target.parent)


def _fill(partial: Path, job: _Job, interval: Interval, report: OnProgress) -> None:
    writer = ArrayWriter(partial, interval)
    try:
        state = writer.state
        for row in job.rows(state.source_rows):
            writer.add(row)
            if state.source_rows % _PROGRESS_ROWS == 0:
                report(Progress("tokenizing", state.source_rows, row.read_bytes, job.total_bytes))
        if _stamps(job.locations) != job.stamps:
            shutil.rmtree(partial)
            raise WorkError(
                "A data file changed while it was being read.",
                "Its size or time is not what it was at the start.",
                "Wait until nothing writes to it and run again.",
            )
        if state.rows == 0:
            shutil.rmtree(partial)
            problem = state.problems[0]
            raise UserError(
                f"None of the {state.source_rows} rows can be used.",
                f"{problem.unit.capitalize()} {problem.line} of {problem.file}: {problem.what}"
                f" {problem.why}",
                problem.fix,
            )
        writer.finish(job.key, job.image_spec)
    except NetworkDown:
        # Rows were taken for bad whose images are there when the network is.
        shutil.rmtree(partial)
        raise
    finally:
        writer.close()


def content_hash(rendered: Rendered) -> int:
    """64 bits that are equal for rows with the same ids and the same images."""
    ids = np.ascontiguousarray(rendered.input_ids, dtype="<u4")
    content = hashlib.blake2b(ids.tobytes(), digest_size=8)
    for image in rendered.images:
        content.update(image_digest(image.content).encode())
    return int.from_bytes(content.digest(), "little")


class ArrayWriter:
    """The array files in `folder`, at the end of what is durable there.

    `state.source_rows` is how many rows of the source the caller has to skip.
    """

    def __init__(self, folder: Path, interval: Interval) -> None:
        folder.mkdir(PRIVATE, exist_ok=True)
        sweep(folder)
        self._folder = folder
        self._interval = interval
        self.state = _read_state(folder)
        self._pending: dict[str, list[Any]] = {name: [] for name in ARRAYS}
        self._pending_tokens = self._since = 0
        self._files = {name: self._open(name) for name in ARRAYS}
        self._images = _read_images(folder, self.state)
        self._names = set(read_image_names(folder, self.state.image_name_bytes))
        if self.state.rows == 0:
            for name in ("offsets", "row_images", "image_offsets"):
                self._pending[name].append(0)

    def _open(self, name: str) -> IO[bytes]:
        path = self._folder / name
        path.touch()
        file = path.open("rb+")
        file.truncate(_durable_bytes(name, self.state))
        file.seek(0, os.SEEK_END)
        return file

    def add(self, row: RenderedRow) -> None:
        """One row; a bad one is counted and the first hundred are kept."""
        state = self.state
        state.source_rows += 1
        self._since += 1
        self._add_names(row.image_names)
        if row.problem is not None:
            state.bad_rows += 1
            if len(state.problems) < _LISTED_PROBLEMS:
                state.problems.append(row.bad_row(row.problem))
        else:
            assert row.rendered is not None
            assert row.conversation is not None
            for note in row.conversation.notes:
                state.notes[note.id] = state.notes.get(note.id, 0) + 1
            self._append(row, row.rendered)
        if self._since >= self._interval.rows or self._pending_tokens >= self._interval.tokens:
            self.commit()

    def _append(self, row: RenderedRow, rendered: Rendered) -> None:
        state, pending = self.state, self._pending
        if state.files[-1:] != [row.file]:
            state.files.append(row.file)
        state.rows += 1
        state.tokens += len(rendered.input_ids)
        self._pending_tokens += len(rendered.input_ids)
        pending["ids"].append(rendered.input_ids)
        pending["kinds"].append(rendered.kinds)
        pending["sources"].append(rendered.sources)
        pending["offsets"].append(state.tokens)
        pending["lines"].append(row.line)
        pending["files"].append(len(state.files) - 1)
        pending["datasets"].append(row.dataset)
        pending["hashes"].append(content_hash(rendered))
        for image in rendered.images:
            number = self._store(image.content)
            pending["image_grids"] += (number, image.rows, image.columns)
        state.placed_images += len(rendered.images)
        pending["row_images"].append(state.placed_images)

    def _store(self, content: bytes | memoryview) -> int:
        """The number of an image; its bytes are written where they are new."""
        digest, state = image_digest(content), self.state
        number = self._images.setdefault(digest, state.images)
        if number == state.images:
            # Written at once, as images are too large to wait in memory.
            self._files["images"].write(content)
            state.images += 1
            state.image_bytes += len(content)
            self._pending["image_offsets"].append(state.image_bytes)
        return number

    def _add_names(self, names: Sequence[ImageName]) -> None:
        for name in names:
            if name not in self._names:
                self._names.add(name)
                line = json.dumps(astuple(name)).encode() + b"\n"
                self._pending["image_names"].append(np.frombuffer(line, np.uint8))
                self.state.image_name_bytes += len(line)

    def commit(self) -> None:
        """A durable point: what was added until now survives."""
        for name, dtype in ARRAYS.items():
            waiting = self._pending[name]
            if waiting:
                block = (
                    np.concatenate(waiting).astype(dtype, copy=False)
                    if isinstance(waiting[0], np.ndarray)
                    else np.array(waiting, dtype=dtype)
                )
                if name == "kinds":
                    self._count(block)
                self._files[name].write(block.data)
                waiting.clear()
            elif name != "images":
                continue
            self._files[name].flush()
            os.fsync(self._files[name].fileno())
        self._write_json(_STATE, asdict(self.state))
        self._pending_tokens = self._since = 0

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        text = json.dumps(to_builtins(value, str_keys=True), indent=1, sort_keys=True)
        write_whole(self._folder / name, text.encode())

    def _count(self, kinds: Any) -> None:
        counts = Counter(self.state.kind_counts)
        counts.update({kind: int(count) for kind, count in enumerate(np.bincount(kinds)) if count})
        self.state.kind_counts = dict(counts)

    def finish(self, key: str, image_spec: ImageSpec | None = None) -> None:
        """Commits and writes meta.json: `key` and the counts, nothing of when or how fast.

        `image_spec` is how the images, where there are any, are brought to their grids.
        """
        self.commit()
        self.close()
        spec = astuple(image_spec) if image_spec and self.state.images else None
        self._write_json(META, {"key": key, "image": spec, **asdict(self.state)})
        (self._folder / _STATE).unlink()
        sync(self._folder)

    def close(self) -> None:
        """Closes the files; what is not committed is dropped by the next writer."""
        for file in self._files.values():
            file.close()


def _durable_bytes(name: str, state: Counts) -> int:
    if name in ("offsets", "row_images", "image_offsets") and not state.rows:
        return 0
    return np.dtype(ARRAYS[name]).itemsize * count_elements(name, state)


def _read_images(folder: Path, state: Counts) -> dict[str, int]:
    """Digest -> number of the images that are durable."""
    numbers: dict[str, int] = {}
    if state.images:
        ends = np.fromfile(folder / "image_offsets", ARRAYS["image_offsets"], state.images + 1)
        with (folder / "images").open("rb") as file:
            for size in np.diff(ends).tolist():
                numbers[image_digest(file.read(size))] = len(numbers)
    return numbers


def read_image_names(folder: Path, size_bytes: int | None = None) -> list[ImageName]:
    """What the rows behind these arrays called their images; a line cut by a kill is left out."""
    try:
        with (folder / "image_names").open("rb") as file:
            lines = file.read() if size_bytes is None else file.read(size_bytes)
    except FileNotFoundError:
        return []
    whole = lines[: lines.rfind(b"\n") + 1].splitlines()
    return [ImageName(*json.loads(line)) for line in whole]


def _read_state(folder: Path) -> Counts:
    """The last durable point, or the beginning where there is none that can be trusted."""
    try:
        state = convert(json.loads((folder / _STATE).read_text("utf-8")), Counts, str_keys=True)
        sizes: Sequence[tuple[int, int]] = [
            ((folder / name).stat().st_size, _durable_bytes(name, state)) for name in ARRAYS
        ]
    except (OSError, ValueError, TypeError):
        return Counts()
    return state if all(present >= durable for present, durable in sizes) else Counts()

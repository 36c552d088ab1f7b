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
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from engine.chat.conversation import RowProblem
from engine.chat.images import ImageSpec
from engine.chat.render import RENDERER_VERSION, LabelRule
from engine.chat.tokenizer import ChatTokenizer
from engine.config import DatasetConfig, RunConfig
from engine.data.arrays import STATE, ArrayWriter, Block, Interval, block_of, read_image_names
from engine.data.prepared import Prepared, read_meta
from engine.data.requests import Progress, ResolveRevision, ask_worker
from engine.data.rows import (
    ImageFinder,
    ImageName,
    ImageRules,
    RenderedRow,
    adapt_tokenizer,
    effective_datasets,
    image_digest,
)
from engine.data.shares import BLOCK_ROWS, Task, iterate_parts
from engine.data.sources import Location, locate
from engine.data.web_images import NetworkDown, WebImages, check_url, is_web
from engine.errors import UserError, WorkError
from engine.files import PRIVATE, SUMS, changed_file, sync

# Raised when the files in a folder of arrays change their meaning.
LAYOUT_VERSION = 4
_HASH_BLOCK_BYTES = 2**20
_LOCK_POLL_SECONDS = 0.2
_COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
_LISTED_PROBLEMS = 100
_SECOND_LOOK_SECONDS = 10.0

OnProgress = Callable[[Progress], None]


class MakeBlocks(Task[Block], tag="prepare", frozen=True):
    """The rows as the array files hold them."""

    made: ClassVar = Block

    def make(self, rows: Sequence[RenderedRow]) -> Block:
        return block_of(rows)


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
    `progress` may raise to cancel; the work so far is kept. What is found is read once to compare
    its digests, at 1.7 GB a second of one core; where they differ, it is made again.

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
            damaged = changed_file(store / job.key) or ""
            reused = not damaged and _is_whole(store / job.key)
            reused = reused and not _is_stale(store / job.key, job, report)
            if not reused:
                _make(store / job.key, job, interval or Interval(), report)
    except OSError as error:
        raise WorkError(
            f"The rows cannot be made into arrays in {store}.",
            f"{error.strerror or error}: {error.filename or 'the last file written'}.",
            "Free space there or set dataset_prepared_path; what is done so far is kept.",
        ) from error
    prepared = Prepared(store / job.key, reused=reused, damaged=damaged)
    prepared.refuse_if_nothing_learned(label_rule(config))
    return prepared


def find_prepared(config: RunConfig, folder: Path, tokenizer: ChatTokenizer) -> Prepared | None:
    """The arrays that `prepare` would find done in the default store; None where it would work.

    Nothing is fetched, so of a set on the hub nothing is known. Raises UserError where a dataset
    cannot be read.
    """
    store = default_store(config, folder)
    if not store.is_dir() or any(locate(each, folder).hub_id for each in config.datasets):
        return None
    job = _plan(config, folder, tokenizer, lambda _: None, fetches=False)
    place = store / job.key
    if not _is_whole(place) or changed_file(place) or _is_stale(place, job, lambda _: None):
        return None
    return Prepared(place)


@dataclass(frozen=True, slots=True)
class _Job:
    """The rows, where they and their images are, and the key of their arrays."""

    locations: tuple[Location, ...]
    stamps: tuple[tuple[int, ...], ...]
    total_bytes: int
    key: str
    config: RunConfig
    folder: Path
    tokenizer: ChatTokenizer
    web: WebImages
    finders: tuple[ImageFinder, ...]
    image_spec: ImageSpec | None


def _plan(
    config: RunConfig,
    folder: Path,
    tokenizer: ChatTokenizer,
    report: OnProgress,
    *,
    fetches: bool = True,
) -> _Job:
    datasets = tuple(_pinned(dataset, folder) for dataset in effective_datasets(config))
    pinned = config.model_copy(update={"datasets": datasets})
    locations = tuple(locate(dataset, folder) for dataset in datasets)
    stamps = _stamps(locations)
    total_bytes = sum(size for size, *_ in stamps)
    rules = ImageRules.from_config(config, folder)
    spec = adapt_tokenizer(tokenizer, rules).image
    private = config.allow_private_image_hosts
    again = WebImages(private=private, pauses=()) if fetches else None
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
        pinned,
        folder,
        tokenizer,
        WebImages(private=private),
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
    return (folder / SUMS).is_file()


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
    if changed_file(partial) or not _is_whole(partial):
        _fill(partial, job, interval, report)
    (partial / STATE).unlink(missing_ok=True)  # a kill may have come right before
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    sync(target.parent)


def _fill(partial: Path, job: _Job, interval: Interval, report: OnProgress) -> None:
    writer = ArrayWriter(partial, interval)
    try:
        state = writer.state
        task = MakeBlocks(
            config=job.config,
            folder=job.folder,
            skip=state.source_rows,
            block_rows=min(BLOCK_ROWS, interval.rows),
        )
        with closing(iterate_parts(task, job.tokenizer, job.web)) as parts:
            for part in parts:
                writer.add(part.made)
                report(Progress("tokenizing", state.source_rows, part.read_bytes, job.total_bytes))
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

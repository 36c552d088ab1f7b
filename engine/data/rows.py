"""From datasets to rendered rows, one after another: the one path of check, preview and prepare.

What a person previews and what training reads come from the same generator, so that the two cannot
differ. The images of rows are looked up here. A row is a stranger's text, so a path in it reaches
only the dataset's own folder and `image_folder`, links followed; the web is asked only where the
caller allows it, over http and https, and what it sends is kept in the user's cache by URL.
"""

import hashlib
import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from email.message import Message as Headers
from http.client import HTTPException
from pathlib import Path
from typing import IO, Literal
from urllib.parse import unquote, urlsplit

from engine.chat.conversation import Conversation, Image, Message, RowFormat, RowProblem
from engine.chat.images import IMAGE_LIMIT_BYTES, ImageSpec, Resample, check_image
from engine.chat.render import Rendered, render_settled
from engine.chat.row import read_row
from engine.chat.rules import settle
from engine.chat.tokenizer import ChatTokenizer
from engine.config import DatasetConfig, RunConfig
from engine.data.content import SourceRow
from engine.data.sources import Location, iterate_rows, locate
from engine.data.statistics import BadRow
from engine.errors import UserError, WorkError
from engine.files import write_whole

# Without a byte for so long, and for one image in all.
SILENCE_SECONDS = 20.0
TOTAL_SECONDS = 120.0
_BLOCK_BYTES = 2**16
_AGENT = "windtunnel"
# The server's word that there is no image here; every other status may pass.
_GONE = (400, 401, 403, 404, 405, 406, 410, 414, 415, 451)
_WEB = ("http", "https")


@dataclass(frozen=True, slots=True)
class ImageRules:
    """What a config says of images: the folder beside the dataset's, their size, and the web.

    `longest` is a limit of the longest side in pixels below the tokenizer's own.
    """

    folder: Path
    longest: int | None = None
    resample: Resample = "bicubic"
    fetch: bool = False

    @classmethod
    def from_config(cls, config: RunConfig, folder: Path, *, fetch: bool = False) -> "ImageRules":
        """The rules of a config in `folder`. Raises UserError where `image_folder` is none."""
        root = folder
        if config.image_folder:
            root = folder / os.path.expanduser(config.image_folder)
            if not os.path.isdir(root):
                raise UserError(
                    f"There is no folder {config.image_folder}.",
                    "image_folder names it, and the images of the rows would be looked up there.",
                    "Correct image_folder, or leave it out: then it is the config's own folder.",
                )
        size = config.image_size
        return cls(
            root,
            max(size) if isinstance(size, list) else size,
            config.image_resize_algorithm or "bicubic",
            fetch,
        )

    def adapt(self, spec: ImageSpec) -> ImageSpec:
        """The tokenizer's spec under these rules."""
        return replace(
            spec, longest=min(spec.longest, self.longest or spec.longest), resample=self.resample
        )


@dataclass(frozen=True, slots=True)
class ImageName:
    """A name that a row gave an image: the name, the folder of its data file inside the dataset,
    and the digest of what was found, None where nothing was.
    """

    dataset: int
    beside: str
    name: str
    digest: str | None


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """One row of a dataset and what became of it.

    `number` counts the rows of all datasets from 1, bad ones too. `problem` is None or the reason
    why the later fields are; without a tokenizer `rendered` is None on good rows too.
    """

    number: int
    line: int
    file: str
    dataset: int
    read_bytes: int
    problem: RowProblem | None = None
    conversation: Conversation | None = None
    rendered: Rendered | None = None
    image_names: tuple[ImageName, ...] = ()
    """Paths and URLs that the row, good or bad, named."""
    unit: Literal["line", "row"] = "line"
    """What `line` counts."""

    def bad_row(self, problem: RowProblem) -> BadRow:
        """What is reported of a row that cannot be used."""
        said = (problem.message, problem.what, problem.why, problem.fix)
        return BadRow(self.file, self.number, self.line, *said, self.unit)


def effective_datasets(
    config: RunConfig, *, reasoning_effort: str | None = None
) -> tuple[DatasetConfig, ...]:
    """The config's datasets with its own `chat_template_kwargs` filled into each.

    A dataset's own value wins over the run's, `reasoning_effort` over both.
    """
    forced = {"reasoning_effort": reasoning_effort} if reasoning_effort else {}

    def merged(dataset: DatasetConfig) -> DatasetConfig:
        below, own = config.chat_template_kwargs or {}, dataset.chat_template_kwargs or {}
        update = {"chat_template_kwargs": {**below, **own, **forced} or None}
        return dataset.model_copy(update=update)

    return tuple(map(merged, config.datasets))


def iterate_rendered(
    config: RunConfig,
    folder: Path,
    tokenizer: ChatTokenizer | None,
    *,
    reasoning_effort: str | None = None,
    skip: int = 0,
    fetch: bool = False,
) -> Iterator[RenderedRow]:
    """Every row of every dataset of a config, in order; the first `skip` are read, not rendered.

    Paths start at `folder`. `reasoning_effort` wins over what config and datasets say; `fetch`
    lets images come from the web. Raises what `iterate_rows` raises, and UserError where
    `image_folder` is none; a bad row is yielded with its problem.
    """
    rules = ImageRules.from_config(config, folder, fetch=fetch)
    tokenizer = adapt_tokenizer(tokenizer, rules) if tokenizer else None
    number = 0
    datasets = effective_datasets(config, reasoning_effort=reasoning_effort)
    for index, dataset in enumerate(datasets):
        row_format = RowFormat.from_config(dataset)
        finder = ImageFinder(index, locate(dataset, folder), rules)
        for source in iterate_rows(dataset, folder):
            number += 1
            if number <= skip:
                continue
            place = (number, source.line, source.file, index, source.read_bytes)
            conversation = rendered = problem = None
            try:
                read = finder.resolve(_read(source, row_format), source.file)
                if tokenizer:
                    read = settle(read, tokenizer, config.history_thinking)
                    rendered = render_settled(read, tokenizer)
                conversation = read
            except RowProblem as error:
                problem = error
            names = finder.take_names()
            yield RenderedRow(*place, problem, conversation, rendered, names, source.unit)


def adapt_tokenizer(tokenizer: ChatTokenizer, rules: ImageRules) -> ChatTokenizer:
    """The tokenizer with its images as the rules want them."""
    if tokenizer.image is None:
        return tokenizer
    return replace(tokenizer, image=rules.adapt(tokenizer.image))


def _read(source: SourceRow, row_format: RowFormat) -> Conversation:
    if source.row is None:
        assert source.problem is not None
        raise source.problem
    return read_row(source.row, row_format)


def image_digest(content: bytes | memoryview) -> str:
    """128 bits by which the bytes of an image are known."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class ImageFinder:
    """Looks up the images of one dataset, and remembers what its rows named."""

    def __init__(self, dataset: int, location: Location, rules: ImageRules) -> None:
        self._dataset = dataset
        self._own = location.folder
        self._rules = rules
        self._names: list[ImageName] = []

    def take_names(self) -> tuple[ImageName, ...]:
        """What rows named since the last call."""
        taken, self._names = tuple(self._names), []
        return taken

    def resolve(self, conversation: Conversation, file: str) -> Conversation:
        """The conversation with the bytes and the size of every image.

        `file` is the data file's name as the dataset names it. Raises RowProblem, with the message
        at fault; WorkError where the web does not answer.
        """
        if not any(message.holds(Image) for message in conversation.messages):
            return conversation
        beside = os.path.dirname(file)
        messages = tuple(
            self._resolve_message(message, beside) if message.holds(Image) else message
            for message in conversation.messages
        )
        return replace(conversation, messages=messages)

    def _resolve_message(self, message: Message, beside: str) -> Message:
        try:
            parts = [
                self._open(part, beside) if isinstance(part, Image) else part
                for part in message.parts
            ]
        except RowProblem as problem:
            problem.message = message.source if message.source >= 0 else None
            raise
        return replace(message, content=tuple(parts))

    def _open(self, image: Image, beside: str) -> Image:
        content = image.content
        if isinstance(content, str):
            content = self._read_named(content, beside)
        return Image(content, check_image(content))

    def _read_named(self, name: str, beside: str) -> bytes:
        digest = None
        try:
            content = self.read(name, beside)
            digest = image_digest(content)
        finally:
            self._names.append(ImageName(self._dataset, beside, name, digest))
        return content

    def read(self, name: str, beside: str) -> bytes:
        """The bytes behind a path or a URL. Raises RowProblem where there are none to read."""
        scheme = urlsplit(name).scheme.lower() if "://" in name else ""
        if scheme in _WEB:
            return fetch_image(name) if self._rules.fetch else _need_fetched(name)
        if scheme == "file":
            name = unquote(name[len("file://") :]).removeprefix("localhost")
        elif scheme:
            raise RowProblem(
                "The image's URL is of a kind that is not read.",
                f"It begins with {scheme}://, and http, https and file are read.",
                "Download the image, and name the file.",
            )
        return _read_file(self._find(name, beside))

    def _find(self, name: str, beside: str) -> Path:
        folders = ([] if self._own is None else [self._own / beside, self._own]) + [
            self._rules.folder
        ]
        allowed = [os.path.realpath(folder) for folder in folders]
        for folder in folders:
            # os.path, unlike pathlib, answers a name that no file system can hold with False.
            place = os.path.join(folder, name)
            if "\0" in name or not os.path.exists(place):
                continue
            real = os.path.realpath(place)
            if any(os.path.commonpath((real, root)) == root for root in allowed):
                return Path(real)
            raise RowProblem(
                f"The image {_short(name)} is outside the dataset.",
                f"It leads to {os.path.dirname(real)}, and only"
                f" {' and '.join(dict.fromkeys(allowed))} may be read.",
                "Copy it there, or name its folder in image_folder.",
            )
        raise RowProblem(
            f"There is no image {_short(name)}.",
            f"It was looked up in {' and '.join(dict.fromkeys(allowed))}.",
            "Put it there, or name its folder in image_folder.",
        )


def _short(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:97]}..."


def _need_fetched(url: str) -> bytes:
    found = find_fetched(url)
    if found is None:
        raise RowProblem(
            "The image is on the web and was not fetched.",
            f"{_short(url)} is not on this computer, and looking at rows fetches nothing.",
            "Run windtunnel prepare with the config: it fetches every image once.",
        )
    return found


def _read_file(path: Path) -> bytes:
    try:
        # Asked before it is opened: a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise RowProblem(
                f"The image {_short(path.name)} is no file.",
                "It is a folder, a pipe or a device.",
                "Name a file.",
            )
        with path.open("rb") as file:
            return file.read(IMAGE_LIMIT_BYTES + 1)
    except OSError as error:
        raise RowProblem(
            f"The image {_short(path.name)} cannot be opened.",
            f"{error.strerror or error}.",
            "Check who may read it.",
        ) from error


def find_fetched(url: str) -> bytes | None:
    """The bytes of a URL that was fetched before, else None."""
    try:
        return _place(url).read_bytes()
    except OSError:
        return None


def fetch_image(url: str) -> bytes:
    """The image behind a URL, from the cache or the web.

    Raises RowProblem where the server says that there is none, and where what it sends is no image
    within the limits; WorkError where it does not answer: a row must not be left out because a
    network was down.
    """
    found = find_fetched(url)
    if found is not None:
        return found
    try:
        content = _download(url)
    except urllib.error.HTTPError as error:
        error.close()
        # A redirect that is not followed: to another scheme, or round in circles.
        if error.code in _GONE or error.code // 100 == 3:
            raise RowProblem(
                f"The image {url[:100]} cannot be fetched.",
                f"The server answered {error.code} {error.reason}.",
                "Correct the URL, or delete the row.",
            ) from error
        raise _unanswered(url, f"The server answered {error.code} {error.reason}.") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _unanswered(url, f"{type(error).__name__}: {reason}.") from error
    except ValueError as error:
        raise RowProblem(
            f"The image {url[:100]} cannot be fetched.",
            f"The URL is not one that is followed: {error}.",
            "Correct the URL, or delete the row.",
        ) from error
    check_image(content)
    _keep(url, content)
    return content


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Headers,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not newurl.lower().startswith(("http://", "https://")):
            raise ValueError(f"it leads to {newurl[:60]}, and only http and https are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": _AGENT})
    deadline = time.monotonic() + TOTAL_SECONDS
    opener = urllib.request.build_opener(_WebRedirects)
    with opener.open(request, timeout=SILENCE_SECONDS) as answer:
        blocks, size = [], 0
        while size <= IMAGE_LIMIT_BYTES and (block := answer.read1(_BLOCK_BYTES)):
            blocks.append(block)
            size += len(block)
            if time.monotonic() > deadline:
                raise TimeoutError(f"it took longer than {TOTAL_SECONDS:.0f} seconds")
    return b"".join(blocks)[: IMAGE_LIMIT_BYTES + 1]


def _unanswered(url: str, why: str) -> WorkError:
    return WorkError(
        f"The image {url[:100]} could not be fetched.",
        why,
        "Run the command again when the network answers; what was fetched stays.",
    )


def _place(url: str) -> Path:
    from platformdirs import user_cache_path

    name = hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return user_cache_path("windtunnel") / "images" / name[:2] / name


def _keep(url: str, content: bytes) -> None:
    place = _place(url)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, content)
    except OSError as error:
        raise WorkError(
            f"The fetched image cannot be kept in {place.parent}.",
            f"{error.strerror or error}.",
            "Free space there.",
        ) from error

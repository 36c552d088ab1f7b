"""From datasets to rendered rows, one after another: the one path of check, preview and prepare.

What a person previews and what training reads come from the same generator, so that the two cannot
differ. The images of rows are looked up here. A row is a stranger's text, so a path in it reaches
only the dataset's own folder and `image_folder`, links followed; the web is asked only where the
caller brings a `WebImages`.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import unquote

from engine.chat.conversation import Conversation, Image, JudgedRow, Message, RowFormat, RowProblem
from engine.chat.images import IMAGE_LIMIT_BYTES, ImageSpec, Resample, check_image
from engine.chat.nested import open_nested
from engine.chat.render import Rendered, render_settled
from engine.chat.row import read_row
from engine.chat.rules import settle
from engine.chat.tokenizer import ChatTokenizer
from engine.config import DatasetConfig, RunConfig
from engine.data.content import SourceRow
from engine.data.shape import list_columns
from engine.data.sources import Location, iterate_rows, locate
from engine.data.statistics import BadRow
from engine.data.web_images import is_web, read_kept
from engine.errors import UserError

# Some 2 million tokens; the longest context is 262,144.
TEXT_LIMIT_CHARACTERS = 4 * 2**20


@dataclass(frozen=True, slots=True)
class ImageRules:
    """What a config says of images: the folder beside the dataset's, and their size.

    `longest` is a limit of the longest side in pixels below the tokenizer's own.
    """

    folder: Path
    longest: int | None = None
    resample: Resample = "bicubic"

    @classmethod
    def from_config(cls, config: RunConfig, folder: Path) -> "ImageRules":
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
        )

    def adapt(self, spec: ImageSpec) -> ImageSpec:
        """The tokenizer's spec under these rules."""
        return replace(
            spec, longest=min(spec.longest, self.longest or spec.longest), resample=self.resample
        )


class Web(Protocol):
    """What fetches the images of a command."""

    def fetch(self, url: str) -> bytes:
        """The image behind a URL; raises what `WebImages.fetch` raises."""

    def finish(self) -> None:
        """After the last row; raises what `WebImages.finish` raises."""


@dataclass(frozen=True, slots=True)
class Share:
    """The rows that one of several processes makes: of blocks of `rows` rows every `count`-th."""

    index: int
    count: int
    rows: int

    def holds(self, number: int) -> bool:
        """Whether a row is in it, counted from 1 over those that all of them make."""
        return (number - 1) // self.rows % self.count == self.index


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
    weight: int = 0
    """Characters of its texts and bytes of its images."""

    def bad_row(self, problem: RowProblem) -> BadRow:
        """What is reported of a row that cannot be used."""
        said = (problem.message, problem.what, problem.why, problem.fix)
        judged = isinstance(problem, JudgedRow)
        return BadRow(self.file, self.number, self.line, *said, self.unit, judged)


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
    share: Share | None = None,
    web: Web | None = None,
) -> Iterator[RenderedRow]:
    """The rows of every dataset of a config, in order, after the first `skip`; of them a `share`.

    Paths start at `folder`. `reasoning_effort` wins over what config and datasets say; `web`
    fetches images. Raises what `iterate_rows` and `WebImages` raise, and UserError where
    `image_folder` is none; a bad row is yielded with its problem.
    """
    rules = ImageRules.from_config(config, folder)
    tokenizer = adapt_tokenizer(tokenizer, rules) if tokenizer else None
    number = 0
    absent: dict[str, str] = {}

    def is_ours(number: int) -> bool:
        return number > skip and (share is None or share.holds(number - skip))

    def wants() -> bool:
        # A name that no row had so far is looked for in all of them.
        return bool(absent) or is_ours(number + 1)

    datasets = effective_datasets(config, reasoning_effort=reasoning_effort)
    for index, dataset in enumerate(datasets):
        row_format = RowFormat.from_config(dataset)
        finder = ImageFinder(index, locate(dataset, folder), rules, web)
        absent, some = row_format.named_columns(), False
        for source in iterate_rows(dataset, folder, wants):
            if absent and source.row is not None:
                some = True
                absent = {key: name for key, name in absent.items() if not _holds(source.row, name)}
            number += 1
            if not is_ours(number):
                continue
            place = (number, source.line, source.file, index, source.read_bytes)
            conversation = rendered = problem = None
            weight = 0
            try:
                read = finder.resolve(_read(source, row_format), source.file)
                weight = _weigh(read)
                if tokenizer:
                    read = settle(read, tokenizer, config.history_thinking)
                    rendered = render_settled(read, tokenizer)
                conversation = read
            except RowProblem as error:
                problem = error
            names = finder.take_names()
            yield RenderedRow(*place, problem, conversation, rendered, names, source.unit, weight)
        if some:
            _refuse_absent(absent, dataset)
    if web:
        web.finish()


def adapt_tokenizer(tokenizer: ChatTokenizer, rules: ImageRules) -> ChatTokenizer:
    """The tokenizer with its images as the rules want them."""
    if tokenizer.image is None:
        return tokenizer
    return replace(tokenizer, image=rules.adapt(tokenizer.image))


def _holds(row: Mapping[str, object], name: str) -> bool:
    """Whether a row has a column, or its messages a key, of that name."""
    return name in open_nested(row, [name]) or any(name in keys for _, keys in list_columns(row))


def _refuse_absent(absent: Mapping[str, str], dataset: DatasetConfig) -> None:
    for key, name in absent.items():
        raise UserError(
            f"{key} names {name}, and no row of {dataset.path} has it.",
            "What it stands for would be missing from every row without a word.",
            f"Correct the name, or delete it from {key.partition('.')[0]}.",
        )


def _read(source: SourceRow, row_format: RowFormat) -> Conversation:
    if source.row is None:
        assert source.problem is not None
        raise source.problem
    return read_row(source.row, row_format)


def _weigh(conversation: Conversation) -> int:
    """Its characters and bytes of images.

    Raises RowProblem for text that takes more memory to tokenize than there may be.
    """
    characters = size = 0
    for message in conversation.messages:
        if isinstance(message.content, str):
            characters += len(message.content)
            continue
        for part in message.content:
            if isinstance(part, Image):
                size += len(part.content)
            else:
                characters += len(part.text)
    if characters > TEXT_LIMIT_CHARACTERS:
        raise RowProblem(
            "The row is too long.",
            f"It has {characters:,} characters, and {TEXT_LIMIT_CHARACTERS:,} are tokenized.",
            "Split it: no model reads so much at once.",
        )
    return characters + size


def image_digest(content: bytes | memoryview) -> str:
    """128 bits by which the bytes of an image are known."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class ImageFinder:
    """Looks up the images of one dataset, and remembers what its rows named."""

    def __init__(
        self,
        dataset: int,
        location: Location,
        rules: ImageRules,
        web: Web | None = None,
    ) -> None:
        self._dataset = dataset
        self._own = location.folder
        self._rules = rules
        self._web = web
        self._names: list[ImageName] = []

    def take_names(self) -> tuple[ImageName, ...]:
        """What rows named since the last call."""
        taken, self._names = tuple(self._names), []
        return taken

    def resolve(self, conversation: Conversation, file: str) -> Conversation:
        """The conversation with the bytes and the size of every image.

        `file` is the data file's name as the dataset names it. Raises RowProblem, with the message
        at fault; WorkError where `WebImages` does.
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
        if is_web(name):
            return self._web.fetch(name) if self._web else read_kept(name)
        scheme = name.partition("://")[0].lower() if "://" in name else ""
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

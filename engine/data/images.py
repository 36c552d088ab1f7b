"""Where the images of rows are: names in rows looked up in the folders that a dataset may read.

A row is a stranger's text, so a path in it reaches only the dataset's own folder and
`image_folder`, links followed; and the web is asked only where the caller allows it. What was
found is remembered by name and content, so that arrays can be known to be stale.
"""

import hashlib
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.chat.conversation import Conversation, Image, Message, Part, RowProblem
from engine.chat.images import IMAGE_LIMIT_BYTES, ImageSpec, Resample, check_image
from engine.config import RunConfig
from engine.data.image_fetch import fetch_image, find_fetched
from engine.data.sources import Location
from engine.errors import UserError

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
        if not self._names:
            return ()
        taken = tuple(self._names)
        self._names.clear()
        return taken

    def resolve(self, conversation: Conversation, file: str) -> Conversation:
        """The conversation with the bytes and the size of every image.

        `file` is the data file's name as the dataset names it. Raises RowProblem, with the message
        at fault; WorkError where the web does not answer.
        """
        if not any(map(_shows_image, conversation.messages)):
            return conversation
        beside = os.path.dirname(file)
        messages = tuple(
            self._resolve_message(message, beside) if _shows_image(message) else message
            for message in conversation.messages
        )
        return replace(conversation, messages=messages)

    def _resolve_message(self, message: Message, beside: str) -> Message:
        try:
            parts: list[Part] = []
            for part in message.content:
                assert not isinstance(part, str)
                parts.append(self._open(part, beside) if isinstance(part, Image) else part)
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


def _shows_image(message: Message) -> bool:
    return not isinstance(message.content, str) and any(
        isinstance(part, Image) for part in message.content
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

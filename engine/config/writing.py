"""From a RunConfig to text: a new file with the reason of each value, or a change in an own file.

A file names the values that differ from the default, and those that Axolotl, which shares the
format, has no default for.
"""

from collections.abc import Mapping
from pathlib import Path

from engine.config.document import HEADER, Document, entry, with_reason
from engine.config.editing import changed_text
from engine.config.keys import SECTIONS, section_title
from engine.config.reading import parse_config
from engine.config.rules import RunConfig
from engine.errors import UserError, WorkError
from engine.files import write_whole


def write_config(
    config: RunConfig,
    reasons: Mapping[str, str] | None = None,
    path: Path | str | None = None,
    document: Document | None = None,
) -> str:
    """The YAML text of `config`, also written to `path` when given (whole or not at all).

    `reasons` maps keys to sentences, which become comments. With the `document` of a read file,
    that file's text is kept and only values that differ are changed in it. Reading the text gives
    an equal config. Raises UserError when a value cannot be changed in the document's text, and
    WorkError when the file cannot be written.
    """
    reasons = reasons or {}
    unknown = set(reasons) - set(RunConfig.model_fields)
    if unknown:
        raise ValueError(f"reasons for keys that do not exist: {', '.join(sorted(unknown))}")
    text = _new_text(config, reasons) if document is None else _kept(config, reasons, document)
    if path is not None:
        _save(text, Path(path))
    return text


def _new_text(config: RunConfig, reasons: Mapping[str, str]) -> str:
    lines = [HEADER]
    needed = config.file_values()
    for section in SECTIONS:
        keys = [key for key in section.__annotations__ if key in needed or key in reasons]
        if keys:
            lines += ["", f"# {section_title(section)}"]
        for key in keys:
            lines += with_reason(entry(key, config.file_value(key)), reasons.get(key))
    return "\n".join(lines) + "\n"


def _kept(config: RunConfig, reasons: Mapping[str, str], document: Document) -> str:
    before = parse_config(document.text, document.name).config
    text = changed_text(document, before, config, reasons)
    try:
        same = parse_config(text, document.name).config == config
    except UserError:
        same = False
    if not same:
        raise UserError(
            f"{document.name} cannot be changed without rewriting it.",
            "Its values are shared by anchors and aliases, or laid out in a way that cannot be"
            " edited in place.",
            "Write the shared values out, or save under another name to get a new file.",
        )
    return text


def _save(text: str, path: Path) -> None:
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise WorkError(
            f"{path} could not be written.",
            f"The system says: {error.strerror}.",
            "Choose a folder that you may write to, on a disk with room.",
        ) from error

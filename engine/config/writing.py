"""From a RunConfig to text: a new file with the reason of each value, or a change in an own file.

A change works on positions in the text and replaces the characters of a value, nothing else.
ruamel's round trip keeps less: it joins the lines of a JSON file, indents lists anew, mixes line
ends, and writes 3e-05, which YAML 1.1 reads as text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from engine.config.axolotl import renamed
from engine.config.document import (
    HEADER,
    WIDTH,
    Document,
    KeyPath,
    comment_lines,
    comment_text,
    entry,
    flow,
    with_reason,
)
from engine.config.keys import SECTIONS, Section, section_title
from engine.config.reading import parse_config
from engine.config.rules import RunConfig
from engine.errors import UserError, WorkError
from engine.files import write_whole


def changed_text(
    document: Document, before: RunConfig, after: RunConfig, reasons: Mapping[str, str]
) -> str:
    """The document's text, in which `before` became `after`.

    A changed value that has a reason gets it as a comment. In a file of ours (it starts with
    HEADER) that replaces the old reason; in a person's own file no comment is touched. The sources
    of `datasets` are changed one by one while their number stays; otherwise the list is rewritten.
    """
    edits = _Edits(document, reasons)
    edits.compare((), before, after)
    return edits.applied()


@dataclass(slots=True)
class _Edits:
    document: Document
    reasons: Mapping[str, str]
    replacements: list[tuple[int, int, str]] = field(default_factory=list)

    def applied(self) -> str:
        text, done, parts = self.document.text, 0, []
        for start, end, new in sorted(self.replacements, key=lambda edit: edit[:2]):
            parts += [text[done:start], new]
            done = end
        return "".join([*parts, text[done:]])

    def compare(self, path: KeyPath, before: Section, after: Section) -> None:
        for key in type(after).model_fields:
            old, new = getattr(before, key), getattr(after, key)
            name = self.name_in_file(path, key)
            if name is None:
                inherited = (*path, key) in self.document.nodes
                if old != new if inherited else not after.is_default(key):
                    self.insert(path, key, after)
            elif old != new:
                sections = isinstance(new, tuple) and new and isinstance(new[0], Section)
                if sections and len(old) == len(new):
                    for index, (source, changed) in enumerate(zip(old, new, strict=True)):
                        self.compare((*path, name, index), source, changed)
                else:
                    self.replace(path, name, key, after)

    def name_in_file(self, path: KeyPath, key: str) -> str | None:
        """`key`, or the older spelling of it that stands in the file, or None.

        A value that comes through `<<: *anchor` does not stand here: a key of its own wins over it.
        """
        names = {pair[0].value for pair in self.mapping(path).value}
        if path or names <= RunConfig.model_fields.keys():
            return key if key in names else None
        older = [old for old, new in renamed().items() if new.key == key]
        found = [name for name in (key, *older) if name in names]
        unset = (None, False)  # `flash_attention:` stands there, `sdp_attention: true` counts
        used = [name for name in found if self.document.values[name] not in unset]
        return next(iter([*used, *found]), None)

    def replace(self, path: KeyPath, name: str, key: str, section: Section) -> None:
        parent, text = self.mapping(path), self.document.text
        key_node, value_node = next(pair for pair in parent.value if pair[0].value == name)
        start, end = self.after_colon(key_node), self.pair_end(key_node, value_node)
        if name != key:
            self.replacements.append((key_node.start_mark.index, key_node.end_mark.index, key))
        if parent.flow_style:
            new = f" {flow(section.file_value(key), json_like=True)}"
            self.replacements.append((start, end, new))
            return
        indent: int = key_node.start_mark.column
        lines = entry(key, section.file_value(key), indent)
        lines[0] = lines[0][indent + len(key) + 1 :]
        head = text[start : self.line_end(start)]
        comment = head.strip() if head.strip().startswith("#") and start < end else ""
        reason = comment_text(self.reasons.get(key, "") if not path else "")
        line_start = text.rfind("\n", 0, key_node.start_mark.index) + 1
        rest = text[end : self.line_end(end)]
        if self.is_ours():
            self.drop_reason(line_start)
            comment, end, rest = "", end + len(rest), ""
        if comment:
            lines[0] += f"  {comment}"
        if reason:
            length = indent + len(key) + 1 + len(lines[0]) + len(rest) + 2 + len(reason) + 2
            if length <= WIDTH and not comment and "#" not in rest:
                lines[0] += f"  # {reason}"
            else:
                above = self.joined([*comment_lines(reason, indent), ""])
                self.replacements.append((line_start, line_start, above))
        self.replacements.append((start, end, self.joined(lines)))

    def insert(self, path: KeyPath, key: str, section: Section) -> None:
        """Put a new key behind the one that precedes it in the order of the sections."""
        parent = self.mapping(path)
        value = section.file_value(key)
        if parent.flow_style:
            new = f"{flow(key, json_like=True)}: {flow(value, json_like=True)}"
            end = self.pair_end(*parent.value[-1])
            self.replacements.append((end, end, f", {new}"))
            return
        fields = list(type(section).model_fields)
        before = fields[: fields.index(key)]
        pairs = {pair[0].value: pair for pair in parent.value}
        known = [name for name in before if name in pairs]
        pair = pairs[known[-1]] if known else parent.value[-1]
        indent: int = parent.value[0][0].start_mark.column
        reason = self.reasons.get(key) if not path else None
        lines = with_reason(entry(key, value, indent), reason, indent)
        end = self.line_end(self.pair_end(*pair))
        self.replacements.append((end, end, self.joined(["", *lines])))

    def mapping(self, path: KeyPath) -> MappingNode:
        node = self.document.nodes[path]
        assert isinstance(node, MappingNode), path
        return node

    def is_ours(self) -> bool:
        return self.document.text.startswith(HEADER)

    def drop_reason(self, line_start: int) -> None:
        """Take out the reason above a line."""
        headings = {HEADER, *(f"# {section_title(section)}" for section in SECTIONS)}
        text, start = self.document.text, line_start
        while start:
            above = text.rfind("\n", 0, start - 1) + 1
            line = text[above:start].strip()
            if not line.startswith("#") or line in headings:
                break
            start = above
        if start < line_start:
            self.replacements.append((start, line_start, ""))

    def joined(self, lines: list[str]) -> str:
        return ("\r\n" if "\r\n" in self.document.text else "\n").join(lines)

    def after_colon(self, key_node: Node) -> int:
        return self.document.text.index(":", key_node.end_mark.index) + 1

    def line_end(self, index: int) -> int:
        text = self.document.text
        end = text.find("\n", index)
        end = len(text) if end < 0 else end
        return end - 1 if end > index and text[end - 1] == "\r" else end

    def pair_end(self, key_node: Node, value_node: Node) -> int:
        """Where the value ends; an empty one ends at its colon."""
        colon = self.after_colon(key_node)
        empty = value_node.start_mark.index == value_node.end_mark.index
        return colon if empty else max(colon, self.node_end(value_node))

    def node_end(self, node: Node) -> int:
        """End of the last character: a block's own mark stands behind the comments after it."""
        if isinstance(node, MappingNode) and node.value and not node.flow_style:
            return self.pair_end(*node.value[-1])
        if isinstance(node, SequenceNode) and node.value and not node.flow_style:
            return self.node_end(node.value[-1])
        end: int = node.end_mark.index
        return len(self.document.text[:end].rstrip()) if isinstance(node, ScalarNode) else end


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

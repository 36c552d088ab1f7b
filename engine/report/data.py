"""What was found in the rows: whether they can be used, how they look, what to know about them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from engine.config import DatasetConfig, RunConfig, write_config
from engine.data.requests import Shape
from engine.data.shape import mapped
from engine.data.statistics import (
    FEW_ROWS,
    BadRow,
    Checkup,
    FileNote,
    Finding,
    LeftOut,
    ProblemGroup,
    Unread,
    count_held_out,
    most_frequent,
)
from engine.report import Line, Mark
from engine.units import counted, stored

if TYPE_CHECKING:
    from engine.data.prepared import Counts

# What teaches something that nobody wants is worse than a repair.
_SERIOUS: Final = frozenset(
    {
        *("blank_answer", "effort_contradicts_thinking", "nothing_learned", "image_left_out"),
        *("thinking_unsure", "markers_left"),
    }
)
_RANKS: Final = "✗!·✓"


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing to know: its line, and all of it as (word, text)."""

    line: Line
    details: tuple[tuple[str, str], ...]


def rows_verdict(found: Checkup, val_set_size: float = 0, test_sets: int = 0) -> Line:
    """How many conversations there are to learn from; `test_sets` are other sets held out."""
    usable = found.usable
    if not usable:
        return Line("✗", "not usable", f"none of {counted(found.rows, 'row')} can be used")
    held_out = count_held_out(val_set_size, usable)
    text = f"{usable - held_out:,} to learn from, "
    if held_out:
        text += f"{held_out:,} held out"
    else:
        text += f"{counted(test_sets, 'other set') if test_sets else 'none'} held out"
    bad = found.bad_rows
    left_out = f"; {counted(bad, 'row')} left out" if bad else ""
    return Line("!" if bad else "✓", counted(usable, "conversation"), text + left_out)


def row_lines(found: Checkup, shape: Shape) -> list[Line]:
    """What was found in rows that can be used, a label each."""
    assert found.tokens is not None
    fewest, most = found.turns
    turns = counted(most, "turn")
    turns = turns if fewest == most else f"{fewest:,} to {turns}"
    tokens, length = found.tokens, found.tokens.row_length
    answers = found.roles.get("assistant", 0)
    thinks = f"in {tokens.thinking_answers:,} of {answers:,} answers"
    calls = f"; tool calls in {tokens.call_answers:,}" if tokens.call_answers else ""
    roles = "  ".join(f"{role} {count:,}" for role, count in found.roles.items())
    lengths = f"median {length.p50:,}  p95 {length.p95:,}  longest {length.max:,}"
    return [
        Line("", "shape", f"{shape.title}, {turns}, {found.usable:,} of {found.rows:,} rows"),
        Line("", "roles", roles),
        Line("", "thinking", (thinks if tokens.thinking else "in no answer") + calls),
        *image_lines(found),
        Line("", "length", lengths),
    ]


def image_lines(found: Checkup) -> list[Line]:
    images = found.images
    if not images.count:
        return []
    width, height = images.largest
    tokens = f", {found.tokens.by_kind['image']:,} tokens" if found.tokens else ""
    different = f"{images.different:,} different, " if images.different < images.count else ""
    size = f"{different}{stored(images.different_bytes)}, up to {width}x{height}"
    where = f"{images.count:,} in {counted(images.rows, 'row')}"
    return [Line("", "images", f"{where}{tokens}; {size}")]


def shape_lines(shape: Shape) -> list[Line]:
    """How rows look of which none can be used."""
    lines = [Line("", "columns", ", ".join(shape.columns) or "none")]
    return lines + [
        Line("", name, f"a list of {', '.join(keys)}") for name, keys in shape.lists.items()
    ]


def left_out_line(left: LeftOut | None, sequence_len: int) -> Line | None:
    """How many rows a run does not train on, and why; None where it trains on all of them whole."""
    if left is None or not (left.count or left.cut):
        return None
    limit = f"sequence_len ({sequence_len:,})"
    reasons = (
        (left.bad - left.judged, "that cannot be used"),
        (left.judged, "that field_label judges false"),
        (left.too_long, f"longer than {limit}"),
        (left.nothing_learned, "with nothing to learn"),
    )
    why = ", ".join(f"{count:,} {reason}" for count, reason in reasons if count)
    text = f"{left.count:,} of {counted(left.rows, 'row')} left out: {why}" if left.count else ""
    if 0 < left.image_rows == left.images_left_out:
        text += f"; all {counted(left.image_rows, 'row')} with images among them"
    if left.cut:
        text += f"{'; ' * bool(text)}{counted(left.cut, 'row')} cut at {limit}"
    return Line("!" if left.is_serious else "·", "", text)


def learned_text(learned: int, total: int) -> str:
    return f"{learned:,} of {counted(total, 'token')} are learned"


def bad_row_line(row: BadRow) -> Line:
    """A row that cannot be used: where it is and what is wrong; why and the repair as detail."""
    return Line("·" if row.judged else "✗", _place(row), row.what, f"{row.why} {row.fix}")


def problem_lines(groups: Sequence[ProblemGroup]) -> list[Line]:
    """The problems of rows, equal ones as one; of a row alone where it is."""
    return [
        bad_row_line(group.first) if group.count == 1 else _problem(group).line for group in groups
    ]


def list_remarks(found: Checkup) -> list[Remark]:
    """What to know, worst first; one line says so where there is nothing."""
    remarks = [
        *map(_problem, found.groups),
        *map(_file, found.files),
        *_readings(found.findings, found.unread, found.usable),
    ]
    if found.duplicates:
        text = "repeating an earlier row; repeated rows weigh more"
        fix = "dataset_exact_deduplication leaves them out, or delete them."
        remarks.append(_warning(found.duplicates, text, fix))
    if found.over_sequence_len:
        fix = "A larger sequence_len keeps them; excess_length_strategy says what becomes of them."
        remarks.append(_warning(found.over_sequence_len, "longer than sequence_len", fix))
    if 0 < found.usable < FEW_ROWS:
        fix = f"Add rows; from {FEW_ROWS} on it is less likely. Held-out rows show it."
        remarks.append(_warning(found.usable, "a model tends to learn so few by heart", fix))
    if not remarks:
        text = "no row is bad, none repeats another"
        remarks.append(Remark(Line("✓", "", text), (("what", text),)))
    return sorted(remarks, key=lambda remark: _RANKS.index(remark.line.mark))


def _readings(findings: Iterable[Finding], unread: Iterable[Unread], rows: int) -> Iterator[Remark]:
    yield from map(_finding, findings)
    yield from map(_unread, list_unread(unread, rows))


def prepared_lines(meta: "Counts") -> list[Line]:
    """What to know of how prepared rows were read, worst first, as `note_lines` says it."""
    facts = meta.facts
    found = _readings(most_frequent(facts.findings), most_frequent(facts.unread), meta.rows)
    return sorted((each.line for each in found), key=lambda line: _RANKS.index(line.mark))


def note_lines(found: Checkup) -> list[Line]:
    """What to know of the rows that can be used, worst first."""
    lines = (remark.line for remark in list_remarks(replace(found, groups=())))
    return [line for line in lines if line.mark in ("!", "·")]


def list_unread(unread: Iterable[Unread], rows: int) -> list[Line]:
    """What no rule reads, of so many rows: a line each, one for ratings, one for ids and the
    like."""
    lines, quiet, ratings = [], [], []
    for each in unread:
        share = f"{each.rows / rows:.0%}" if each.rows * 200 >= rows else "under 1%"
        if each.quiet:
            quiet.append(f"{each.name} {share}")
            continue
        if each.rating:
            ratings.append(f"{each.name} ({share}, such as {each.example})")
            continue
        text = f"in {share} of rows, not read, such as {each.example!r}"
        lines.append(Line("!", each.name, text, _read_by(each.name)))
    if ratings:
        text = f"{', '.join(ratings)} not read: badly rated answers are learned like the others"
        fix = "Leave their rows out; field_label can name a column that is false for these."
        lines.append(Line("!", "ratings", text, fix))
    if quiet:
        lines.append(Line("·", "not read", f"{', '.join(quiet)} of rows (ids, sources)"))
    return lines


def proposal_lines(dataset: DatasetConfig, proposed: Mapping[str, str]) -> list[str]:
    """The entry of a config that reads more of the rows, as YAML; none where none is known."""
    if not proposed:
        return []
    config = RunConfig(base_model="any").model_copy(
        update={"datasets": (mapped(dataset, proposed),)}
    )
    _, _, entry = write_config(config).partition("\ndatasets:")
    entry, _, _ = entry.partition("\n\n")
    return ["· In a config this entry reads more of them:", *f"datasets:{entry}".splitlines()]


def mapping_text(shape: Shape) -> str:
    """What is proposed, each column with how the first of its values begins."""
    shown = []
    for word, key in shape.proposed.items():
        example = shape.examples.get(key)
        shown.append(
            f"{word.removeprefix('field_')} = {key}" + (f" ({example})" if example else "")
        )
    return ", ".join(shown)


def _read_by(name: str) -> str:
    if name.startswith("messages[]."):
        return "message_property_mappings can name it, or delete the key."
    keys = "field_system, field_context, field_thinking and others"
    return f"A key of the dataset's entry can name it ({keys}), or delete it."


def _unread(line: Line) -> Remark:
    return Remark(line, (("what", f"{line.label}: {line.text}"), ("fix", line.detail)))


def _problem(group: ProblemGroup) -> Remark:
    first = group.first
    line = bad_row_line(first)
    more = len(group.rows) < group.count
    where = line.label
    if len(group.lines) > 1:
        lines = _numbers(group.lines, group.count > len(group.lines))
        where = f"{first.unit}s {lines} of {first.file}"
    rows = counted(group.count, "row")
    why, numbers = ("why", f"{line.label}: {first.why}"), ("rows", _numbers(group.rows, more))
    return Remark(
        Line(line.mark, rows, f"{first.what} ({where})", line.detail),
        (("what", first.what), why, ("fix", first.fix), numbers),
    )


def file_line(note: FileNote) -> Line:
    """How a file is read, or that it is not."""
    return Line("·", note.file, note.text)


def _file(note: FileNote) -> Remark:
    return Remark(file_line(note), (("file", note.file), ("what", note.text)))


def _finding(finding: Finding) -> Remark:
    lines = _numbers(finding.lines, finding.rows > len(finding.lines))
    mark: Mark = "!" if finding.id in _SERIOUS else "·"
    return Remark(
        Line(mark, counted(finding.rows, "row"), f"{finding.text} (line {lines})"),
        (("what", finding.text), ("lines", lines)),
    )


def _warning(rows: int, text: str, fix: str) -> Remark:
    count = counted(rows, "row")
    return Remark(Line("!", count, text, fix), (("what", f"{count}: {text}"), ("fix", fix)))


def _place(row: BadRow) -> str:
    message = "" if row.message is None else f", message {row.message}"
    return f"{row.unit} {row.line:,} of {row.file}{message}"


def _numbers(numbers: Iterable[int], more: bool) -> str:
    return ", ".join(f"{number:,}" for number in numbers) + " …" * more

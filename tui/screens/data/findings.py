"""A checkup in the words of the page: the verdict, what was found, what to know about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from textual.content import Content

from engine.data.requests import Shape
from engine.data.statistics import FEW_ROWS, Checkup, Finding, ProblemGroup, count_held_out
from engine.units import counted
from engine.visible import visible

_BARS: Final = "▁▂▃▄▅▆▇█"
# What teaches something that nobody wants is worse than a repair.
_SERIOUS: Final = (
    *("blank_answer", "effort_contradicts_thinking", "nothing_learned"),
    "image_left_out",
)
_RANKS: Final = "✗!·✓"


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing to know: a line of the list, and all of it as (word, text)."""

    mark: str
    text: str
    details: tuple[tuple[str, str], ...]


def say_verdict(found: Checkup, val_set_size: float, test_sets: int) -> tuple[str, str, str]:
    """Mark, word and sentence of the page; `test_sets` are other files that are held out."""
    usable = found.usable
    if not usable:
        return "✗", "not usable", f"none of {found.rows:,} rows can be used; see what to know"
    held_out = count_held_out(val_set_size, usable)
    words = counted(usable, "conversation")
    text = f"{usable - held_out:,} to learn from, "
    if held_out:
        text += f"{held_out:,} held out"
    elif test_sets:
        text += f"{counted(test_sets, 'other set')} held out"
    else:
        text += "none held out: h changes that"
    bad = found.bad_rows
    if bad:
        return "!", words, f"{text}; {counted(bad, 'row')} left out"
    return "✓", words, text


def describe_rows(found: Checkup, shape: Shape, width: int) -> Content:
    """What was found, in lines of at most `width` cells."""
    lines = _usable_lines(found, shape, width) if found.usable else _unusable_lines(shape)
    return Content("\n").join(
        Content.assemble((f"{word:<9}", "$muted"), visible(text, one_line=True))
        for word, text in lines
    )


def _usable_lines(found: Checkup, shape: Shape, width: int) -> list[tuple[str, str]]:
    fewest, most = found.turns
    turns = counted(most, "turn")
    turns = turns if fewest == most else f"{fewest:,} to {turns}"
    assert found.tokens is not None
    tokens, length = found.tokens, found.tokens.row_length
    answers = found.roles.get("assistant", 0)
    thinks = f"in {tokens.thinking_answers:,} of {answers:,} answers"
    calls = f"; tool calls in {tokens.call_answers:,}" if tokens.call_answers else ""
    told = f"median {length.p50:,}  p95 {length.p95:,}  longest {length.max:,}"
    bars = spark(tokens.length_counts, min(24, width - len(told) - 11))
    return [
        ("shape", f"{shape.title}, {turns}, {found.usable:,} of {found.rows:,} rows"),
        ("roles", "  ".join(f"{role} {count:,}" for role, count in found.roles.items())),
        ("thinking", (thinks if tokens.thinking else "in no answer") + calls),
        *([("images", _images(found))] if found.images.count else []),
        ("length", f"{bars}  {told}"),
    ]


def _images(found: Checkup) -> str:
    assert found.tokens is not None
    images, tokens = found.images, found.tokens.by_kind["image"]
    width, height = images.largest
    many = images.different_bytes
    size = f"{many / 1e6:,.1f} MB" if many >= 10**6 else f"{many / 1e3:,.0f} kB"
    different = f"{images.different:,} different, " * (images.different < images.count)
    return (
        f"{images.count:,} in {counted(images.rows, 'row')}, {tokens:,} tokens;"
        f" {different}{size}, up to {width}x{height}"
    )


def _unusable_lines(shape: Shape) -> list[tuple[str, str]]:
    lines = [("columns", ", ".join(shape.columns) or "none")]
    lines += [(f"{name}", "a list of " + ", ".join(keys)) for name, keys in shape.lists.items()]
    if proposed := shape.proposed:
        named = (f"{word.removeprefix('field_')} = {key}" for word, key in proposed.items())
        lines.append(("try", f"m maps them: {', '.join(named)}"))
    return lines


def spark(counts: Sequence[int], width: int) -> str:
    """Bars of the counts, neighbours added up until they fit into `width` cells."""
    if not counts or width < 1:
        return ""
    step = -(-len(counts) // width)
    merged = [sum(counts[at : at + step]) for at in range(0, len(counts), step)]
    top = max(merged) or 1
    return "".join(_BARS[-(-count * 7 // top)] for count in merged)


def list_remarks(found: Checkup) -> list[Remark]:
    """What to know, worst first; one line says so where there is nothing."""
    remarks = [_problem(group) for group in found.groups]
    remarks += [_finding(finding) for finding in found.findings]
    duplicates, usable = found.duplicates, found.usable
    if duplicates:
        text = f"{counted(duplicates, 'row')} repeating an earlier row; repeated rows weigh more"
        fix = "dataset_exact_deduplication leaves them out, or delete them."
        remarks.append(Remark("!", text, (("what", text), ("fix", fix))))
    if 0 < usable < FEW_ROWS:
        text = f"{counted(usable, 'row')}: a model tends to learn so few by heart"
        fix = f"Add rows; from {FEW_ROWS} on it is less likely. Held-out rows show it: h."
        remarks.append(Remark("!", text, (("what", text), ("fix", fix))))
    if not remarks:
        text = "no row is bad, none repeats another"
        remarks.append(Remark("✓", text, (("what", text),)))
    return sorted(remarks, key=lambda remark: _RANKS.index(remark.mark))


def _problem(group: ProblemGroup) -> Remark:
    where = f"line {group.first.line:,} of {group.first.file}"
    if group.first.message is not None:
        where += f", message {group.first.message}"
    more = " …" if len(group.rows) < group.count else ""
    return Remark(
        "✗",
        f"{counted(group.count, 'row')}: {group.first.what} ({where})",
        (
            ("what", group.first.what),
            ("why", f"{where}: {group.first.why}"),
            ("fix", group.first.fix),
            ("rows", ", ".join(f"{number:,}" for number in group.rows) + more),
        ),
    )


def _finding(finding: Finding) -> Remark:
    mark = "!" if finding.id in _SERIOUS else "·"
    lines = ", ".join(f"{line:,}" for line in finding.lines)
    more = " …" if finding.rows > len(finding.lines) else ""
    text = f"{counted(finding.rows, 'row')}: {finding.text}"
    return Remark(
        mark,
        f"{text} (line {lines}{more})",
        (("what", finding.text), ("lines", lines + more), ("see", "Preview lists them: w")),
    )

"""The commands about data: check, preview, prepare.

They turn words on a command line into calls of `engine.data` and its answers into text or JSON;
what is right or wrong about a dataset is decided there.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from engine.chat.tokenizer_file import tokenizer_name
from engine.cli.terminal import AsJson, print_lines, terminal_columns, underlines
from engine.config import ConfigError, DatasetConfig, RunConfig, read_config, section_of
from engine.errors import UserError
from engine.interrupt import last_words
from engine.report import Line
from engine.units import counted
from engine.visible import visible

if TYPE_CHECKING:
    from engine.data.prepared import Meta
    from engine.data.requests import Progress
    from engine.data.statistics import Checkup

Effort = Literal["none", "high"]
Think = Annotated[bool | None, Parameter("--think", negative="--no-think")]

_LOOKED_AT = 20
"""Rows by which a mapping of columns is proposed."""
_ONLY_READ = "Nothing was written: rows are only read here."
_ABOUT_ROWS = ("Data", "What is learned")
"""Sections of the keys that decide what a row becomes."""


@dataclass(frozen=True, slots=True)
class _Request:
    """What a command line says about data: the config that was named, or one that holds DATA."""

    config: RunConfig
    folder: Path
    model: str | None
    model_folder: Path
    """Where a relative path in `model` starts."""
    sequence_len: int | None = None


def _is_config(data: str) -> bool:
    return Path(data).suffix.lower() in (".yml", ".yaml")


def _read_request(data: str, model: str | None, think: bool | None = None) -> _Request:
    if not _is_config(data):
        from engine.data.sources import locate

        dataset = DatasetConfig(path=data)
        locate(dataset, Path.cwd())  # a missing file is said before a tokenizer is opened
        # Not validated: a config's names are stricter than those of a command line.
        given = RunConfig(base_model="any").model_copy(
            update={"datasets": (dataset,), "train_on_thinking": think is not False}
        )
        return _Request(given, Path.cwd(), model, Path.cwd())
    config, folder = _load(data), Path(data).resolve().parent
    if think is not None:
        config = config.model_copy(update={"train_on_thinking": think})
    return _Request(
        config,
        folder,
        model or tokenizer_name(config),
        Path.cwd() if model else folder,
        config.sequence_len,
    )


def _load(path: str) -> RunConfig:
    """The config, refused where a key about data, learning or length would not be carried out.

    Other keys that training refuses do not matter to arrays.
    """
    file = read_config(path)
    refused = [
        finding
        for finding in file.findings()
        if finding.severity == "error" and section_of(finding.key) in _ABOUT_ROWS
    ]
    if refused:
        raise ConfigError(path, refused)
    if not file.config.datasets:
        raise UserError(
            f"{path} names no dataset.",
            "Its list of datasets is empty.",
            "Add `datasets:` with a `path:`, or give a data file instead of the config.",
        )
    return file.config


def check_data(
    data: str, /, *, model: str | None = None, strict: bool = False, as_json: AsJson = False
) -> int:
    """Read every row of a dataset and report each bad one by line, reason and repair.

    Parameters
    ----------
    data
        A file, a folder, a hub id, or a config that names them.
    model
        Count tokens as this model would: catalog name, hub id or folder.
    strict
        Exit with 1 when a row cannot be used that field_label does not leave out.
    """
    from engine.chat.tokenizer import open_tokenizer
    from engine.data.checkup import check_config, checkup_document
    from engine.data.shape import read_shape
    from engine.report.data import proposal_lines

    last_words(_ONLY_READ)
    request = _read_request(data, model)
    tokenizer = open_tokenizer(request.model, request.model_folder) if request.model else None
    found = check_config(
        request.config,
        request.folder,
        tokenizer,
        sequence_len=request.sequence_len,
        progress=_show_reading if _shows_progress(as_json) else None,
    )
    dataset, proposed = request.config.datasets[0], dict[str, str]()
    if found.problems or any(not each.quiet for each in found.unread):
        shape = read_shape(dataset, request.folder, _LOOKED_AT)
        proposed = shape.proposed if shape.reads_more else {}
    if as_json:
        print(json.dumps(checkup_document(found) | {"proposed": proposed}))
    else:
        _print_checkup(found)
        print_lines(proposal_lines(dataset, proposed))
    return int(strict and any(not problem.judged for problem in found.problems))


def _print_checkup(found: "Checkup") -> None:
    from engine.report.data import image_lines, note_lines, problem_lines

    _clear_progress()
    print(f"{counted(found.rows, 'row')}, {found.usable:,} usable")
    if found.tokens is not None:
        tokens, length = found.tokens, found.tokens.row_length
        print(
            f"{tokens.total} tokens, {tokens.learned} learned"
            f" (thinking {tokens.thinking}, answers {tokens.answer})\n"
            f"row length: mean {length.mean}, median {length.p50}, p95 {length.p95},"
            f" p99 {length.p99}, longest {length.max}"
        )
    print_lines(image_lines(found))
    print_lines(problem_lines(found.groups))
    print_lines(map(str, note_lines(found)))
    if found.tokens is None:
        print_lines([Line("·", "", "Tokens are not counted: name a model with --model.")])


def preview_data(
    data: str,
    /,
    *,
    model: str | None = None,
    row: int | None = None,
    every: Annotated[bool, Parameter("--all")] = False,
    think: Think = None,
    reasoning_effort: Effort | None = None,
    strict: bool = False,
    as_json: AsJson = False,
) -> int:
    """Show what the model sees in a row, token by token, and which tokens are learned.

    Parameters
    ----------
    data
        A file, a folder, a hub id, or a config that names them.
    model
        Catalog name, hub id or folder with a tokenizer; a config names its own.
    row
        Which row, counted from 1 over all rows. Without it the first.
    every
        Show all rows; with --json one object a line.
    think
        Whether thinking is learned.
    reasoning_effort
        The effort that the prompt states, for models that state one.
    strict
        Exit with 1 when a shown row learns nothing.
    """
    first = _first_row(row, every)
    request = _read_request(data, model, think)
    if request.model is None:
        raise UserError(
            "preview needs a model.",
            "Only its tokenizer knows what it sees.",
            "Add --model, such as --model ministral-3-8b.",
        )
    shown, learns_nothing = _show_rows(request, first, every, as_json, reasoning_effort)
    if shown == 0:
        raise UserError(
            f"{data} has no row {first}.",
            "Rows are counted from 1 over all rows, bad ones too.",
            "Give a smaller number; `windtunnel check` counts the rows.",
        )
    if strict and learns_nothing:
        print(f"{learns_nothing} of {shown} shown rows learn nothing.", file=sys.stderr)
    return int(strict and learns_nothing > 0)


def _show_rows(
    request: _Request, first: int, every: bool, as_json: bool, effort: str | None
) -> tuple[int, int]:
    from engine.chat.tokenizer import open_tokenizer
    from engine.data.prepare import label_rule
    from engine.data.preview import legend, preview_entry, preview_row, row_text
    from engine.data.rows import iterate_rendered
    from engine.data.sources import config_notes
    from engine.report.data import file_line

    assert request.model is not None
    tokenizer = open_tokenizer(request.model, request.model_folder)
    rows = iterate_rendered(
        request.config, request.folder, tokenizer, reasoning_effort=effort, skip=first - 1
    )
    rule = label_rule(request.config)
    underline, columns = underlines(), terminal_columns()
    if not as_json:
        print_lines(map(file_line, config_notes(request.config, request.folder)))
    shown = learns_nothing = good = 0
    for rendered in rows if every else islice(rows, 1):
        row = preview_row(rendered, tokenizer)
        learns_nothing += not any(row.learned(rule))
        if as_json:
            print(json.dumps(preview_entry(row, rule)))
        else:
            print(row_text(row, rule, underline=underline, columns=columns), end="\n\n")
        shown += 1
        good += row.problem is None
    if good and not as_json:
        print(legend(underline=underline, columns=columns))
    return shown, learns_nothing


def _first_row(row: int | None, every: bool) -> int:
    if row is not None and every:
        raise UserError(
            "--row and --all contradict each other.",
            "One asks for one row, the other for all.",
            "Give one of them.",
        )
    if row is not None and row < 1:
        raise UserError(f"There is no row {row}.", "Rows are counted from 1.", "Give --row 1.")
    return row or 1


def prepare_data(config: str, /, *, as_json: AsJson = False) -> int:
    """Tokenize the config's datasets once, into the arrays that training reads.

    Parameters
    ----------
    config
        The config file.
    """
    from engine.chat.tokenizer import open_tokenizer
    from engine.data.prepare import default_store, label_rule, prepare
    from engine.data.sources import config_notes, held_out_sets
    from engine.report.data import file_line, prepared_lines

    last_words("What is prepared so far is kept, and the same command goes on from there.")
    start = time.monotonic()
    if not _is_config(config):
        raise UserError(
            f"{config} is not a config file.",
            "prepare reads model, datasets and switches from one, and its name ends in .yml.",
            "Write one: README has a config to start from, `windtunnel schema` lists every key.",
        )
    run, folder = _load(config), Path(config).resolve().parent
    tokenizer = open_tokenizer(tokenizer_name(run), folder)
    store = default_store(run, folder)
    progress = _show_progress if _shows_progress(as_json) else None
    prepared = prepare(run, folder, tokenizer, store, progress)
    # One by one, as training evaluates them.
    test_sets = [
        prepare(run, folder, tokenizer, store, progress, datasets=[dataset])
        for dataset in held_out_sets(run, folder)
    ]
    rule, notes = label_rule(run), config_notes(run, folder)
    selection = prepared.select(rule, run.sequence_len, run.excess_length_strategy)
    report: dict[str, Any] = {
        "rows": len(prepared),
        "tokens": prepared.meta.tokens,
        "learned_tokens": prepared.learned_tokens(rule),
        "seconds": round(time.monotonic() - start, 3),
        "reused": prepared.reused,
        "damaged": prepared.damaged or None,
        "path": str(prepared.folder),
        "bad_rows": prepared.meta.bad_rows,
        "problems": [asdict(problem) for problem in prepared.meta.problems],
        "used_rows": len(selection.rows),
        "too_long": selection.too_long,
        "truncated": selection.truncated,
        "nothing_learned": selection.nothing_learned,
        "test_rows": [len(test_set) for test_set in test_sets],
        "files": [asdict(note) for note in notes],
    }
    if as_json:
        print(json.dumps(report))
    else:
        _print_report(report, run.sequence_len)
        repairs = filter(None, (each.repair() for each in (prepared, *test_sets)))
        print_lines(Line("!", "", f"{text}.") for text in repairs)
        print_lines(map(file_line, notes))
        _print_problems(prepared.meta)
        print_lines(map(str, prepared_lines(prepared.meta)))
    return 0


def _print_problems(found: "Meta") -> None:
    from engine.data.facts import group_problems
    from engine.report.data import problem_lines

    print_lines(problem_lines(group_problems(found.problems)))
    if len(found.problems) < found.bad_rows:
        print_lines([Line("·", "", f"These are the first {len(found.problems)} of them.")])


def _shows_progress(as_json: bool) -> bool:
    # None where it was closed before we began.
    return sys.stderr is not None and sys.stderr.isatty() and not as_json


def _show_reading(rows: int, _done_bytes: int) -> None:
    print(f"\rreading {rows} rows\x1b[K", end="", file=sys.stderr)


def _clear_progress() -> None:
    if _shows_progress(as_json=False):
        print("\r\x1b[K", end="", file=sys.stderr)


def _show_progress(progress: "Progress") -> None:
    share = f" {progress.done_bytes / progress.total_bytes:.0%}" if progress.total_bytes else ""
    print(f"\r{progress.phase}{share} {progress.rows} rows\x1b[K", end="", file=sys.stderr)


def _print_report(report: dict[str, Any], sequence_len: int) -> None:
    made = "found as they were, nothing tokenized" if report["reused"] else "tokenized"
    _clear_progress()
    print(
        f"{counted(report['rows'], 'row')}, {report['tokens']} tokens,"
        f" {report['learned_tokens']} learned: {made} in {report['seconds']} s\n"
        f"{visible(report['path'], one_line=True)}"
    )
    left_out = {
        "that cannot be used": report["bad_rows"],
        f"longer than sequence_len ({sequence_len})": report["too_long"],
        "of these that are cut at it": report["truncated"],
        "that teach nothing": report["nothing_learned"],
    }
    for what, count in left_out.items():
        if count:
            print(f"! rows {what}: {count}")

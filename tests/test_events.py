"""The vocabulary of events.jsonl, and a writer that survives torn lines and full disks."""

import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.events import (
    VERSION,
    Ack,
    Answers,
    Drift,
    Ended,
    Eval,
    Event,
    EventWriter,
    Note,
    Phase,
    Recorded,
    Sample,
    Saved,
    Score,
    Shortage,
    Started,
    Step,
    format_line,
    parse,
    parse_line,
)

STEP = Step(
    step=3,
    epoch=0.5,
    loss=1.25,
    learned_tokens=40,
    tokens=100,
    lr=2e-4,
    grad_norm=0.9,
    seconds=0.5,
    tokens_per_second=200.0,
    peak_memory_bytes=1 << 30,
)

EXAMPLES: list[Event] = [
    Started("r", "demo-tiny", "lora", ("cpu",), 1, 10, 99, {"torch": "2.13.0"}),
    Phase("load", 1, 4, "shards"),
    STEP,
    Eval(3, 1.5),
    Score(3, "heldout", 1.5, 0.25, 8, {"text": 1.75, "eos": 0.5}, {"text": 40, "eos": 8}),
    Answers(3, "heldout", 8, 0.75, 1.25, 0.5, 2, 0.5),
    Drift(3, 0.125, 300),
    Sample(3, "Who?", "Me.\n", "before"),
    Saved(3, "checkpoints/step-3"),
    Note("warning", "slow"),
    Shortage(
        3,
        "step 3",
        held_bytes=5,
        asked_bytes=2,
        predicted_bytes=4,
        parts={"weights": 3},
        predicted_parts={"weights": 2},
        grew="weights",
        longest="rows.jsonl line 3, 70 tokens",
        changes={"micro_batch_size": "1"},
        trade="slower",
        saves_bytes=1,
        taken=True,
    ),
    Ack("1f", "pause", "done"),
    Ended("failed", 3, "what", "why", "fix"),
]

CONTRACT = {
    "started": "run model method devices world_size total_steps trainable_parameters versions",
    "phase": "name done total detail",
    "step": "step epoch loss learned_tokens tokens lr grad_norm seconds tokens_per_second "
    "peak_memory_bytes",
    "eval": "step loss",
    "score": "step dataset loss exact rows loss_by_kind tokens_by_kind",
    "answers": "step dataset rows stopped length_ratio exact calls calls_valid",
    "drift": "step kl tokens",
    "sample": "step prompt text when",
    "saved": "step path",
    "note": "level text",
    "shortage": "step where held_bytes asked_bytes predicted_bytes parts predicted_parts grew "
    "longest changes trade saves_bytes taken",
    "ack": "id command outcome",
    "ended": "outcome step what why fix",
}


def decoded(event: Event) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(format_line(Recorded(0, 1.0, event)))
    return record


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def recorded_in(path: Path) -> list[Recorded]:
    return [each for line in lines_of(path) if line and (each := parse_line(line))]


def test_every_type_and_field_of_the_contract_is_written() -> None:
    assert {type(event) for event in EXAMPLES} == set(get_args(Event))
    written = {record["type"]: record for record in map(decoded, EXAMPLES)}
    assert set(written) == set(CONTRACT)
    for name, names in CONTRACT.items():
        assert {"v", "seq", "time", "type", *names.split()} <= set(written[name])
        assert written[name]["v"] == VERSION


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_as_it_was_written(event: Event) -> None:
    assert parse_line(format_line(Recorded(7, 12.5, event))) == Recorded(7, 12.5, event)
    assert parse(decoded(event)) == event


@given(st.text(st.characters()), st.floats(width=32), st.integers(-(2**63), 2**63 - 1))
def test_any_text_and_number_make_a_strict_line(text: str, number: float, count: int) -> None:
    for event in (Note("info", text), Eval(count, number)):
        line = format_line(Recorded(0, 0.0, event))
        assert line.count(b"\n") == 1
        assert line.endswith(b"\n")
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        back = parse_line(line)
        assert back is not None
        if isinstance(back.event, Eval):
            wanted = number if math.isfinite(number) else math.nan
            assert back.event.loss == wanted or math.isnan(wanted)
        else:
            assert back.event == event


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_null_and_reads_as_nan(value: float) -> None:
    line = format_line(Recorded(0, 1.0, Eval(1, value)))
    assert b'"loss": null' in line
    back = parse_line(line)
    assert back is not None
    assert isinstance(back.event, Eval)
    assert math.isnan(back.event.loss)


def test_fields_that_are_not_known_are_left_out() -> None:
    assert parse({**decoded(STEP), "flops": 1e15}) == STEP


@pytest.mark.parametrize("record", [{"type": "joke"}, {"type": []}, {}, [], "step", None, 3])
def test_what_is_no_known_event_is_none(record: object) -> None:
    assert parse(record) is None


@pytest.mark.parametrize(
    ("event", "change"),
    [
        (STEP, {"loss": "1.25"}),
        (STEP, {"loss": True}),
        (STEP, {"loss": 10**400}),
        (STEP, {"loss": 10**40}),
        (STEP, {"loss": math.inf}),
        (STEP, {"tokens": 2**63}),
        (STEP, {"total_steps": 10**400}),
        (EXAMPLES[4], {"tokens_by_kind": {"text": 2**63}}),
        (EXAMPLES[4], {"loss_by_kind": {"text": 10**40}}),
        (STEP, {"step": 3.0}),
        (STEP, {"step": True}),
        (STEP, {"step": None}),
        (EXAMPLES[0], {"devices": "cpu"}),
        (EXAMPLES[0], {"devices": [1]}),
        (EXAMPLES[0], {"versions": {"torch": 2}}),
        (EXAMPLES[0], {"versions": []}),
        (EXAMPLES[1], {"done": "half"}),
        (Ended("stopped", 1), {"outcome": "tired"}),
        (Ended("stopped", 1), {"outcome": ["stopped"]}),
    ],
)
def test_a_field_of_the_wrong_type_spoils_its_event(event: Event, change: dict[str, Any]) -> None:
    record = {**decoded(event), **change}
    assert parse(record) is None
    with pytest.raises(ValueError, match="wrong type"):
        parse_line(json.dumps(record).encode())


def test_a_missing_field_spoils_its_event_unless_it_has_a_default() -> None:
    record = decoded(STEP)
    del record["total_steps"]
    assert parse(record) == STEP
    del record["loss"]
    assert parse(record) is None


@pytest.mark.parametrize("change", [{"v": VERSION + 1}, {"type": "telemetry"}])
def test_what_a_newer_windtunnel_writes_is_skipped(change: dict[str, Any]) -> None:
    assert parse_line(json.dumps({**decoded(STEP), **change}).encode()) is None


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b'{"v": 1, "seq": 4, "ty',
        b"\xff\xfe",
        b"[" * 100_000,
        b"[1]",
        b'{"type": "note", "level": "info", "text": "no envelope"}',
        b'{"v": 1, "seq": 1, "time": "now", "type": "note", "level": "info", "text": ""}',
        b'{"v": 1, "seq": 1, "time": 1, "type": {}}',
        b'{"v": 1, "seq": 1, "time": 1e12, "type": "note", "level": "info", "text": ""}',
        b'{"v": 1, "seq": 9223372036854775808, "time": 1, "type": "note"}',
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_line_that_is_no_whole_event_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own messages differ by case
        parse_line(line)


def test_events_are_numbered_from_zero_and_stamped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path, clock=lambda: 5.5) as writer:
        for event in EXAMPLES:
            writer.emit(event)
    assert recorded_in(path) == [Recorded(i, 5.5, event) for i, event in enumerate(EXAMPLES)]
    assert writer.dropped == 0


def test_each_event_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    real: Callable[[int, bytes], int] = os.write

    def record(descriptor: int, data: bytes) -> int:
        written.append(data)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", record)
    with EventWriter(tmp_path / "events.jsonl") as writer:
        writer.emit(Sample(1, "p", "x" * 200_000, "after"))
        writer.emit(STEP)
    assert len(written) == 2


def test_a_second_launch_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _ in range(3):
        with EventWriter(path) as writer:
            writer.emit(STEP)
            writer.emit(STEP)
    assert [each.seq for each in recorded_in(path)] == list(range(6))


def test_counting_goes_on_behind_a_line_longer_than_the_first_look(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as writer:
        writer.emit(STEP)
        writer.emit(Sample(1, "p", "x" * 1_000_000, "after"))
    with EventWriter(path) as writer:
        writer.emit(STEP)
    assert [each.seq for each in recorded_in(path)] == [0, 1, 2]


@given(st.integers(0, 1000))
@example(1)  # whole but for its line feed: its number is taken
def test_wherever_a_kill_tears_the_last_line_the_next_event_is_whole_and_new(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "events.jsonl"
    with EventWriter(path) as writer:
        for _ in range(4):
            writer.emit(STEP)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    with EventWriter(path) as writer:
        writer.emit(Note("info", "back"))
    kept = []
    for line in lines_of(path):
        try:
            kept.append(parse_line(line))
        except ValueError:
            continue
    numbers = [each.seq for each in kept if each]
    assert len(set(numbers)) == len(numbers), "a reader would drop the repeated number"
    assert numbers == sorted(numbers)
    last = kept[-1]
    assert last is not None
    assert last.event == Note("info", "back")


def test_a_full_disk_drops_events_and_never_raises(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    line_bytes = len(format_line(Recorded(0, 1.0, STEP)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EventWriter(path, clock=lambda: 1.0) as writer:
        try:
            # Room for two events and a half: the third is torn, the fourth finds no room at all.
            resource.setrlimit(resource.RLIMIT_FSIZE, (line_bytes * 5 // 2, hard))
            for _ in range(4):
                writer.emit(STEP)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert writer.dropped == 2
        assert path.stat().st_size == line_bytes * 5 // 2
        writer.emit(Note("info", "there is space again"))
        writer.emit(STEP)
    lines = lines_of(path)
    with pytest.raises(ValueError):  # noqa: PT011
        parse_line(lines[2])
    del lines[2]
    kept = [each for line in lines if (each := parse_line(line))]
    assert [each.seq for each in kept] == [0, 1, 4, 5], "the hole shows what was dropped"
    assert kept[2].event == Note("info", "there is space again")


def test_a_closed_writer_refuses(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "events.jsonl")
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.emit(STEP)


def test_a_child_process_does_not_inherit_the_file(tmp_path: Path) -> None:
    with EventWriter(tmp_path / "events.jsonl") as writer:
        assert not os.get_inheritable(writer._descriptor)

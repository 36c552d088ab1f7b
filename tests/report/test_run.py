"""A run in lines: its events, its results, and numbers that are spelled in one way."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from engine.events import (
    Ack,
    Answers,
    Drift,
    Ended,
    Eval,
    Event,
    EventWriter,
    Note,
    Outcome,
    Phase,
    Sample,
    Saved,
    Score,
    Shortage,
    Started,
)
from engine.report.run import describe_results, event_line, figures_text, state_lines
from engine.runs import RunFolder
from engine.units import counted, nats, spoken
from tests.support.written_runs import step_event

BY_KIND = {"think": 2.0, "text": 1.0, "call": 0.5, "eos": 0.1}
AFTER = {"think": 1.5, "text": 0.75, "call": 0.25, "eos": 0.0}
COUNTS = dict.fromkeys(BY_KIND, 10)
BEFORE: list[Event] = [
    Score(0, "held", 1.6, 0.0, 50, BY_KIND, COUNTS),
    Answers(0, "held", 8, 0.5, 2.0, 0.0, 4, 0.25),
    Drift(0, 0.0, 500),
]
INSIDE: list[Event] = [Score(10, "held", 1.2, 0.0, 50, BY_KIND, COUNTS), Drift(10, 0.5, 500)]
LAST: list[Event] = [
    Score(20, "held", 0.9, 0.25, 50, AFTER, COUNTS),
    Answers(20, "held", 8, 1.0, 1.0, 0.125, 4, 0.75),
    Drift(20, 0.125, 500),
]


def test_the_first_evaluation_stands_beside_the_last() -> None:
    assert describe_results([*BEFORE, *INSIDE, *LAST]) == [
        "                                         before    after",
        "held: loss                                1.600    0.900",
        "  loss of thinking                        2.000    1.500",
        "  loss of answers                         1.000    0.750",
        "  loss of tool calls                      0.500    0.250",
        "  answers word for word                      0%      25%",
        "  stop by themselves                        50%     100%",
        "  length against the reference             2.00     1.00",
        "  right calls, valid arguments              25%      75%",
        "drift on general questions (nats)          0.00     0.12",
    ]


@pytest.mark.parametrize(
    ("ended", "step", "latest", "said"),
    [
        ("stopped", 4, "step-4", "Stopped at step 4, and saved."),
        ("stopped", 7, "step-4", "Stopped at step 7, the last save is step-4."),
        ("stopped", 0, None, "Stopped at step 0, nothing to save yet."),
        ("stopped", 3, "../elsewhere/step-3", "Stopped at step 3, and nothing was saved."),
        (None, 7, "step-4", "Lost at step 7, the last save is step-4."),
    ],
)
def test_saved_is_said_of_what_was_saved(
    tmp_path: Path, ended: Outcome | None, step: int, latest: str | None, said: str
) -> None:
    run = RunFolder(tmp_path)
    (run.checkpoints / "step-4").mkdir(parents=True)
    if latest:
        (run.checkpoints / "LATEST").write_text(latest)
    with EventWriter(run.events) as events:
        events.emit(Eval(step, 1.0))
        if ended:
            events.emit(Ended(ended, step))
    first, second = map(str, state_lines(run))
    assert (first, second) == (said, f"Go on with: windtunnel resume {tmp_path}")


def test_one_kind_alone_is_not_told_twice() -> None:
    told = [Score(step, "held", 1.0, 0.0, 9, {"text": 1.0}, {"text": 9}) for step in (0, 5)]
    assert [line.split("  ")[0] for line in describe_results(told)[1:]] == ["held: loss", ""]
    assert not any("loss of" in line for line in describe_results(told))


def test_a_run_without_two_evaluations_has_no_table() -> None:
    assert describe_results([]) == []
    assert describe_results(BEFORE) == []


def test_a_name_cannot_reach_the_terminal() -> None:
    told = [Score(step, "a\x1b]52;c;x\x07", 1.0, 0.0, 9) for step in (0, 5)]
    assert not any("\x1b" in line or "\x07" in line for line in describe_results(told))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (1.4, "1 second"),
        (40, "40 seconds"),
        (720, "12 minutes"),
        (12_600, "3.5 hours"),
        (172_800, "2.0 days"),
    ],
)
def test_a_length_of_time_has_the_noun_that_its_number_asks_for(seconds: float, words: str) -> None:
    assert spoken(seconds) == words


def test_one_of_a_thing_has_no_s_and_thousands_have_a_comma() -> None:
    assert (counted(0, "row"), counted(1, "row")) == ("0 rows", "1 row")
    assert counted(1_200, "row") == "1,200 rows"


def test_a_loss_has_three_decimals() -> None:
    assert nats(0.41249) == "0.412"


GIB = 2**30
RANKED = step_event(9, loss=0.41249)
KINDS = {"think": 1.25, "text": 0.5, "eos": 0.1}
SHORTAGE = Shortage(
    4,
    "the backward pass",
    30 * GIB,
    parts={"weights": 8 * GIB, "adapter": 0},
    predicted_parts={"weights": 7 * GIB},
    changes={"micro_batch_size": "1"},
    trade="slower",
    saves_bytes=3 * GIB,
)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            Started("r", "demo-tiny", "lora", ("cpu",), 1, 2000, 98_304),
            "training demo-tiny (lora) on cpu: 2,000 steps, 98,304 trained parameters",
        ),
        (Phase("import"), "starting PyTorch"),
        (Phase("new", 3, 12, "things"), "new: 3 of 12 things"),
        (Phase("prepared", 104, 104, "104 rows prepared"), "data ready: 104 rows prepared"),
        (
            Phase("hashing", 32_000, 32_000, "bytes, 0 rows"),
            "reading the data: 32.0 of 32.0 kB, 100%",
        ),
        (step_event(9, loss=0.41249), "step 9 of 99: loss 0.412, lr 1.96e-04, 460 tokens/s"),
        (
            replace(
                step_event(9, loss=0.41249),
                rank_peak_bytes=(GIB, 3 * GIB),
                slowest_rank=1,
                imbalance=0.031,
            ),
            "step 9 of 99: loss 0.412, lr 1.96e-04, 460 tokens/s,"
            " ranks 0 1.0  1◂ 3.0 GiB, ◂ slowest, 3% waiting",
        ),
        (
            replace(
                step_event(9, loss=0.41249),
                rank_peak_bytes=tuple(range(GIB, 65 * GIB, GIB)),
                slowest_rank=7,
            ),
            "step 9 of 99: loss 0.412, lr 1.96e-04, 460 tokens/s,"
            " 64 ranks 1.0 to 64.0 GiB, slowest 7",
        ),
        (Eval(60, 0.7312), "step 60: held-out loss 0.731"),
        (
            Score(20, "held", 0.9, 0.31, 20, KINDS),
            "step 20: held, loss 0.900, 31% of 20 answers word for word",
        ),
        (
            Answers(20, "held", 8, 1.0, 1.0, 0.5),
            "step 20: held, 100% of 8 written answers stop by themselves,"
            " 1.00 times the reference's length",
        ),
        (Drift(20, 0.123, 900), "step 20: drift on general questions 0.12 nats a token"),
        (Sample(0, "Who?", "Me.", "before"), "before: Who? -> Me."),
        (Saved(3, "adapter"), "step 3: saved adapter"),
        (Note("info", "hello"), "hello"),
        (Note("warning", "careful"), "! careful"),
        (SHORTAGE, "✗ memory ran out in the backward pass: weights 8.0 GiB (planned 7.0 GiB)"),
        (Ended("finished", 9), "✓ finished at step 9"),
        (Ended("failed", 3, "It broke.", "Why.", "Fix."), "✗ failed at step 3: It broke."),
    ],
)
def test_an_event_reads(event: Event, text: str) -> None:
    assert str(event_line(event)) == text


def test_an_answer_to_a_command_is_no_line() -> None:
    assert event_line(Ack("abc", "pause", "done")) is None


@pytest.mark.parametrize(
    ("event", "best", "detail"),
    [
        (Eval(60, 0.731), 0.768, "best so far (was 0.768)"),
        (Eval(60, 0.8), 0.768, "best 0.768"),
        (Eval(60, 0.8), None, ""),
        (Score(20, "held", 0.9, 0.31, 20, KINDS), None, "thinking 1.250, answers 0.500"),
        (Score(20, "held", 0.9, 0.31, 20, {"text": 0.5}), None, ""),
        (SHORTAGE, None, "go on with micro_batch_size 1: 3.0 GiB less; slower"),
    ],
)
def test_more_is_known_where_there_is_room(event: Event, best: float | None, detail: str) -> None:
    line = event_line(event, best)
    assert line
    assert line.detail == detail


def test_figures_name_the_step_that_they_are_of() -> None:
    score = Score(10, "held out", 0.9, 0.2, 8, KINDS)
    written, drift = Answers(10, "held out", 8, 0.875, 1.1, 0.2), Drift(10, 0.123, 900)
    assert figures_text(score, written, drift) == (
        "step 10: loss of thinking 1.250, answers 0.500  ·  88% stop by themselves  ·  drift 0.12"
    )
    assert figures_text(Score(10, "held out", 0.9, 0.2, 8, {"text": 0.5}), None, None) == ""
    assert figures_text(None, None, None) == ""

"""The vocabulary of `events.jsonl`: what a run says about itself, one JSON object a line.

Whoever trains and whoever draws agree on it, and neither needs the other. A reader skips types and
fields that it does not know, so that an older Windtunnel can follow a newer run. JSON has no NaN: a
float that is not finite is written as `null` and read back as `nan`, which a chart draws as a gap.
"""

from engine.events.lines import VERSION, format_line, parse, parse_line
from engine.events.vocabulary import (
    Ack,
    AckOutcome,
    Answers,
    Drift,
    Ended,
    Eval,
    Event,
    Note,
    NoteLevel,
    Outcome,
    Phase,
    Recorded,
    Sample,
    SampleTime,
    Saved,
    Score,
    Shortage,
    Started,
    Step,
)
from engine.events.writer import EventWriter

__all__ = [
    "VERSION",
    "Ack",
    "AckOutcome",
    "Answers",
    "Drift",
    "Ended",
    "Eval",
    "Event",
    "EventWriter",
    "Note",
    "NoteLevel",
    "Outcome",
    "Phase",
    "Recorded",
    "Sample",
    "SampleTime",
    "Saved",
    "Score",
    "Shortage",
    "Started",
    "Step",
    "format_line",
    "parse",
    "parse_line",
]

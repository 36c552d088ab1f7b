"""The vocabulary of `events.jsonl`: what a run says about itself, one JSON object a line.

Names and fields are a contract with scripts that read the file: add, never rename or drop. A reader
skips types and fields that it does not know, so that an older Windtunnel can follow a newer run.
JSON has no NaN: a float that is not finite is written as `null` and read back as `nan`, which a
chart draws as a gap.
"""

import errno
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints

from msgspec import Meta, Struct, convert, field

Outcome = Literal["finished", "stopped", "failed"]
SampleTime = Literal["before", "during", "after"]
NoteLevel = Literal["info", "warning", "error"]
AckOutcome = Literal["done", "refused"]


Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""Of 64 bits: 400 digits make no float, and no chart."""
Moment = Annotated[float, Meta(ge=0, le=32_503_680_000)]
"""Unix seconds, until the year 3000: further ones are no date."""
_LARGEST: Final = 1e39
"""Just beyond float32, in which losses and norms are measured; products of such stay finite."""


class _Event(Struct, frozen=True, tag=str.lower):
    """Its `type` is its name in small letters."""


class Started(_Event, frozen=True):
    """The model is loaded and the first step of this launch is next; once per launch."""

    run: str
    """Name of the run."""
    model: str
    """`base_model` as the config has it."""
    method: str
    """lora, qlora or full."""
    devices: tuple[str, ...]
    """UUIDs of the GPUs, or `cpu`."""
    world_size: Whole
    """Processes that train together."""
    total_steps: Whole
    """Optimizer steps from step 0 to the end of the run, those of earlier launches included."""
    trainable_parameters: Whole
    """Number of weights that the optimizer moves."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package name -> its version."""
    rows: Whole | None = None
    """Of the datasets, bad ones too."""
    rows_left_out: Whole | None = None
    """Of these, the ones that are not trained on: too long, bad, or with nothing to learn."""


class Phase(_Event, frozen=True):
    """Progress of anything that is not a step: loading, tokenizing, evaluating, saving."""

    name: str
    done: Whole | None = None
    """How much of `total` is done, in the unit that `detail` names; None where nobody can say."""
    total: Whole | None = None
    detail: str = ""


class Step(_Event, frozen=True):
    """One optimizer step, reported after it is done."""

    step: Whole
    """Counts from 1. A number that comes again after a resume supersedes the earlier one."""
    epoch: float
    """Passes over the training rows so far, with its fraction."""
    loss: float
    """Mean over the learned tokens of the whole optimizer step, all ranks, in nats a token."""
    learned_tokens: Whole
    """Tokens of this step that are in the loss, all ranks."""
    tokens: Whole
    """Tokens of this step, padding left out, all ranks."""
    lr: float
    """Learning rate that this step used."""
    grad_norm: float
    """L2 norm of the gradient before clipping; nan where it was not measured."""
    seconds: float
    """Wall time of this step, its batch and optimizer included, without evals, saves and pauses."""
    tokens_per_second: float
    """`tokens` over `seconds`."""
    peak_memory_bytes: Whole
    """Largest amount allocated so far on the fullest device; resident bytes on a CPU."""
    total_steps: Whole | None = None
    """As in `Started`, so that the end of the file alone tells how far a run is."""
    grad_norm_clipped: float | None = None
    """L2 norm of the gradient that moved the weights, after clipping; None where not measured."""
    rank_peak_bytes: tuple[Whole, ...] | None = None
    """`peak_memory_bytes` of each rank; None for a run of one."""
    slowest_rank: Whole | None = None
    """The rank whose own passes of this step took longest; None for a run of one."""
    imbalance: float | None = None
    """Share of the ranks' time that they wait in this step for the costliest batch of each round,
    by tokens, attention and images; None for a run of one."""


class Eval(_Event, frozen=True):
    """Loss on the held-out rows."""

    step: Whole
    """Optimizer steps done; 0 is the untouched model."""
    loss: float
    """Mean over the learned tokens, in nats a token."""


class Score(_Event, frozen=True):
    """How one set of rows does at an evaluation; `Eval` sums up the held-out ones."""

    step: Whole
    dataset: str
    """Name of the evaluation set; `train` are rows that the run learns from."""
    loss: float
    """Mean over the learned tokens, in nats a token."""
    exact: float
    """Share of rows whose answer the model gives back word for word, 0 to 1."""
    rows: Whole
    loss_by_kind: Mapping[str, float] = field(default_factory=dict)
    """Of the learned tokens of each kind (think, text, call, eos ...), in nats a token."""
    tokens_by_kind: Mapping[str, Whole] = field(default_factory=dict)
    """How many learned tokens those are."""


class Answers(_Event, frozen=True):
    """What the model writes by itself, greedily, on a few held-out rows."""

    step: Whole
    dataset: str
    """Name of the evaluation set."""
    rows: Whole
    """Answers that were generated, one a row."""
    stopped: float
    """Share of them that end by themselves within `eval_max_new_tokens`, 0 to 1."""
    length_ratio: float
    """Median of their tokens over the reference's; where the limit cut one, what it had by then."""
    exact: float
    """Share that is the reference word for word, 0 to 1."""
    calls: Whole = 0
    """Those whose reference calls tools."""
    calls_valid: float | None = None
    """Share of `calls` with the reference's functions by name, each with arguments that are a JSON
    object; None where `calls` is 0."""


class Drift(_Event, frozen=True):
    """How far the model has moved from its base on general questions, which nobody trains on."""

    step: Whole
    kl: float
    """Kullback-Leibler divergence of base from tuned model, nats a token; 0: the same."""
    tokens: Whole
    """Tokens over which it is the mean."""


class Sample(_Event, frozen=True):
    """What the model answers to a fixed prompt."""

    step: Whole
    prompt: str
    text: str
    when: SampleTime


class Saved(_Event, frozen=True):
    """A checkpoint or the result is whole on the disk."""

    step: Whole
    path: str
    """Relative to the run's folder where it lies inside."""


class Note(_Event, frozen=True):
    """A sentence for the person who watches."""

    level: NoteLevel
    text: str


class Shortage(_Event, frozen=True):
    """Memory ran out: `ended` follows, or the run goes on with `changes`. Sizes in bytes."""

    step: Whole
    """The optimizer step that did not fit; 0 before the first."""
    where: str
    """What the trainer was doing."""
    held_bytes: Whole
    """Allocated by then; resident bytes on a CPU."""
    asked_bytes: Whole | None = None
    """What was asked for beyond; None where the system did not say."""
    predicted_bytes: Whole | None = None
    """The plan's figure for the fullest moment; None where a run has no plan."""
    parts: Mapping[str, Whole] = field(default_factory=dict)
    """What was held: weights, adapter, gradients, optimizer, and the rest, which is activations."""
    predicted_parts: Mapping[str, Whole] = field(default_factory=dict)
    """The same of the plan."""
    grew: str = ""
    """The part that was furthest above the plan; empty where none was."""
    longest: str = ""
    """The longest row of the step's batch: where it is and its tokens."""
    changes: Mapping[str, str] = field(default_factory=dict)
    """The next change that saves memory and alters no result, by key as in `key=value`; empty
    where there is none."""
    trade: str = ""
    """What that change costs."""
    saves_bytes: Whole = 0
    """What it saves, by the formula."""
    taken: bool = False
    """Whether the run goes on with it by itself, as `auto_fit` asks."""


class Ack(_Event, frozen=True):
    """Answer to one line of `control.jsonl`, written when the trainer has acted on it.

    To `stop` it means that the request is accepted: what is saved and `ended` follow.
    """

    id: str
    """`id` of the command."""
    command: str
    outcome: AckOutcome


class Ended(_Event, frozen=True):
    """The last event of a launch. Its absence, with the lock free, means that the run is lost."""

    outcome: Outcome
    step: Whole
    """Optimizer steps done."""
    what: str = ""
    """With `why` and `fix`: the three sentences of a failure; empty otherwise."""
    why: str = ""
    fix: str = ""


Event = (
    Started
    | Phase
    | Step
    | Eval
    | Score
    | Answers
    | Drift
    | Sample
    | Saved
    | Note
    | Shortage
    | Ack
    | Ended
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event with the envelope of its line."""

    seq: Whole
    """Grows by one an event over the whole life of the folder; a hole means dropped events."""
    time: Moment
    """Unix seconds."""
    event: Event


VERSION: Final = 1
"""`v` of every line. A reader skips lines of a higher one."""

_KINDS: Final[dict[str, type[Event]]] = {kind.__name__.lower(): kind for kind in get_args(Event)}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class _Envelope:
    v: int
    seq: Whole
    time: Moment
    type: str


_HINTS: Final = {kind: get_type_hints(kind) for kind in _NAMES}
_NUMBERS: Final = {
    kind: [name for name, hint in hints.items() if hint is float or get_args(hint) == (str, float)]
    for kind, hints in _HINTS.items()
}
"""The fields that hold floats, and never None."""


def parse(record: object) -> Event | None:
    """The event in one decoded JSON object, without its envelope.

    None where the object is none of the types known here, lacks a field, or has a field of the
    wrong type or beyond all range; fields that are not known are left out.
    """
    if not isinstance(record, dict):
        return None
    name = record.get("type")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        return None
    try:
        numbers = {name: _with_nan(record[name]) for name in _NUMBERS[kind] if name in record}
        return convert({**record, **numbers}, kind)
    except ValueError:  # ValidationError is one
        return None


def parse_line(line: bytes) -> Recorded | None:
    """One line of `events.jsonl`; None for a type of a newer Windtunnel.

    Raises ValueError where the line is no whole event: torn, no JSON, or fields of a wrong type.
    """
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deep for an event") from error
    envelope = convert(record, _Envelope)  # ValidationError is a ValueError
    if envelope.v > VERSION or envelope.type not in _KINDS:
        return None
    event = parse(record)
    if event is None:
        raise ValueError("a field of the event is missing or of the wrong type")
    return Recorded(envelope.seq, envelope.time, event)


def format_line(recorded: Recorded) -> bytes:
    """One line of `events.jsonl`, ASCII, with its line feed.

    Characters beyond ASCII are escaped, so that no text (half a surrogate pair, U+2028) can make
    a line that cannot be encoded or that another reader would split.
    """
    event = recorded.event
    record: dict[str, object] = {
        "v": VERSION,
        "seq": recorded.seq,
        "time": recorded.time,
        "type": _NAMES[type(event)],
    }
    for name in _HINTS[type(event)]:
        record[name] = _plain(getattr(event, name))
    return json.dumps(record, allow_nan=False).encode("ascii") + b"\n"


def _with_nan(value: Any) -> Any:
    """Numbers as JSON has them, nan for `null`. Raises ValueError beyond what is measured."""
    if isinstance(value, dict):
        return {key: _with_nan(each) for key, each in value.items()}
    if isinstance(value, int | float) and not abs(value) <= _LARGEST:
        raise ValueError("a number beyond all that is measured")
    return math.nan if value is None else value


def _plain(value: object) -> object:
    """A field as JSON has it: no number is `null`."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


_TAIL_BYTES: Final = 1 << 16
"""First look at the end of a file: some 250 steps, or one long sample."""


def _last_seq(descriptor: int) -> tuple[int, bool]:
    """The highest `seq` near the end of the file (-1 in an empty one), and whether it ends torn.

    A torn line counts too: where only its line feed is missing, a reader will take it for whole
    once the next writer has added one, and must not take the next event for a repetition.
    """
    size = os.fstat(descriptor).st_size
    if size == 0:
        return -1, False
    span = _TAIL_BYTES
    while True:
        start = max(0, size - span)
        data = os.pread(descriptor, size - start, start)
        lines = data.split(b"\n")
        found = [_seq_of(line) for line in (lines if start == 0 else lines[1:])]
        if max(found, default=-1) >= 0 or start == 0:
            return max(found), not data.endswith(b"\n")
        span *= 8


def _seq_of(line: bytes) -> int:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return -1
    seq = record.get("seq") if isinstance(record, dict) else None
    return seq if type(seq) is int else -1


class EventWriter:
    """Appends events to `events.jsonl`; for one thread of the process that holds the run's lock.

    Every event is one `write` of one line in append mode, so a reader sees whole lines and at most
    one torn one at the end. Telemetry never ends a training: where the disk is full (or the quota,
    or the file size limit) the event is counted in `dropped`, its number stays unused, and the
    next event begins on a line of its own.

        with EventWriter(run.events) as events:
            events.emit(Phase("load"))

    Opening raises OSError where the file cannot be made. A file with history is continued: `seq`
    goes on, and after a torn last line the first event begins with a line feed.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.dropped = 0
        """Events that could not be written, whole or in part."""
        self._clock = clock
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        last, self._torn = _last_seq(self._descriptor)
        self._next_seq = last + 1

    def emit(self, event: Event) -> None:
        """Write one event. Never raises for a disk that does not take it."""
        if self._descriptor < 0:
            raise ValueError("the event writer is closed")
        line = format_line(Recorded(self._next_seq, self._clock(), event))
        self._next_seq += 1
        if self._torn:
            line = b"\n" + line
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            if error.errno == errno.EBADF:  # our own bug, no full disk
                raise
            self.dropped += 1
            return
        self._torn = written < len(line)
        self.dropped += self._torn

    def close(self) -> None:
        """Give the file back; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

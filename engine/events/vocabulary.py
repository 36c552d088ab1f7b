"""What a run can say about itself: one frozen dataclass for each `type` of `events.jsonl`.

Names and fields are a contract with scripts that read the file: add, never rename or drop.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["finished", "stopped", "failed"]
SampleTime = Literal["before", "during", "after"]
NoteLevel = Literal["info", "warning", "error"]
AckOutcome = Literal["done", "refused"]


@dataclass(frozen=True, slots=True)
class Started:
    """The model is loaded and the first step of this launch is next; once per launch."""

    run: str
    """Name of the run."""
    model: str
    """`base_model` as the config has it."""
    method: str
    """lora, qlora or full."""
    devices: tuple[str, ...]
    """UUIDs of the GPUs, or `cpu`."""
    world_size: int
    """Processes that train together."""
    total_steps: int
    """Optimizer steps from step 0 to the end of the run, those of earlier launches included."""
    trainable_parameters: int
    """Number of weights that the optimizer moves."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package name -> its version."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Progress of anything that is not a step: loading, tokenizing, evaluating, saving."""

    name: str
    done: int | None = None
    """How much of `total` is done, in the unit that `detail` names; None where nobody can say."""
    total: int | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step, reported after it is done."""

    step: int
    """Counts from 1. A number that comes again after a resume supersedes the earlier one."""
    epoch: float
    """Passes over the training rows so far, with its fraction."""
    loss: float
    """Mean over the learned tokens of the whole optimizer step, all ranks, in nats a token."""
    learned_tokens: int
    """Tokens of this step that are in the loss, all ranks."""
    tokens: int
    """Tokens of this step, padding left out, all ranks."""
    lr: float
    """Learning rate that this step used."""
    grad_norm: float
    """L2 norm of the gradient before clipping; nan where it was not measured."""
    seconds: float
    """Wall time of this step, its batch and optimizer included, without evals, saves and pauses."""
    tokens_per_second: float
    """`tokens` over `seconds`."""
    peak_memory_bytes: int
    """Largest amount allocated so far on the fullest device; resident bytes on a CPU."""
    total_steps: int | None = None
    """As in `Started`, so that the end of the file alone tells how far a run is."""
    grad_norm_clipped: float | None = None
    """L2 norm of the gradient that moved the weights, after clipping; None where not measured."""


@dataclass(frozen=True, slots=True)
class Eval:
    """Loss on the held-out rows."""

    step: int
    """Optimizer steps done; 0 is the untouched model."""
    loss: float
    """Mean over the learned tokens, in nats a token."""


@dataclass(frozen=True, slots=True)
class Score:
    """How one set of rows does at an evaluation; `Eval` sums up the held-out ones."""

    step: int
    dataset: str
    """Name of the evaluation set; `train` are rows that the run learns from."""
    loss: float
    """Mean over the learned tokens, in nats a token."""
    exact: float
    """Share of rows whose answer the model gives back word for word, 0 to 1."""
    rows: int
    loss_by_kind: Mapping[str, float] = field(default_factory=dict)
    """Of the learned tokens of each kind (think, text, call, eos ...), in nats a token."""
    tokens_by_kind: Mapping[str, int] = field(default_factory=dict)
    """How many learned tokens those are."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the model writes by itself, greedily, on a few held-out rows."""

    step: int
    dataset: str
    """Name of the evaluation set."""
    rows: int
    """Answers that were generated, one a row."""
    stopped: float
    """Share of them that end by themselves within `eval_max_new_tokens`, 0 to 1."""
    length_ratio: float
    """Median of their tokens over the reference's; where the limit cut one, what it had by then."""
    exact: float
    """Share that is the reference word for word, 0 to 1."""
    calls: int = 0
    """Those whose reference calls tools."""
    calls_valid: float | None = None
    """Share of `calls` with the reference's functions by name, each with arguments that are a JSON
    object; None where `calls` is 0."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the model has moved from its base on general questions, which nobody trains on."""

    step: int
    kl: float
    """Kullback-Leibler divergence of base from tuned model, nats a token; 0: the same."""
    tokens: int
    """Tokens over which it is the mean."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the model answers to a fixed prompt."""

    step: int
    prompt: str
    text: str
    when: SampleTime


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint or the result is whole on the disk."""

    step: int
    path: str
    """Relative to the run's folder where it lies inside."""


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for the person who watches."""

    level: NoteLevel
    text: str


@dataclass(frozen=True, slots=True)
class Shortage:
    """Memory ran out: `ended` follows, or the run goes on with `changes`. Sizes in bytes."""

    step: int
    """The optimizer step that did not fit; 0 before the first."""
    where: str
    """What the trainer was doing."""
    held_bytes: int
    """Allocated by then; resident bytes on a CPU."""
    asked_bytes: int | None = None
    """What was asked for beyond; None where the system did not say."""
    predicted_bytes: int | None = None
    """The plan's figure for the fullest moment; None where a run has no plan."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """What was held: weights, adapter, gradients, optimizer, and the rest, which is activations."""
    predicted_parts: Mapping[str, int] = field(default_factory=dict)
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
    saves_bytes: int = 0
    """What it saves, by the formula."""
    taken: bool = False
    """Whether the run goes on with it by itself, as `auto_fit` asks."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Answer to one line of `control.jsonl`, written when the trainer has acted on it.

    To `stop` it means that the request is accepted: what is saved and `ended` follow.
    """

    id: str
    """`id` of the command."""
    command: str
    outcome: AckOutcome


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a launch. Its absence, with the lock free, means that the run is lost."""

    outcome: Outcome
    step: int
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

    seq: int
    """Grows by one an event over the whole life of the folder; a hole means dropped events."""
    time: float
    """Unix seconds."""
    event: Event

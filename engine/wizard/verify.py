"""Proof, on this computer and for this config, that a stopped run goes on to the same losses.

Three trainers, each a process of its own: one that is never stopped; one that saves on its way and
is killed as by a power cut; one that goes on from what the second left on the disk. The steps of
the third have to be those of the first, bit for bit. Where a computer's own kernels add up in
another order each time, the first two say how far two unbroken runs are apart.

Where the config holds rows out, the last two evaluate on some, before the save and after the
resume: they have to agree on those losses too, and neither they nor the saves may change a step.
Where it warms up, the resume lies inside.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Final, TypeAlias

from engine.child import last_lines
from engine.config import RunConfig, read_config, write_config
from engine.data.sources import with_absolute_paths
from engine.errors import UserError, WorkError
from engine.events import Ended, Eval, Phase, Recorded, Step
from engine.launch import launch
from engine.plan import changed
from engine.runs import Follower, RunFolder, follow, run_home

STEPS: Final = 5
SAVED: Final = 2
"""The step that is gone on from: the first one after it shows weights, random numbers and rows, the
second what the optimizer keeps, the third what the evaluation between them left."""
_HELD_OUT_ROWS: Final = 8
"""Of the training rows, whatever sets the config names: those may take an hour."""
_TOLERATED: Final = 2.0
"""Times the measured run-to-run difference: one pair of runs is no upper bound."""
_AS_SHORT: Final[Mapping[str, object]] = {
    "max_steps": 100 * STEPS,  # none of the three comes to its end, where it would write a result
    **{"save_strategy": None, "saves_per_epoch": None, "save_steps": SAVED},
    **{"save_total_limit": STEPS, "load_best_model_at_end": None},
    # Nothing is asked: that takes minutes.
    **{"test_datasets": (), "sample_prompts": (), "eval_train_rows": 0, "evals_per_epoch": None},
    **{"eval_table_size": 0, "eval_drift": False, "warmup_ratio": None},
    **{"auto_fit": False, "resume_from_checkpoint": False, "hub_model_id": None},
}
"""What differs from the config that is proved."""
_UNBROKEN: Final[Mapping[str, object]] = {
    **{"save_strategy": "no", "save_steps": None},
    **{"eval_strategy": "no", "eval_steps": None},
}
_Made: TypeAlias = Sequence[Step | Eval]


@dataclass(frozen=True, slots=True)
class Proof:
    """What the three trainers made."""

    unbroken: _Made
    """Steps alone."""
    again: _Made
    """Unbroken, too; this one saved and evaluated."""
    resumed: _Made
    """From the step after `SAVED` on."""

    @property
    def difference(self) -> float:
        """The largest one of a loss or a gradient norm after the resume, relative; 0: all bits."""
        steps = _difference(_of_steps(self.unbroken, SAVED), _of_steps(self.resumed))
        return max(steps, _difference(_of_evals(self.again, SAVED), _of_evals(self.resumed)))

    @property
    def usual_difference(self) -> float:
        """The same between the two that nobody stopped."""
        return _difference(_of_steps(self.unbroken), _of_steps(self.again))

    @property
    def holds(self) -> bool:
        return self.difference <= _TOLERATED * self.usual_difference

    def document(self) -> dict[str, object]:
        return {
            "same": self.holds,
            "steps": STEPS,
            "resumed_from": SAVED,
            "difference": self.difference,
            "usual_difference": self.usual_difference,
            "losses": [_of_steps(each)[::2] for each in (self.unbroken, self.resumed)],
            "evaluations": [_of_evals(self.again, SAVED), _of_evals(self.resumed)],
            "verdict": self.verdict(),
        }

    def verdict(self) -> str:
        evaluated = ", an evaluation between them," if _of_evals(self.resumed) else ""
        steps = f"steps {SAVED + 1} to {STEPS}{evaluated}"
        after = f"{steps} after a kill and a resume from step-{SAVED}"
        if not self.difference:
            return f"✓ a stopped run goes on to the same losses: {after} are equal, bit for bit"
        far = f"differ by {self.difference:.1e} from an unbroken run's"
        apart = self.usual_difference
        usual = f"two that nobody stopped {f'differ by {apart:.1e}' if apart else 'are equal'} here"
        if self.holds:
            return f"✓ a stopped run goes on to the same losses: {after} {far}, and {usual}"
        return f"✗ a stopped run does not go on to the same losses: {after} {far}, while {usual}"


def _of_steps(made: _Made, after: int = 0) -> list[float]:
    steps = (each for each in made if isinstance(each, Step) and each.step > after)
    return [figure for step in steps for figure in (step.loss, step.grad_norm)]


def _of_evals(made: _Made, after: int = 0) -> list[float]:
    return [each.loss for each in made if isinstance(each, Eval) and each.step > after]


def _difference(first: Sequence[float], second: Sequence[float]) -> float:
    return max((_apart(*pair) for pair in zip(first, second, strict=True)), default=0.0)


def _apart(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):  # nan is no number that max would see
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def verify_resume(
    file: Path,
    changes: Sequence[str],
    plan: Mapping[str, object] | None,
    *,
    home: Path | None,
    module: str,
    say: Callable[[str], object],
    show: Callable[[Recorded], object],
) -> Proof:
    """Prove it for a config file; `say` hears what begins, `show` gets each trainer's phases.

    Their folder lies where the run's own would, for the room on that disk, and is removed. Raises
    the error of a trainer that fails, WorkError for one that ends without a word.
    """
    config = with_absolute_paths(read_config(file).override(changes).config, file.absolute().parent)
    near = Path(config.output_dir).parent if config.output_dir else run_home(home)
    near.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix=".windtunnel-verify-", dir=near)
    with scratch as place:
        unbroken, stopped = (RunFolder(Path(place).resolve() / name) for name in ("one", "two"))

        def made(run: RunFolder, what: str, checkpoint: str | None = None) -> _Made:
            say(what)
            follower = Follower(run.events, from_end=True)
            never = _UNBROKEN if run == unbroken else {}
            as_short = {**_AS_SHORT, **_like(config), **never, "output_dir": str(run.path)}
            short = changed(config, as_short)
            process = launch(
                run,
                detach=False,
                config=write_config(short),
                plan=plan,
                checkpoint=checkpoint,
                module=module,
            )
            try:
                return tuple(_follow(run, process, follower, show))
            finally:
                process.kill()  # what a crash does; only the folder is left
                process.wait()

        return Proof(
            made(unbroken, f"1 of 3: {STEPS} steps that nothing stops"),
            made(stopped, f"2 of 3: the same, saved at step {SAVED} and killed"),
            made(stopped, f"3 of 3: on from step {SAVED}", f"step-{SAVED}"),
        )


def _like(config: RunConfig) -> dict[str, object]:
    """What depends on the config that is proved: whether it warms up and evaluates."""
    warms_up = bool(config.warmup_steps or config.warmup_ratio)
    evaluates = bool(config.test_datasets or config.val_set_size)
    return {
        "warmup_steps": SAVED + 1 if warms_up else 0,
        "val_set_size": _HELD_OUT_ROWS if evaluates else 0.0,
        "eval_strategy": "steps" if evaluates else None,
        "eval_steps": SAVED if evaluates else None,
    }


def _follow(
    run: RunFolder,
    process: "Popen[bytes]",
    follower: Follower,
    show: Callable[[Recorded], object],
) -> Iterator[Step | Eval]:
    """What a trainer makes, up to step `STEPS`."""
    for recorded in follow(run, lambda: process.poll() is not None, follower=follower):
        event = recorded.event
        if isinstance(event, Phase):
            show(recorded)
        elif isinstance(event, Ended):
            raise UserError(event.what, event.why, event.fix, exit_status=1)
        elif isinstance(event, Step | Eval):
            yield event
            if isinstance(event, Step) and event.step == STEPS:
                return
    with run.log.open("rb") as log:
        said = " / ".join(last_lines(log)) or "nothing"
    raise WorkError(
        "The trainer ended without a word.",
        f"It left with exit status {process.returncode}; the last that it printed: {said}.",
        "See that there is memory and disk for the run: `windtunnel estimate` says how much.",
    )

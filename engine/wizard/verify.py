"""Proof, on this computer and for this config, that a stopped run goes on to the same losses.

Three trainers, each a process of its own: one that is never stopped; one that saves on its way and
is killed as by a power cut; one that goes on from what the second left on the disk. The steps of
the third have to be those of the first, bit for bit. Where a computer's own kernels add up in
another order each time, the first two say how far two unbroken runs are apart.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Final

from engine.child import last_lines
from engine.config import read_config, write_config
from engine.data.sources import with_absolute_paths
from engine.errors import UserError, WorkError
from engine.events import Ended, Phase, Recorded, Step
from engine.launch import launch
from engine.plan import changed
from engine.runs import Follower, RunFolder, follow, run_home

STEPS: Final = 5
SAVED: Final = 3
"""The step that is gone on from: the first one after it shows weights, random numbers and rows, the
second what the optimizer keeps."""
_TOLERATED: Final = 2.0
"""Times the measured run-to-run difference: one pair of runs is no upper bound."""
_AS_SHORT: Final[Mapping[str, object]] = {
    "max_steps": 100 * STEPS,  # none of the three comes to its end, where it would write a result
    **{"save_strategy": None, "saves_per_epoch": None, "save_steps": SAVED},
    **{"save_total_limit": STEPS, "load_best_model_at_end": None},
    # Held out is nothing, and nothing is asked: neither changes what is learned.
    **{"test_datasets": (), "val_set_size": 0.0, "sample_prompts": (), "eval_train_rows": 0},
    **{"eval_strategy": None, "eval_steps": None, "evals_per_epoch": None},
    **{"eval_table_size": 0, "eval_drift": False},
    # A step that moves no weight would prove nothing.
    **{"warmup_steps": 0, "warmup_ratio": None},
    **{"auto_fit": False, "resume_from_checkpoint": False, "hub_model_id": None},
}
"""What differs from the config that is proved."""
_NEVER_SAVED: Final[Mapping[str, object]] = {"save_strategy": "no", "save_steps": None}


@dataclass(frozen=True, slots=True)
class Proof:
    """What the three trainers made."""

    unbroken: tuple[Step, ...]
    again: tuple[Step, ...]
    """Unbroken, too; this one saved."""
    resumed: tuple[Step, ...]
    """From the step after `SAVED` on."""

    @property
    def difference(self) -> float:
        """The largest one of a loss or a gradient norm after the resume, relative; 0: all bits."""
        return _difference(self.unbroken[SAVED:], self.resumed)

    @property
    def usual_difference(self) -> float:
        """The same between the two that nobody stopped."""
        return _difference(self.unbroken, self.again)

    @property
    def holds(self) -> bool:
        return self.difference <= _TOLERATED * self.usual_difference

    def document(self) -> dict[str, object]:
        """The same as JSON has it."""
        return {
            "same": self.holds,
            "steps": STEPS,
            "resumed_from": SAVED,
            "difference": self.difference,
            "usual_difference": self.usual_difference,
            "losses": [[step.loss for step in each] for each in (self.unbroken, self.resumed)],
            "verdict": self.verdict(),
        }

    def verdict(self) -> str:
        """One sentence."""
        after = f"steps {SAVED + 1} to {STEPS} after a kill and a resume from step-{SAVED}"
        if not self.difference:
            return f"✓ a stopped run goes on to the same losses: {after} are equal, bit for bit"
        far = f"differ by {self.difference:.1e} from an unbroken run's"
        apart = self.usual_difference
        usual = f"two that nobody stopped {f'differ by {apart:.1e}' if apart else 'are equal'} here"
        if self.holds:
            return f"✓ a stopped run goes on to the same losses: {after} {far}, and {usual}"
        return f"✗ a stopped run does not go on to the same losses: {after} {far}, while {usual}"


def _difference(first: Sequence[Step], second: Sequence[Step]) -> float:
    pairs = [
        pair
        for one, other in zip(first, second, strict=True)
        for pair in ((one.loss, other.loss), (one.grad_norm, other.grad_norm))
    ]
    return max(_apart(*pair) for pair in pairs)


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

        def steps(run: RunFolder, what: str, checkpoint: str | None = None) -> tuple[Step, ...]:
            say(what)
            follower = Follower(run.events, from_end=True)
            never = _NEVER_SAVED if run == unbroken else {}
            short = changed(config, {**_AS_SHORT, **never, "output_dir": str(run.path)})
            process = launch(
                run,
                detach=False,
                config=write_config(short),
                plan=plan,
                checkpoint=checkpoint,
                module=module,
            )
            try:
                return tuple(_steps(run, process, follower, show))
            finally:
                process.kill()  # what a crash does; only the folder is left
                process.wait()

        return Proof(
            steps(unbroken, f"1 of 3: {STEPS} steps that nothing stops"),
            steps(stopped, f"2 of 3: the same, saved at step {SAVED} and killed"),
            steps(stopped, f"3 of 3: on from step {SAVED}", f"step-{SAVED}"),
        )


def _steps(
    run: RunFolder,
    process: "Popen[bytes]",
    follower: Follower,
    show: Callable[[Recorded], object],
) -> Iterator[Step]:
    """What a trainer makes, up to step `STEPS`."""
    for recorded in follow(run, lambda: process.poll() is not None, follower=follower):
        event = recorded.event
        if isinstance(event, Phase):
            show(recorded)
        elif isinstance(event, Ended):
            raise UserError(event.what, event.why, event.fix, exit_status=1)
        elif isinstance(event, Step):
            yield event
            if event.step == STEPS:
                return
    with run.log.open("rb") as log:
        said = " / ".join(last_lines(log)) or "nothing"
    raise WorkError(
        "The trainer ended without a word.",
        f"It left with exit status {process.returncode}; the last that it printed: {said}.",
        "See that there is memory and disk for the run: `windtunnel estimate` says how much.",
    )

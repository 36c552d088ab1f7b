"""One job for Slurm: its sbatch script around the command that each node runs.

The script saves the run before the time limit and queues the job again, so that a run of any length
is a chain of jobs of the length that a site allows. What Slurm, NCCL and the hub are told stands
there with its reason: an administrator reads it before anybody runs it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Final

from engine.errors import UserError
from engine.units import counted

USUAL_GPUS: Final = 8
"""GPUs of a node where nothing else is said."""
CORES_OF_A_GPU: Final = 4
"""Asked for where a job leaves part of a node to others; without it Slurm gives a task one."""
SAVE_SECONDS: Final = 600
"""Between the signal and the limit: one step and one save, of which that of a full fine-tune of
128B writes 2 TB."""
_SPARE_SECONDS: Final = 60
"""Before the limit the job is queued again in any case: a job that runs into it is over."""
_WORD = re.compile(r"[\w.,:@+-]+", re.ASCII)
_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?", re.ASCII)
SECRETS: Final = ("HF_TOKEN", "WANDB_API_KEY")


@dataclass(frozen=True, slots=True)
class Allocation:
    """What is asked of Slurm; what is None is left to the site."""

    nodes: int
    gpus_per_node: int
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    """The limit as Slurm spells it: minutes, HH:MM:SS, D-HH and the like."""

    def __post_init__(self) -> None:
        for name in ("partition", "account", "time"):
            value = getattr(self, name)
            if value is not None and not _WORD.fullmatch(value):
                raise UserError(
                    f"--{name} is {value!r}.",
                    "It becomes a line of the script, and Slurm has no such names.",
                    "Use letters, digits and . , : @ + - _ alone.",
                )
        if self.time is not None:
            seconds_of(self.time)

    def words(self) -> str:
        each = f" with {counted(self.gpus_per_node, 'GPU')}" if self.gpus_per_node else ""
        every = " each" if each and self.nodes > 1 else ""
        return f"{counted(self.nodes, 'node')}{each}{every}"


def allocate(
    ranks: int, nodes: int | None = None, gpus_per_node: int | None = None
) -> tuple[int, int]:
    """(nodes, GPUs of each) for so many ranks; what is None follows from the other.

    0 GPUs are ranks on processors. Raises UserError where the two do not give that many, with two
    that do.
    """
    if gpus_per_node == 0:
        return nodes or 1, 0
    if gpus_per_node is None:
        gpus_per_node = max(1, ranks // nodes) if nodes else min(ranks, USUAL_GPUS)
    if nodes is None:
        nodes = max(1, ranks // gpus_per_node)
    if nodes * gpus_per_node != ranks:
        each = max(size for size in range(1, USUAL_GPUS + 1) if ranks % size == 0)
        raise UserError(
            f"{counted(nodes, 'node')} of {counted(gpus_per_node, 'GPU')}"
            f" {'is' if nodes == 1 else 'are'} {counted(nodes * gpus_per_node, 'rank')}.",
            f"The config is laid out for {ranks}: dp_shard_size x dp_replicate_size x"
            " tensor_parallel_size.",
            f"Ask for --nodes {ranks // each} --gpus-per-node {each}, or change the config.",
        )
    return nodes, gpus_per_node


def seconds_of(limit: str) -> int:
    """A time limit of Slurm's in seconds. Raises UserError for what is none."""
    found = _TIME.fullmatch(limit)
    if not found:
        raise UserError(
            f"--time is {limit!r}.",
            "Slurm reads minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM and D-HH:MM:SS.",
            "Write it as one of these: 24:00:00 is a day.",
        )
    days, *rest = (int(found[name] or 0) for name in "dabc")
    a, b, c = rest
    if found["d"] is not None:
        return days * 86400 + a * 3600 + b * 60 + c
    if found["c"] is not None:
        return a * 3600 + b * 60 + c
    return a * 60 + b


@dataclass(frozen=True, slots=True)
class Job:
    """What one job runs."""

    name: str
    title: str
    """What it is, for the script's first line."""
    allocation: Allocation
    log: Path
    """Folder of its log."""
    saves: Path
    """The file that another save changes: LATEST."""
    variables: Mapping[str, tuple[str, str]]
    """Of the environment, by name: (value as the shell reads it, why)."""
    before: tuple[str, ...]
    """Lines of shell in front of the command."""
    command: tuple[str, ...]
    """What srun starts, a line each as the shell reads it."""
    repeats_at: str
    """Test of the shell for whether a job that was warned goes on in another one."""
    notes: tuple[str, ...] = ()
    """Comments above srun."""

    def script(self) -> str:
        return "\n".join([*self._head(), "", *self._environment(), "", *self._work()]) + "\n"

    @property
    def grace_seconds(self) -> int:
        """From the signal to the limit."""
        limit = self.allocation.time
        return SAVE_SECONDS if limit is None else min(SAVE_SECONDS, seconds_of(limit) // 3)

    def log_pattern(self) -> str:
        """The log as sbatch names it: %j is the job's number."""
        return str(self.log / f"{self.name}-").replace("%", "%%") + "%j.log"

    def _head(self) -> Iterator[str]:
        asked = self.allocation
        yield "#!/bin/bash"
        yield f"# {self.title}"
        yield "# Options of sbatch itself win over the lines that begin with #SBATCH."
        yield f"#SBATCH --job-name={self.name}"
        if asked.partition:
            yield f"#SBATCH --partition={asked.partition}"
        if asked.account:
            yield f"#SBATCH --account={asked.account}"
        if asked.time:
            yield f"#SBATCH --time={asked.time}"
        yield f"#SBATCH --nodes={asked.nodes}"
        yield "# One task a node: it starts a process for each of the node's GPUs."
        yield "#SBATCH --ntasks-per-node=1"
        if asked.gpus_per_node:
            yield f"#SBATCH --gpus-per-node={asked.gpus_per_node}"
        if asked.nodes > 1 or asked.gpus_per_node >= USUAL_GPUS:
            yield "# Whole nodes: all their cores and memory, and no neighbour on their network."
            yield "#SBATCH --exclusive"
            yield "#SBATCH --mem=0"
        elif asked.gpus_per_node:
            yield "# One core trains, the others read rows and images."
            yield f"#SBATCH --cpus-per-gpu={CORES_OF_A_GPU}"
        yield "# A signal so many seconds before the time limit: time for one step and one save."
        yield f"#SBATCH --signal=B:USR1@{self.grace_seconds}"
        yield "# The job may be queued again: at its limit, or by Slurm when a node fails."
        yield "#SBATCH --requeue"
        yield "#SBATCH --open-mode=append"
        yield f'#SBATCH --output="{self.log_pattern()}"'
        yield f"# {' and '.join(SECRETS)} pass through where they are set, and are written nowhere."
        yield "#SBATCH --export=ALL"

    def _environment(self) -> Iterator[str]:
        yield "set -u"
        for name, (value, why) in self.variables.items():
            yield f"export {name}={value}  # {why}"
        if self.allocation.nodes > 1:
            yield "# Where nodes have several networks, name the fast one (ip link; ibstat):"
            yield "# export NCCL_SOCKET_IFNAME=ib0"
            yield "# export NCCL_IB_HCA=mlx5"
        yield f"for secret in {' '.join(SECRETS)}; do"
        yield '  if [ -n "${!secret:-}" ]; then echo "$secret is set"; fi'
        yield "done"

    def _work(self) -> Iterator[str]:
        yield from self.before
        yield f"latest={quote(str(self.saves))}"
        yield from _QUEUE_AGAIN.format(
            grace=self.grace_seconds, wait=max(1, self.grace_seconds - _SPARE_SECONDS)
        ).splitlines()
        yield from self.notes
        yield " \\\n  ".join(("srun --kill-on-bad-exit=0", *self.command)) + " &"
        yield from _WAIT.format(test=self.repeats_at).splitlines()


_QUEUE_AGAIN: Final = """\
newest() {{ cat "$latest" 2>/dev/null || readlink "$latest" 2>/dev/null; }}
before=$(newest)
warned=false

queue_again() {{
  if [ "$(newest)" = "$before" ]; then
    echo "Not queued again: nothing was saved since this job started. It needs more time."
    return 1
  fi
  scontrol requeue "$SLURM_JOB_ID"
}}

# Slurm warns {grace} seconds before the limit: the run saves after its current step and stops.
# Where that takes too long, the job goes on from the save before.
# shellcheck disable=SC2329  # the trap calls it
save_and_stop() {{
  warned=true
  echo "$(date): the time limit is near, saving"
  kill -USR1 "$step"
  (sleep {wait} && queue_again) &
  watchdog=$!
}}

# One node that ends first, as after a save, must not end the others.\
"""
_WAIT: Final = """\
step=$!
trap save_and_stop USR1
wait "$step"
status=$?
# The signal ends the first wait; the second is for the end of the step.
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  status=$?
done
trap '' USR1
if [ "$warned" = true ]; then
  kill "$watchdog" 2>/dev/null
  if {test}; then
    queue_again && sleep 600  # Slurm ends this script and starts it anew
  fi
fi
exit "$status"\
"""

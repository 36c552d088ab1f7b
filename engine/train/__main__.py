"""`python -m engine.train run FOLDER [--resume] [--from step-N]`: one trainer process.

The lock is taken before anything heavy is imported, and whatever happens ends in an `ended` event
with three sentences: a run is never just gone.
"""

import argparse
import sys
import traceback
from pathlib import Path

from engine.errors import UserError, WorkError
from engine.events import Ended, EventWriter, Phase
from engine.runs import ControlReader, RunFolder, RunLock, StopSignals
from engine.visible import visible

# torch's allocator on a CPU raises a plain RuntimeError; the other words are CUDA's.
_MEMORY_WORDS = ("can't allocate memory", "out of memory")


def main(arguments: list[str] | None = None) -> int:
    """Run one trainer; returns its exit status: 0 ended as asked, 1 failed, 2 wrong request."""
    parser = argparse.ArgumentParser(prog="python -m engine.train")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what a run folder's config.yml says")
    run.add_argument("folder", type=Path)
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    run.add_argument("--from", dest="checkpoint", help="go on from this one: step-N")
    options = parser.parse_args(arguments)
    try:
        return train(RunFolder(options.folder.resolve()), options.resume, options.checkpoint)
    except UserError as error:  # the lock is another process's: its events are not ours to write
        print(error, file=sys.stderr)
        return error.exit_status


def train(run: RunFolder, resume: bool, checkpoint: str | None) -> int:
    """Hold the run's lock for life and carry the run out."""
    # Signals first: one that comes between the two would kill without a word.
    with StopSignals() as signals, RunLock(run) as lock, EventWriter(run.events) as events:
        control = ControlReader(run.control, since=lock.since)
        try:
            events.emit(Phase("import", detail="PyTorch and transformers"))
            from engine.train.run import run as carry_out
            from engine.train.session import Session

            carry_out(Session(run, events, control, signals), resume=resume, checkpoint=checkpoint)
        except Exception as error:
            sentence = explain(error)
            traceback.print_exc()
            events.emit(Ended("failed", _last_step(run), sentence.what, sentence.why, sentence.fix))
            return sentence.exit_status
    return 0


def explain(error: Exception) -> UserError:
    """The three sentences for whatever ended the run."""
    if isinstance(error, UserError):
        return error
    said = visible(next(iter(str(error).splitlines()), "") or type(error).__name__, one_line=True)
    if isinstance(error, ModuleNotFoundError):
        return WorkError(
            f"Training needs the package {(error.name or said).partition('.')[0]}, which is not "
            "installed.",
            "The base install plans and previews; the training stack is an extra of its own.",
            "Install it: pip install 'windtunnel[train]'",
        )
    if isinstance(error, MemoryError) or any(words in str(error) for words in _MEMORY_WORDS):
        told = said.rpartition("DefaultCPUAllocator: ")[2].split(". ")[:2]
        return WorkError(
            "The run needed more memory than there is.",
            f"The system says: {'. '.join(told).rstrip('.')}.",
            "Set gradient_checkpointing: true or adapter: qlora and resume, or start a new run "
            "with a lower micro_batch_size or sequence_len.",
        )
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return WorkError(
            "A file could not be read or written.",
            f"The system says: {said.rstrip('.')}.",
            "See that the file is whole and that the disk has space; the run resumes from its "
            "last checkpoint.",
        )
    return WorkError(
        "The trainer stopped at an error that it does not know.",
        f"{type(error).__name__}: {said.rstrip('.')}.",
        "engine.log in the run's folder has the details; the run resumes from its last checkpoint.",
    )


def _last_step(run: RunFolder) -> int:
    from engine.runs import summarize

    return summarize(run).step


if __name__ == "__main__":
    sys.exit(main())

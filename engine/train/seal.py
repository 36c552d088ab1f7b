"""What proves that a checkpoint is, bit by bit, as it was saved, and which one a run goes on from.

`state.json` holds a digest of every other file of its folder and one of its own content. Nothing of
a checkpoint is used before all of them were compared: a flipped bit trains on without a word.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from engine.config import RunConfig, spell
from engine.errors import WorkError
from engine.events import NoteLevel
from engine.files import digest
from engine.plan import SAME_RESULT
from engine.plan.layout import RESIZED
from engine.runs.folder import LATEST, RunFolder, list_checkpoints, read_mark
from engine.visible import visible

STATE = "state.json"
Say: TypeAlias = Callable[[str], object]
"""Hears a sentence for the person."""


class Damaged(Exception):
    """Why a folder is no whole checkpoint, as the second half of a sentence."""


@dataclass(slots=True)
class Position:
    """Where a run is: what a checkpoint holds beside tensors."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen since step 0, padding left out."""
    best_loss: float | None = None
    best_step: int | None = None
    fingerprint: str = ""
    """Hash of what decides the order of the batches; a checkpoint of another order is refused."""
    loss_chunk_bytes: int = 0
    """Logits that the loss held at once; 0 where that was not written down."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole one."""

    folder: Path
    position: Position
    optimizer_class: str
    optimizer: Mapping[str, Any]
    """Of the optimizer's state what is no tensor."""
    config: Mapping[str, Any]
    """What the run was when it was saved."""


def write_state(
    folder: Path,
    position: Position,
    optimizer: tuple[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    digests: Mapping[str, str],
) -> None:
    """Write `state.json`; of a file that `digests` has not, what is on the disk counts.

    `optimizer` is its class and its values. Raises OSError where there is no room.
    """
    state = asdict(position) | {
        "optimizer_class": optimizer[0],
        "optimizer": optimizer[1],
        "config": config,
        "files": {path.name: digests.get(path.name) or digest(path) for path in folder.iterdir()},
    }
    (folder / STATE).write_bytes(_with_digest(state))


def _with_digest(state: dict[str, Any]) -> bytes:
    own = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    return json.dumps(state | {"digest": own}).encode()


def read_checkpoint(folder: Path, *, compare: bool = True) -> Checkpoint:
    """The checkpoint in `folder`, every file of which is read where it is to `compare` their
    digests. Raises Damaged."""
    state = _read_state(folder)
    try:
        for name, saved in state.pop("files").items():
            if compare and digest(folder / name) != saved:
                raise Damaged(f"{name} is not as it was saved")
        rest = [state.pop(key) for key in ("optimizer_class", "optimizer", "config")]
        found = Checkpoint(folder, Position(**state), *rest)
    except OSError as error:
        named = Path(str(error.filename)).name
        raise Damaged(f"{named} cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise Damaged(f"its {STATE} holds something else than a checkpoint's") from error
    if folder.name != f"step-{found.position.step}":
        raise Damaged(f"it holds step {found.position.step}")
    return found


def _read_state(folder: Path) -> dict[str, Any]:
    """The content of `state.json` without its digest, which was compared. Raises Damaged."""
    try:
        written = (folder / STATE).read_bytes()
        state = json.loads(written)
        has_digest = isinstance(state, dict) and bool(state.pop("digest", None))
        # Byte for byte: another spelling of the same content is another file, too.
        if has_digest and _with_digest(state) == written:
            return dict(state)
    except OSError as error:
        raise Damaged(f"{STATE} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{STATE} is not as it was saved") from error
    if isinstance(state, dict) and "step" in state and not has_digest:
        raise Damaged(f"{STATE} has no digest, as an earlier version of Windtunnel wrote it")
    raise Damaged(f"{STATE} is not as it was saved")


def newest_whole(run: RunFolder, say: Say) -> Checkpoint | None:
    """The checkpoint that LATEST names, else the newest whole one before it; None where the run
    has none. `say` hears of each that is passed over.

    Raises WorkError where none is whole.
    """
    names = list_checkpoints(run.checkpoints)
    marked = read_mark(run.checkpoints, LATEST)
    if names and not marked:
        say(f"{LATEST} names no checkpoint of this run: the newest whole one counts")
    last = names.index(marked) + 1 if marked else len(names)
    for name in reversed(names[:last]):
        try:
            return read_checkpoint(run.checkpoints / name)
        except Damaged as error:
            say(f"{name} is damaged and passed over: {error}")
    if not names:
        return None
    shown, root = (visible(str(path), one_line=True) for path in (run.path, run.checkpoints))
    again = f"`windtunnel resume {shown} --from {names[-1]}` tries a later one. "
    raise WorkError(
        f"No checkpoint of this run up to {names[last - 1]} is whole.",
        "Files were changed, cut short or removed after they were saved.",
        f"{again if names[last:] else ''}Put a copy back, or remove {root} and resume:"
        " the run then begins at step 1.",
    )


def named_whole(run: RunFolder, name: str) -> Checkpoint:
    """The checkpoint `name` of a run. Raises WorkError where it is not whole, or not there."""
    try:
        if name not in list_checkpoints(run.checkpoints):
            raise Damaged("there is none of that name")
        return read_checkpoint(run.checkpoints / name)
    except Damaged as error:
        shown = visible(str(run.path), one_line=True)
        raise WorkError(
            f"The checkpoint {visible(name, one_line=True)} cannot be read.",
            f"It was checked: {error}.",
            f"Name another one with --from, or leave it out: `windtunnel resume {shown}` takes the"
            " newest whole one.",
        ) from error


def changes_since(
    found: Checkpoint, config: RunConfig, told: Set[str] = frozenset()
) -> Iterator[tuple[NoteLevel, str]]:
    """A sentence on each value of `config` that is another one than when `found` was saved, but for
    the keys in `told`."""
    saved = dict(found.config)
    now = config.model_dump(mode="json", exclude_none=True)
    for key in sorted({*saved, *now} - {"resume_from_checkpoint"} - told):
        old, new = saved.get(key), now.get(key)
        if old != new:
            was, became = (visible(spell(key, value), one_line=True) for value in (old, new))
            level: NoteLevel = "info" if key in SAME_RESULT | RESIZED else "warning"
            yield level, f"{key} was {was} until {found.folder.name} and is {became} from there on"

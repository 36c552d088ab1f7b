"""What happens to a finished result before the run ends: its card, and its upload where asked for.

Apart from the two because nothing here may fail a run whose weights are safe on the disk: what goes
wrong becomes a note that says how to repeat it.
"""

from collections.abc import Iterator
from pathlib import Path

from engine.config import RunConfig
from engine.errors import UserError
from engine.events import Note, Phase
from engine.publish.card import write_card
from engine.publish.hub import push_in_own_process
from engine.runs import RunFolder


def publish_result(run: RunFolder, result: Path, config: RunConfig) -> Iterator[Note | Phase]:
    """Write README.md into `result`, and upload it where the config names a repository."""
    try:
        write_card(run, result)
    except (OSError, UserError) as error:
        yield Note("warning", f"the model card could not be written: {error}")
    if config.hub_model_id:
        yield Phase("upload", detail=config.hub_model_id)
        worked, words = push_in_own_process(run)
        yield Note("info" if worked else "warning", words)

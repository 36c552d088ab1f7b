"""The wizard without a screen: the same six questions as numbered lines, over the same draft.

For `--plain`, a dumb terminal and a screen reader. `wizard` has the order of the questions, a
module each asks them, `dialogue` knows how a person is asked.
"""

from tui.plain.dialogue import Dialogue, stream_dialogue
from tui.plain.wizard import run_plain

__all__ = ["Dialogue", "run_plain", "stream_dialogue"]

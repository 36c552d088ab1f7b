"""What a result needs to be used by others: its model card, how it is served, its way to the hub.

No torch: all of it is read from the run's own files, so that the trainer writes the same card at
the end of a run as a command does years later.
"""

from engine.publish.card import write_card
from engine.publish.facts import ResultFacts, read_facts
from engine.publish.hub import publish_result, push
from engine.publish.serve import Hint, serve_hints

__all__ = [
    "Hint",
    "ResultFacts",
    "publish_result",
    "push",
    "read_facts",
    "serve_hints",
    "write_card",
]

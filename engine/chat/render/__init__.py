"""A conversation to token ids, the kind of each token and the message that it came from.

mistral-common encodes every piece of a conversation on its own, and no text ever becomes a
control token: so piece boundaries are token boundaries and the masks are exact by construction.
"""

from typing import TYPE_CHECKING, Literal

from engine.chat.messages import Conversation, RowProblem
from engine.chat.render.encode import encode
from engine.chat.render.kinds import (
    IGNORED_LABEL,
    WITHHELD,
    Kind,
    LabelRule,
    Rendered,
    RenderedImage,
    count_learned,
    labels,
    learned,
    truncate,
)
from engine.chat.render.thinking import settle

if TYPE_CHECKING:
    from engine.chat.tokenizer.chat_tokenizer import ChatTokenizer

__all__ = [
    "IGNORED_LABEL",
    "RENDERER_VERSION",
    "WITHHELD",
    "Kind",
    "LabelRule",
    "Rendered",
    "RenderedImage",
    "count_learned",
    "labels",
    "learned",
    "render",
    "truncate",
]

# Part of the key of prepared arrays: raised when any conversation gives other arrays than before.
RENDERER_VERSION = 2


def render(
    conversation: Conversation,
    tokenizer: "ChatTokenizer",
    *,
    history_thinking: Literal["keep", "drop"] = "keep",
) -> Rendered:
    """The arrays of a conversation, ids equal to mistral-common's `encode_chat_completion`.

    `history_thinking` "drop" leaves out the assistant's thinking before the last user message,
    as some servers do. Raises RowProblem where the tokenizer's version refuses the conversation.
    """
    settled = settle(conversation, tokenizer, history_thinking)
    try:
        return encode(settled, tokenizer)
    except BaseException as error:
        # tiktoken's Rust panics on a run of some 10^6 blanks, outside Exception and unexported.
        if type(error).__name__ != "PanicException":
            raise
        raise RowProblem(
            "The text cannot be tokenized.",
            "It holds a run of blanks, or of one character, that is too long for the tokenizer.",
            "Shorten the run, or delete the row.",
        ) from None

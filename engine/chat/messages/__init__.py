"""Any row to one internal form, or the reason why not.

Datasets spell the same conversation in many ways; here they become one, before a tokenizer is
known. What only one tokenizer version refuses is left to `engine.chat.render`.
"""

from engine.chat.messages.conversation import (
    Conversation,
    Image,
    Message,
    Note,
    Part,
    Role,
    RowProblem,
    Text,
    Think,
    ToolCall,
)
from engine.chat.messages.row import read_row
from engine.chat.messages.row_format import RowFormat

__all__ = [
    "Conversation",
    "Image",
    "Message",
    "Note",
    "Part",
    "Role",
    "RowFormat",
    "RowProblem",
    "Text",
    "Think",
    "ToolCall",
    "read_row",
]

import pytest

from engine.chat.conversation import Conversation, RowFormat
from engine.chat.row import read_row
from tests.support.tokenizers import Read, Tokenizers


@pytest.fixture(scope="session")
def tokenizers() -> Tokenizers:
    return Tokenizers()


@pytest.fixture
def read() -> Read:
    """Reads a row, given as its messages and other columns, in the default format."""

    def read_messages(*messages: object, **columns: object) -> Conversation:
        return read_row({"messages": list(messages), **columns}, RowFormat())

    return read_messages

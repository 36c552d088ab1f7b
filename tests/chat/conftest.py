from collections.abc import Callable

import pytest

from engine.chat.messages import Conversation, RowFormat, read_row
from engine.chat.tokenizer import ChatTokenizer, TokenizerSpec
from tests.support.tokenizers import tokenizer_of

SPECS = {
    "v3": TokenizerSpec("v3"),
    "v7": TokenizerSpec("v7"),
    "v11": TokenizerSpec("v11"),
    "v13": TokenizerSpec("v13", think=True, image=(14, 1540, 2)),
    "v15": TokenizerSpec("v15", think=True, image=(14, 1540, 2), settings=True),
}


class Tokenizers(dict[str, ChatTokenizer]):
    """One tokenizer of each version, made when first asked for."""

    def __missing__(self, version: str) -> ChatTokenizer:
        self[version] = tokenizer_of(SPECS[version])
        return self[version]


@pytest.fixture(scope="session")
def tokenizers() -> Tokenizers:
    return Tokenizers()


@pytest.fixture
def read() -> Callable[..., Conversation]:
    """Reads a row, given as its messages and other columns, in the default format."""

    def read_messages(*messages: object, **columns: object) -> Conversation:
        return read_row({"messages": list(messages), **columns}, RowFormat())

    return read_messages

"""What the tests of rendering share: the shortest messages, and one tokenizer of each version.

Building one takes a second.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from engine.catalog import TokenizerSpec
from engine.chat.conversation import Conversation
from engine.chat.tokenizer import ChatTokenizer, build_tokenizer

tokenizer_of = cache(build_tokenizer)

Read = Callable[..., Conversation]
"""Reads a row, given as its messages and other columns."""
USER: dict[str, Any] = {"role": "user", "content": "q"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "a"}
SPECS = {
    "v3": TokenizerSpec("v3"),
    "v7": TokenizerSpec("v7"),
    "v11": TokenizerSpec("v11"),
    "v13": TokenizerSpec("v13", think=True, image=(14, 1540, 2)),
    "v15": TokenizerSpec("v15", think=True, image=(14, 1540, 2), settings=True),
}


class Tokenizers(dict[str, ChatTokenizer]):
    """One tokenizer of each version, made when first asked for."""

    def __init__(self, specs: Mapping[str, TokenizerSpec] = SPECS) -> None:
        super().__init__()
        self.specs = specs

    def __missing__(self, version: str) -> ChatTokenizer:
        self[version] = tokenizer_of(self.specs[version])
        return self[version]

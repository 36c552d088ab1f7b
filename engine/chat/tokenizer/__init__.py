"""A Tekken tokenizer and what a renderer and a preview need of it.

What a tokenizer can do is read from its file, never guessed from a model's name: the version, the
control tokens and the settings that it holds. `build` makes one in memory, `find` opens one.
"""

from engine.chat.tokenizer.build import TokenizerSpec, build_tokenizer, write_tekken
from engine.chat.tokenizer.chat_tokenizer import ChatTokenizer, SpecialIds
from engine.chat.tokenizer.find import open_tokenizer, spec_of

__all__ = [
    "ChatTokenizer",
    "SpecialIds",
    "TokenizerSpec",
    "build_tokenizer",
    "open_tokenizer",
    "spec_of",
    "write_tekken",
]

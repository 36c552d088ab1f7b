"""One tokenizer of each specification for all tests: building one takes a second."""

from functools import cache

from engine.chat.tokenizer import build_tokenizer

tokenizer_of = cache(build_tokenizer)

"""One tokenizer of each specification for all tests: building one takes a second."""

from functools import cache

from engine.chat.tokenizer import ChatTokenizer, TokenizerSpec, build_tokenizer

tokenizer_of = cache(build_tokenizer)


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

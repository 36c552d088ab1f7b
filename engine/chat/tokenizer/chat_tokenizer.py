"""One tokenizer, opened: mistral-common's vocabulary and the few things read from it once.

It exists so that rendering looks nothing up per row, and so that a preview can show a token by
its id: a dataset's literal "[THINK]" never looks like the control token.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from mistral_common.tokens.tokenizers.base import (
    SpecialTokenPolicy,
    SpecialTokens,
    TokenizerVersion,
)
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from engine.chat.images import ImageSpec
from engine.visible import visible

# Long system prompts and tool lists repeat from row to row; a few hundred are enough to hold
# those of a mixed dataset and too few to matter in memory.
_REPEATED_TEXTS = 256


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of the control tokens, None where the tokenizer writes none."""

    bos: int
    eos: int
    pad: int
    inst: int
    end_inst: int
    system: int
    end_system: int
    tools: int
    end_tools: int
    results: int
    end_results: int
    result_content: int
    call: int
    args: int | None
    call_id: int | None
    think: int | None
    end_think: int | None
    settings: int | None
    end_settings: int | None
    image: int | None
    image_break: int | None
    image_end: int | None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ChatTokenizer:
    """A tokenizer for fine-tuning.

    `fingerprint` is the same for the same tokens and rules wherever they came from. A text id is
    a rank of `encode_ordinary` plus `first_text_id`; ids below that are control tokens.
    """

    tekken: Tekkenizer
    version: str
    specials: SpecialIds
    vocabulary_size: int
    first_text_id: int
    fingerprint: str
    efforts: tuple[str, ...]
    """The values of reasoning_effort that it has settings for."""
    default_effort: str | None
    image: ImageSpec | None
    """How images become tokens; None for a model that reads only text."""
    encode_ordinary: Callable[[str], list[int]]
    """Text to ranks; control tokens never come of it."""
    encode_repeated: Callable[[str], tuple[int, ...]]
    """The same for texts that many rows share: it remembers."""

    @property
    def thinks(self) -> bool:
        """Whether thinking has control tokens of its own."""
        return self.specials.think is not None

    def is_control(self, token_id: int) -> bool:
        return token_id < self.first_text_id

    def size(self, rank: int) -> int:
        """Bytes of text behind a rank of `encode_ordinary`."""
        return len(self._bytes(rank + self.first_text_id))

    def piece(self, token_id: int) -> str:
        """One token for display: safe on a terminal, on one line, stray bytes as <E2>."""
        return _show(self._bytes(token_id))

    def pieces(self, token_ids: Iterable[int]) -> Iterator[str]:
        """The tokens for display; a character over several tokens is shown by the last of them."""
        held = b""
        waiting = 0
        for token_id in token_ids:
            control = self.is_control(token_id)
            held = b"" if control else held + self._bytes(token_id)
            if not control and _is_cut_off(held):
                waiting += 1
                continue
            yield from [""] * waiting
            waiting = 0
            yield _show(self._bytes(token_id) if control else held)
            held = b""
        if waiting:
            yield from [""] * (waiting - 1)
            yield _show(held)

    def _bytes(self, token_id: int) -> bytes:
        return self.tekken.id_to_byte_piece(int(token_id), SpecialTokenPolicy.KEEP)


def _show(piece: bytes) -> str:
    text = piece.decode("utf-8", errors="surrogateescape")
    if any("\udc80" <= letter <= "\udcff" for letter in text):
        text = "".join(
            f"<{ord(letter) - 0xDC00:02X}>" if "\udc80" <= letter <= "\udcff" else letter
            for letter in text
        )
    return visible(text, one_line=True)


def _is_cut_off(piece: bytes) -> bool:
    """Whether the bytes end inside a character, which the next token may complete."""
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def assemble(tekken: Tekkenizer) -> ChatTokenizer:
    """The tokenizer around a loaded vocabulary.

    Raises ValueError where it lacks a control token or the settings that its version needs.
    """
    builder = tekken.model_settings_builder
    if tekken.version.supports_model_settings and builder is None:
        raise ValueError(f"{tekken.version.value} needs a model_settings_builder")
    effort = builder.reasoning_effort if builder else None
    ranks: Callable[[str], list[int]] = tekken._model.encode_ordinary
    return ChatTokenizer(
        tekken=tekken,
        version=tekken.version.value,
        specials=_find_specials(tekken),
        vocabulary_size=tekken.n_words,
        first_text_id=tekken.num_special_tokens,
        fingerprint=_fingerprint(tekken),
        efforts=tuple(str(value) for value in effort.values) if effort else (),
        default_effort=str(effort.default) if effort else None,
        image=ImageSpec(
            tekken.image.image_patch_size,
            tekken.image.max_image_size,
            tekken.image.spatial_merge_size,
        )
        if tekken.image
        else None,
        encode_ordinary=ranks,
        encode_repeated=lru_cache(_REPEATED_TEXTS)(lambda text: tuple(ranks(text))),
    )


def _find_specials(tekken: Tekkenizer) -> SpecialIds:
    needed = tekken.get_special_token

    def optional(token: str, *, exists: bool = False) -> int | None:
        return needed(token) if exists or tekken.is_special(token) else None

    # Encoders before v13 refuse thinking, whatever tokens the file names.
    thinks = tekken.version >= TokenizerVersion.v13
    names_arguments = tekken.version >= TokenizerVersion.v11
    has_settings, sees = tekken.version.supports_model_settings, tekken.image is not None
    return SpecialIds(
        bos=tekken.bos_id,
        eos=tekken.eos_id,
        pad=tekken.pad_id,
        inst=needed(SpecialTokens.begin_inst),
        end_inst=needed(SpecialTokens.end_inst),
        system=needed(SpecialTokens.begin_system),
        end_system=needed(SpecialTokens.end_system),
        tools=needed(SpecialTokens.begin_tools),
        end_tools=needed(SpecialTokens.end_tools),
        results=needed(SpecialTokens.begin_tool_results),
        end_results=needed(SpecialTokens.end_tool_results),
        result_content=needed(SpecialTokens.begin_tool_content),
        call=needed(SpecialTokens.tool_calls),
        args=optional(SpecialTokens.args, exists=names_arguments),
        call_id=optional(SpecialTokens.call_id, exists=names_arguments),
        think=optional(SpecialTokens.begin_think) if thinks else None,
        end_think=optional(SpecialTokens.end_think) if thinks else None,
        settings=optional(SpecialTokens.begin_model_settings, exists=has_settings),
        end_settings=optional(SpecialTokens.end_model_settings, exists=has_settings),
        image=optional(SpecialTokens.img, exists=sees),
        image_break=optional(SpecialTokens.img_break, exists=sees),
        image_end=optional(SpecialTokens.img_end, exists=sees),
    )


def _fingerprint(tekken: Tekkenizer) -> str:
    builder = tekken.model_settings_builder
    rules = {
        "version": tekken.version.value,
        "pattern": tekken._model._pat_str,
        "sizes": [tekken.n_words, tekken.num_special_tokens],
        "specials": [[token["rank"], token["token_str"]] for token in tekken._all_special_tokens],
        "image": vars(tekken.image) if tekken.image else None,
        "settings": builder.model_dump(mode="json") if builder else None,
    }
    content = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
    for rank in range(tekken.n_words - tekken.num_special_tokens):
        token = tekken._model.decode_single_token_bytes(rank)
        content.update(len(token).to_bytes(4, "little") + token)
    return content.hexdigest()

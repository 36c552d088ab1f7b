"""What columns of datasets are usually called, and which of them nobody wants learned."""

import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from engine.chat.conversation import THINKING_NAMES, plain_name

USUAL: Final = MappingProxyType(
    {
        "field_tools": ("tools", "availabletools", "functions", "toolsjson"),
        "field_system": (
            *("system", "systemprompt", "systemmessage", "systeminstruction"),
            *("systeminstructions", "instructionsystem"),
        ),
        "field_context": (
            *("context", "passage", "paragraph", "document", "background", "article", "passages"),
            *("contexts", "evidence", "support", "story", "definition", "documents", "docs"),
            *("chunks", "retrievedcontext", "retrievedcontexts", "retrieveddocuments"),
        ),
        "field_choices": ("choices", "options", "endings", "answerchoices"),
        "field_thinking": tuple(THINKING_NAMES),
    }
)
"""Our name of a column -> the plain names that are usual for it, best first."""
PAIRS: Final = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("problem", "solution"),
)
QUESTIONS: Final = (
    *("question", "instruction", "prompt", "query", "problem", "input", "inputspretokenized"),
    *("inputs", "user", "human", "questions"),
)
ANSWERS: Final = (
    *("answer", "output", "response", "completion", "solution", "reply", "targetspretokenized"),
    *("target", "targets", "multiplechoiceanswer", "answers", "assistant", "gpt"),
    *("correctanswer", "longanswer", "solutions", "groundtruth"),
)
ASKED_WITH_CHOICES: Final = (*QUESTIONS, "ctx", "questionstem", "stem", "goal", "premise")
CHOSEN: Final = (
    *("answer", "answerkey", "answeridx", "answerindex", "correctanswer", "correct", "gold"),
    *("correctoption", "goldindex", "label", "target"),
)
"""Columns that say which of several choices is right, best first."""
CAPTIONS: Final = ("caption", "text")
LISTS: Final = ("messages", "conversations", "conversation")
# Taken where they hold what can be a conversation: other datasets keep other things by these names.
PERHAPS_LISTS: Final = ("interactions", "dialogue", "dialog", "turns", "chat", "data", "texts")
TRANSCRIPTS: Final = ("text", "chat")
SWITCHES: Final = frozenset(("on", "off", "yes", "no", "true", "false", "none", "low", "high"))
"""What a column named like thinking holds where it says whether there is any."""
_BOOKKEEPING: Final = frozenset(
    (
        *("id", "ids", "uuid", "guid", "idx", "index", "hash", "key", "source", "sources", "src"),
        *("url", "urls", "link", "score", "scores", "lang", "language", "category", "categories"),
        *("topic", "topics", "subject", "title", "split", "subset", "dataset", "model", "license"),
        *("licence", "generator", "timestamp", "date", "createdat", "updatedat", "author", "level"),
        *("difficulty", "rank", "rating", "quality", "tokens", "length", "task", "taskname"),
        *("domain", "tags", "keywords", "treestate", "annotator", "version", "origin", "file"),
        *("filename", "role", "metadata", "meta", "humanormachine"),
    )
)
_RATING: Final = re.compile(
    r"(?:ratings?|scores?|reward|quality|stars|votes|helpful(?:ness)?|correct(?:ness)?|coherence"
    r"|harmless(?:ness)?|truthful(?:ness)?|honesty|complexity|verbosity)\Z"
)
_BOOKKEEPING_END: Final = re.compile(
    r"(?:[_\W](?:ids?|idx|index|type|url|hash|score|count|source|lang|category|tokens)|[a-z]Id)\Z"
)


def is_bookkeeping(name: str, value: object) -> bool:
    """Whether a column is an id, a source, a score or the like, which nobody wants learned."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return plain_name(name) not in ("label", "weight")
    last = name.rpartition(".")[2]
    return plain_name(last) in _BOOKKEEPING or _BOOKKEEPING_END.search(last) is not None


def is_rating(name: str, value: object) -> bool:
    """Whether a column of numbers says how good an answer is."""
    return isinstance(value, int | float) and _RATING.search(plain_name(name)) is not None


@lru_cache(1024)
def index_of(columns: tuple[str, ...]) -> Mapping[str, str]:
    """Plain name -> the column, the first of several."""
    return {plain_name(column): column for column in reversed(columns)}

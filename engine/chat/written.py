"""Values that a column holds as text: JSON, and lists and objects as Python prints them."""

import ast
import io
import json
import tokenize
import warnings
from itertools import pairwise

from engine.chat.conversation import RowProblem, describe

_LITERAL_CHARACTERS = 100_000  # of Python, whose reader takes 100 bytes and more for each


def parse_if_text(value: object, what: str) -> object:
    """A value that a column of strings holds as JSON; empty text stands for nothing."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    return parse_json(value, what)


def parse_json(text: str, what: str) -> object:
    """A column or key that holds JSON as a string. Raises RowProblem where it is not JSON."""
    try:
        return load_json(text)
    except (ValueError, RecursionError) as error:
        raise RowProblem(
            f"The text in {what} is not JSON.",
            f"{error}: {describe(text)}.",
            "Write valid JSON, with double quotes around keys and strings.",
        ) from error


def load_json(text: str) -> object:
    """What a text holds as JSON, or a list or an object as Python prints it. Raises ValueError or
    RecursionError where it is neither."""
    try:
        return json.loads(text)
    except ValueError:
        value = _read_python(text.strip())
        if value is None:
            raise
        return value


def _read_python(text: str) -> object:
    """A printed list or dict with values of JSON; None for other texts, and for lists printed
    without commas, as NumPy does, of which Python would join the texts."""
    if len(text) > _LITERAL_CHARACTERS or not text.startswith(("{", "[")):
        return None
    try:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        kinds = [token.type for token in tokens if token.type != tokenize.NL]
        if (tokenize.STRING, tokenize.STRING) in pairwise(kinds):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return json.loads(json.dumps(ast.literal_eval(text)))
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        return None

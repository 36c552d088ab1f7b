"""The tools that a row defines, in every spelling, as function definitions with a JSON schema."""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from engine.chat.conversation import Note, RowProblem, describe
from engine.chat.message import check_function_name
from engine.chat.written import parse_if_text

_TOOL_FIX = (
    'Write each as {"type": "function", "function": {"name": "...", "description": "...", '
    '"parameters": {...}}}.'
)
_SYSTEM: Final = re.compile(r"\s*SYSTEM:\s*")
_FUNCTIONS: Final = re.compile(r"Use them if required\s*-\s*", re.IGNORECASE)
_JSON_TYPES: Final = frozenset(
    ("string", "integer", "number", "boolean", "object", "array", "null")
)
_PYTHON_TYPES: Final = MappingProxyType(
    {
        "str": "string",
        "int": "integer",
        "float": "number",
        "bool": "boolean",
        "dict": "object",
        "list": "array",
        "tuple": "array",
        "set": "array",
    }
)


def read_tools(value: object, notes: list[Note] | None = None) -> tuple[dict[str, object], ...]:
    """A list of tools, or a JSON string of one; bare function definitions are wrapped.

    `notes` gets one where parameters had to be written anew as a JSON schema; whether they are one
    is checked when they are rendered. Raises RowProblem where mistral-common would refuse the
    types.
    """
    value = parse_if_text(value, "the tools")
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise _problem("The tools are not a list.", f"They are {describe(value)}.")
    read = [_read_tool(parse_if_text(tool, "a tool")) for tool in value]
    if notes is not None and any(rewritten for _, rewritten in read):
        text = "The parameters of the tools are written as JSON schema."
        notes.append(Note("tools_rewritten", text))
    return tuple(tool for tool, _ in read)


def _read_tool(tool: object) -> tuple[dict[str, object], bool]:
    if not isinstance(tool, Mapping):
        raise _problem("A tool is not an object.", f"It is {describe(tool)}.")
    if tool.get("type") not in (None, "function"):
        raise _problem("A tool is not a function.", f"Its type is {describe(tool['type'])}.")
    function = tool.get("function") or tool
    if not isinstance(function, Mapping):
        raise _problem("A tool defines no function.", f"It holds {describe(function)}.")
    name = check_function_name(function.get("name"))
    description = function.get("description")
    parameters = parse_if_text(function.get("parameters"), "a tool's parameters")
    if description is not None and not isinstance(description, str):
        raise _problem("A tool's description is not text.", f"It is {describe(description)}.")
    if parameters is not None and not isinstance(parameters, Mapping):
        why = f"They are {describe(parameters)}."
        raise _problem("A tool's parameters are no JSON schema.", why)
    schema = _as_schema(parameters or {})
    return {
        "type": "function",
        "function": {"name": name, "description": description or "", "parameters": schema},
    }, schema != (parameters or {})


def _as_schema(parameters: Mapping[str, object]) -> dict[str, object]:
    """Parameters as JSON schema, where they are a list of arguments by name (xLAM), or name their
    types as Python does (BFCL)."""
    is_argument = [
        isinstance(each, Mapping) and not {"type", "description"}.isdisjoint(each)
        for each in parameters.values()
    ]
    if not is_argument or not all(is_argument) or "properties" in parameters:
        return _rename_types(parameters)
    arguments = {name: dict(each) for name, each in parameters.items() if isinstance(each, Mapping)}
    required = []
    for name, each in arguments.items():
        kind, optional, _ = str(each.get("type", "")).partition(", optional")
        if not optional and "default" not in each:
            required.append(name)
        if kind.partition("[")[0].lower() in (*_PYTHON_TYPES, *_JSON_TYPES):
            each["type"] = kind
        elif each.pop("type", None):
            each["description"] = f"{each.get('description', '')} ({kind})".strip()
    properties = {name: _rename_types(each) for name, each in arguments.items()}
    return {"type": "object", "properties": properties, "required": required}


def _rename_types(schema: Mapping[str, object]) -> dict[str, object]:
    """A schema with the names of Python's types as JSON's; others stay."""
    named = dict(schema)
    kind = named.get("type")
    if isinstance(kind, str) and kind not in _JSON_TYPES:
        named["type"] = _PYTHON_TYPES.get(kind.partition("[")[0].lower(), kind)
    if isinstance(properties := named.get("properties"), Mapping):
        named["properties"] = {
            name: _rename_types(each) if isinstance(each, Mapping) else each
            for name, each in properties.items()
        }
    if isinstance(items := named.get("items"), Mapping):
        named["items"] = _rename_types(items)
    return named


def _problem(what: str, why: str) -> RowProblem:
    return RowProblem(what, why, _TOOL_FIX)


def read_system(text: str) -> tuple[str, list[object]]:
    """A system prompt without Glaive's mark, and the functions that it lists as JSON."""
    mark = _SYSTEM.match(text)
    if mark is None:
        return text, []
    text = text[mark.end() :].strip()
    found = _FUNCTIONS.search(text)
    if found is None:
        return text, []
    listed, tools, decoder = text[found.end() :].strip(), [], json.JSONDecoder()
    try:
        while listed:
            tool, end = decoder.raw_decode(listed)
            tools.append(tool)
            listed = listed[end:].lstrip(", \n\t")
    except (ValueError, RecursionError):
        return text, []
    return (text[: found.start()].strip() if tools else text), tools

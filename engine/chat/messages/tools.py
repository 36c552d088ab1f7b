"""Function definitions of a row, in the one shape and key order that is rendered.

The JSON text of the tools becomes tokens, so the keys kept here, and their order, are
mistral-common's: type, function, name, description, parameters.
"""

from collections.abc import Mapping

from engine.chat.messages.content import check_function_name, parse_if_text
from engine.chat.messages.conversation import RowProblem, describe

_TOOL_FIX = (
    'Write each as {"type": "function", "function": {"name": "...", "description": "...", '
    '"parameters": {...}}}.'
)


def read_tools(value: object) -> tuple[dict[str, object], ...]:
    """A list of tools, or a JSON string of one; bare function definitions are wrapped.

    Raises RowProblem where mistral-common would refuse the types. Whether `parameters` is a JSON
    schema is checked when they are rendered.
    """
    value = parse_if_text(value, "the tools", None)
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise _problem("The tools are not a list.", f"They are {describe(value)}.")
    return tuple(_read_tool(parse_if_text(tool, "a tool", None)) for tool in value)


def _read_tool(tool: object) -> dict[str, object]:
    if not isinstance(tool, Mapping):
        raise _problem("A tool is not an object.", f"It is {describe(tool)}.")
    if tool.get("type") not in (None, "function"):
        raise _problem("A tool is not a function.", f"Its type is {describe(tool['type'])}.")
    function = tool.get("function") or tool
    if not isinstance(function, Mapping):
        raise _problem("A tool defines no function.", f"It holds {describe(function)}.")
    name = check_function_name(function.get("name"), None)
    description = function.get("description")
    parameters = parse_if_text(function.get("parameters"), "a tool's parameters", None)
    if description is not None and not isinstance(description, str):
        raise _problem("A tool's description is not text.", f"It is {describe(description)}.")
    if parameters is not None and not isinstance(parameters, Mapping):
        why = f"They are {describe(parameters)}."
        raise _problem("A tool's parameters are no JSON schema.", why)
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description or "",
            "parameters": parameters or {},
        },
    }


def _problem(what: str, why: str) -> RowProblem:
    return RowProblem(what, why, _TOOL_FIX)

"""Tools and the calls of them, in the forms that data sets write them, brought into OpenAI's.

    tools        a list, or JSON text of one: {"type": "function", "function": {...}}, or {"name": ..., "parameters": ...}
                 alone (sharegpt's `tools`, OpenAI's older `functions`)
    tool_calls   [{"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}" or {...}}}], the function
                 alone, or OpenAI's older {"function_call": {"name": ..., "arguments": ...}}
    sharegpt     {"from": "function_call", "value": "{\\"name\\": ..., \\"arguments\\": {...}}"}, a list for several

What looks like one of these and is none raises RowError: a call whose arguments cannot be read would be learned wrong.
"""

import json
from collections.abc import Mapping
from typing import Any

from qgraft.data.messages import Call, Tool


class RowError(Exception):
    """Why one row is dropped; never leaves the reading of rows."""


def tools_of(value: object) -> tuple[Tool, ...]:
    """The tools that a column, or a message's key, holds."""
    listed = _parsed(value, "tools")
    if listed is None:
        return ()
    if isinstance(listed, Mapping):
        listed = [listed]
    if not isinstance(listed, (list, tuple)):
        raise RowError(f"tools is a {type(listed).__name__}, not a list")
    return tuple(_tool(_parsed(each, "tools")) for each in listed)


def same_tools(*named: tuple[Tool, ...]) -> tuple[Tool, ...]:
    """The tools of a row, wherever it names them. Raises RowError where it names others in another place."""
    found = [tools for tools in named if tools]
    if any(tools != found[0] for tools in found):
        raise RowError("names other tools in one place than in another")
    return found[0] if found else ()


def _tool(value: object) -> Tool:
    if not isinstance(value, Mapping):
        raise RowError(f"a tool is a {type(value).__name__}, not an object")
    tool = dict(value)
    function = tool.get("function") or tool
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("a tool has no name")
    return tool if tool.get("function") else {"type": "function", "function": tool}


def calls_of(value: object) -> tuple[Call, ...]:
    """The calls of a message's `tool_calls`, or the one of its `function_call`."""
    listed = _parsed(value, "tool_calls")
    if listed is None:
        return ()
    each = [listed] if isinstance(listed, Mapping) else listed
    if not isinstance(each, (list, tuple)):
        raise RowError(f"tool_calls is a {type(listed).__name__}, not a list")
    return tuple(_call(_parsed(one, "tool_calls")) for one in each)


def written_calls(text: str) -> tuple[Call, ...] | None:
    """The calls that sharegpt's `function_call` turn holds as text; None where the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(isinstance(each, dict) and "name" in each for each in listed):
        return None
    return tuple(_call(each) for each in listed)


def _call(value: object) -> Call:
    if not isinstance(value, Mapping):
        raise RowError(f"a tool call is a {type(value).__name__}, not an object")
    function = value.get("function") if isinstance(value.get("function"), Mapping) else value
    assert isinstance(function, Mapping)
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if not isinstance(name, str) or not name:
        raise RowError("a tool call has no name")
    read = _parsed(arguments, "arguments of a tool call") or {}
    if not isinstance(read, Mapping):
        raise RowError(f"arguments of a tool call are a {type(read).__name__}, not an object")
    identity = value.get("id")
    written = arguments if isinstance(arguments, str) and read else _json(read)
    return Call(name, written, None if identity in (None, "") else str(identity))


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"arguments of a tool call cannot be written as JSON: {type(error).__name__}") from error


def _parsed(value: object, called: str) -> Any:
    """What JSON text holds, None for blank text and for what a table writes where nothing is; all else as it is."""
    if value is None or value != value:
        return None
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{called}: not JSON") from error

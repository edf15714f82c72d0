"""What a chat is about, read from JSON: its turns, with their calls of functions, and the functions that there are.

Texts, and parts of texts, are all that a turn holds: images, sounds and files are refused, and so is whatever else would have
no effect. `developer` is OpenAI's newer word for `system`.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qgraft.data.calls import RowError, calls_of, tools_of
from qgraft.data.messages import Call, Message, Tool
from qgraft.serving.fields import MISSING, ApiError, flag_of, object_of, text_of, wrong

_MESSAGE = {"role", "content", "reasoning_content", "name", "tool_calls", "tool_call_id"}
_NAME = re.compile(r"[\w.-]{1,128}")  # of a function: what templates write letter for letter


def read_turns(given: object) -> tuple[Message, ...]:
    """The turns of `messages`. Raises ApiError."""
    if not isinstance(given, list) or not given:
        raise wrong("messages", MISSING if given is None else given, "a list of messages")
    return tuple(_message(each, f"messages[{index}]") for index, each in enumerate(given))


def _message(given: object, where: str) -> Message:
    message = object_of(given, where)
    known = _MESSAGE | ({"parsed"} if message.get("role") == "assistant" else set())  # of its text, by OpenAI's client
    if unknown := [key for key in message if key not in known and message[key] not in (None, "", [])]:
        name = f"{where}.{unknown[0][:50]}"
        raise wrong(name, message[unknown[0]], "nothing: it would have no effect")
    role = message.get("role", MISSING)
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise wrong(f"{where}.role", role, "system, developer, user, assistant or tool")
    content = _content(message.get("content"), f"{where}.content")
    calls = _calls(message.get("tool_calls"), f"{where}.tool_calls")
    if not content and not calls and role != "assistant" and message.get("content") is None:
        raise wrong(f"{where}.content", message.get("content", MISSING), "a text")
    texts = {key: message.get(key) for key in ("reasoning_content", "name", "tool_call_id")}
    if odd := [key for key, value in texts.items() if not isinstance(value, str | None)]:
        raise wrong(f"{where}.{odd[0]}", texts[odd[0]], "a text")
    return Message(
        "system" if role == "developer" else role, content, reasoning=texts["reasoning_content"] or "", calls=calls,
        call_id=texts["tool_call_id"], name=texts["name"],
    )  # fmt: skip


def _calls(given: object, where: str) -> tuple[Call, ...]:
    if not isinstance(given, list | None):
        raise wrong(where, given, "a list of calls")
    try:
        calls = calls_of(given)
    except RowError as error:
        raise ApiError(400, f"{where}: {error}", param=where, code="invalid_value") from error
    for index, call in enumerate(calls):
        _check_name(call.name, f"{where}[{index}].function.name")
    return calls


def _content(given: object, where: str) -> str:
    """A message's text: text, its parts, or nothing."""
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, list):
        raise wrong(where, given, "a text, or a list of parts")
    for part in given:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(where, part, 'parts of {"type": "text", "text": ...} only')
    return "".join(part["text"] for part in given)


def read_tools(given: object) -> tuple[Tool, ...]:
    """The functions of `tools`. Raises ApiError."""
    if not isinstance(given, list | None):
        raise wrong("tools", given, 'a list of {"type": "function", "function": {"name": ..., "parameters": {...}}}')
    for index, tool in enumerate(given or ()):
        _check_tool(object_of(tool, f"tools[{index}]"), f"tools[{index}]")
    tools = tools_of(given)
    names = Counter(tool["function"]["name"] for tool in tools)
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise ApiError(400, f"tools: {', '.join(twice)}: two functions have this name", param="tools")
    return tools


def _check_tool(tool: Mapping[str, Any], where: str) -> None:
    """Raise ApiError for what is no function; one may stand alone, without the object around it."""
    if tool.get("type", "function") != "function":
        raise wrong(f"{where}.type", tool["type"], "function: a server's own tools are not here")
    if tool.get("function") is not None or not tool.keys() & {"name", "description", "parameters"}:
        tool, where = object_of(tool.get("function", MISSING), f"{where}.function"), f"{where}.function"
    _check_name(text_of(tool, "name", where=f"{where}."), f"{where}.name")
    if tool.get("description") is not None:
        text_of(tool, "description", where=f"{where}.", empty=True)
    if tool.get("parameters") is not None:
        object_of(tool["parameters"], f"{where}.parameters")
    flag_of(tool, "strict", where=f"{where}.")


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise wrong(where, name, "1 to 128 letters, digits, '_', '-' or '.'",
                    hint="chat templates write other names otherwise, and calls of them are not read back")  # fmt: skip

"""Anthropic's messages API, which coding agents speak: a body of /v1/messages as a chat, and an answer as its content blocks.

    system, messages of blocks (text, thinking, tool_use, tool_result)  ->  the messages of a chat (protocol.py)
    an answer   ->   thinking, text, tool_use     stop_reason: end_turn, stop_sequence, max_tokens, tool_use

What a chat cannot hold is refused: images, documents, redacted thinking. Turns of one role that follow one another are one
turn, as there. A tool's result that is an error says so in front of its text, where a template has no other place for it.
`thinking` says what the chat template is told, and how many tokens an answer may think. Marks for a cache have no effect.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qgraft.data.messages import Call
from qgraft.serving.answers import Choice, is_whole, new_id
from qgraft.serving.fields import (
    MISSING,
    ApiError,
    check_known,
    check_supported,
    flag_of,
    named,
    object_of,
    text_of,
    wrong,
)
from qgraft.serving.protocol import ANSWERED, Ask, read_chat
from qgraft.serving.requests import Finish

_SAME = ("model", "temperature", "top_p", "top_k", "stream", "lora", "max_tokens")
_OWN = {"messages", "system", "stop_sequences", "tools", "tool_choice", "thinking", "output_config"}
_SAY_NOTHING = {"metadata", "service_tier", "cache_control", "diagnostics", "user_profile_id", "workspace_id"}
_HARMLESS = {"speed": "standard", "inference_geo": "global"}
_TOOL = {"type", "name", "description", "input_schema", "strict", "cache_control", "eager_input_streaming"}
_CHOICES = {"auto": "auto", "none": "none", "any": "required", "tool": "a function"}
_NAMES = {"thinking_token_budget": "thinking.budget_tokens"}
_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def read_messages(body: object, *, counting: bool = False) -> Ask:
    """The value of a body of /v1/messages, or of its count_tokens. Raises ApiError."""
    given = object_of(body)
    check_supported(given, _OWN | _SAY_NOTHING | {*_SAME}, _HARMLESS)
    if not counting and given.get("max_tokens") is None:
        raise wrong("max_tokens", given.get("max_tokens", MISSING), str(ANSWERED))
    chat: dict[str, Any] = {name: given[name] for name in _SAME if given.get(name) is not None}
    chat["messages"] = _system(given.get("system")) + _messages(given.get("messages"))
    chat["stop"] = given.get("stop_sequences")
    chat["tools"] = _tools(given.get("tools"))
    choice = _choice(given.get("tool_choice"))
    chat["tool_choice"], chat["parallel_tool_calls"] = _CHOICES[choice["type"]], not choice["disable_parallel_tool_use"]
    if choice["type"] == "tool":
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    thinking, chat["thinking_token_budget"] = _thinking(given.get("thinking"))
    if thinking is not None:
        chat["chat_template_kwargs"] = {"enable_thinking": thinking}
    chat |= _output(given.get("output_config"))
    with named({"stop": "stop_sequences", "response_format.json_schema": "output_config.format", **_NAMES}):
        return replace(read_chat(chat), include_usage=True, schema_param="output_config.format.schema")


def _output(given: object) -> dict[str, Any]:
    """How much is thought, and the schema of an answer, as a chat says them."""
    told, where = object_of({} if given is None else given, "output_config"), "output_config."
    check_known(told, {"effort", "format"}, where)
    found = {} if told.get("effort") is None else {"reasoning_effort": text_of(told, "effort", where=where)}
    if told.get("format") is None:
        return found
    form = object_of(told["format"], f"{where}format")
    check_known(form, {"type", "schema"}, f"{where}format.")
    if form.get("type") != "json_schema":
        raise wrong(f"{where}format.type", form.get("type", MISSING), "json_schema")
    described = {"name": "answer", "schema": form.get("schema", MISSING)}
    return {**found, "response_format": {"type": "json_schema", "json_schema": described}}


def _system(given: object) -> list[dict[str, Any]]:
    if given is None:
        return []
    text = given if isinstance(given, str) else "\n".join(_text(block, "system") for block in _blocks(given, "system"))
    return [{"role": "system", "content": text}]


def _messages(given: object) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise wrong("messages", MISSING if given is None else given, "a list of messages")
    messages: list[dict[str, Any]] = []
    for index, each in enumerate(given):
        for message in _message(each, f"messages.{index}"):
            if messages and message["role"] == messages[-1]["role"] != "tool":
                message = _joined(messages.pop(), message)
            messages.append(message)
    if messages[-1]["role"] == "assistant":
        raise ApiError(400, "messages: the last one is the assistant's; an answer cannot be begun for it here",
                       param="messages")  # fmt: skip
    return messages


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two turns of one role that follow one another."""
    joined = {**one, **other}
    for key, between in (("content", "\n"), ("reasoning_content", "\n")):
        if key in one and key in other:
            joined[key] = between.join(each[key] for each in (one, other) if each[key])
    if "tool_calls" in one and "tool_calls" in other:
        joined["tool_calls"] = [*one["tool_calls"], *other["tool_calls"]]
    return joined


def _message(given: object, where: str) -> list[dict[str, Any]]:
    """The chat's messages of one of theirs: results of tools stand in it, and are messages of their own in a chat."""
    if not isinstance(given, dict) or given.get("role") not in ("user", "assistant"):
        role = object_of(given, where).get("role", MISSING)
        raise wrong(f"{where}.role", role, "user or assistant; a system text is the request's own field")
    content, role = given.get("content"), given["role"]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    results, texts, calls, thoughts = [], [], [], []
    for block in _blocks(content, f"{where}.content"):
        kind = block.get("type")
        if kind == "tool_result" and role == "user":
            results.append(_result(block, where))
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking" and role == "assistant" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        else:
            texts.append(_text(block, f"{where}.content"))
    own: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if thoughts:
        own["reasoning_content"] = "\n".join(thoughts)
    if calls:
        own["tool_calls"] = calls
    return [*results, own] if texts or calls or thoughts or not results else results


def _result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content") or ""
    if not isinstance(content, str):
        content = "\n".join(_text(part, f"{where}.content") for part in _blocks(content, f"{where}.content"))
    if flag_of(block, "is_error", where=f"{where}.content."):
        content = f"Error: {content}" if content else "Error"
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


def _blocks(given: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(block, dict) for block in given):
        raise wrong(where, given, "a text, or a list of blocks")
    return given


def _text(block: Mapping[str, Any], where: str) -> str:
    if block.get("type") != "text" or not isinstance(block.get("text"), str):
        raise ApiError(400, f"{where}: blocks of {str(block.get('type'))[:50]!r} are not supported here", param=where)
    return str(block["text"])


def _tools(given: object) -> list[dict[str, Any]] | None:
    if given is None:
        return None
    tools = []
    for index, tool in enumerate(_blocks(given, "tools")):
        where = f"tools[{index}]."
        if tool.get("type") not in (None, "custom"):
            raise wrong(f"{where}type", tool["type"], "custom: a server's own tools are not here")
        check_known(tool, _TOOL, where)
        description = "" if tool.get("description") is None else text_of(tool, "description", where=where, empty=True)
        function: dict[str, Any] = {"name": text_of(tool, "name", where=where), "description": description}
        function["parameters"] = object_of(tool.get("input_schema", MISSING), f"{where}input_schema")
        strict = {"strict": True} if flag_of(tool, "strict", where=where) else {}
        tools.append({"type": "function", "function": {**function, **strict}})
    return tools


def _choice(given: object) -> dict[str, Any]:
    told = {} if given is None else object_of(given, "tool_choice")
    kind, where = told.get("type", "auto"), "tool_choice."
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise wrong(f"{where}type", kind, f"{', '.join(_CHOICES)} (with a name)")
    return {**told, "type": kind, "disable_parallel_tool_use": flag_of(told, "disable_parallel_tool_use", where=where)}


def _thinking(given: object) -> tuple[bool | None, object]:
    """(what the template is told, the budget as it is given)."""
    if given is None:
        return None, None
    told = given if isinstance(given, dict) else {}
    check_known(told, {"type", "budget_tokens", "display"}, "thinking.")
    if told.get("display") not in (None, "summarized"):
        raise wrong("thinking.display", told["display"], "summarized: what is thought is told")
    kind = told.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise wrong("thinking", given, "an object with a type, enabled, disabled or adaptive")
    return None if kind == "adaptive" else kind == "enabled", told.get("budget_tokens")


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as their clients read it."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def stop_reason(choice: Choice) -> str:
    """Why an answer has ended, in their words."""
    finish = choice.finish
    assert finish is not None
    if choice.reason == "tool_calls":
        return "tool_use"
    if finish.reason == "length":
        return "max_tokens"  # of a stop string that cuts a form tells stop_sequence
    return "end_turn" if finish.stop is None else "stop_sequence"


def usage(finish: Finish) -> dict[str, int]:
    """Their count of tokens: those that were known already stand apart."""
    return {
        "input_tokens": finish.prompt_tokens - finish.cached, "cache_read_input_tokens": finish.cached,
        "cache_creation_input_tokens": 0, "output_tokens": finish.tokens,
    }  # fmt: skip


def message_head(identity: str, model: str, prompt_tokens: int) -> dict[str, Any]:
    """A message without its content."""
    return {
        "id": identity, "type": "message", "role": "assistant", "model": model, "content": [], "stop_reason": None,
        "stop_sequence": None, "usage": {"input_tokens": prompt_tokens, "output_tokens": 0},
    }  # fmt: skip


def message_body(identity: str, model: str, choice: Choice) -> dict[str, Any]:
    """A whole message."""
    assert choice.finish is not None
    content: list[dict[str, Any]] = []
    if choice.reasoning:
        content.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
    if choice.text or (choice.finish.tokens and not content and not choice.calls):
        content.append({"type": "text", "text": choice.text})
    content += [tool_use(call, json.loads(call.arguments) if is_whole(call) else {}) for call in choice.calls]
    return {
        **message_head(identity, model, 0), "content": content, "stop_reason": stop_reason(choice),
        "stop_sequence": choice.finish.stop, "usage": usage(choice.finish),
    }  # fmt: skip


def tool_use(call: Call, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The block of a call, with as many of its arguments as are told in it."""
    return {"type": "tool_use", "id": call.id or new_id("toolu"), "name": call.name, "input": arguments}

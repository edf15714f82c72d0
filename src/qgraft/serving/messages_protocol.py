"""Anthropic's messages API, which coding agents speak: a body of /v1/messages as a chat, and an answer as its content blocks.

    system, messages of blocks (text, thinking, tool_use, tool_result)  ->  the messages of a chat (protocol.py)
    an answer   ->   thinking, text, tool_use     stop_reason: end_turn, stop_sequence, max_tokens, tool_use

What a chat cannot hold is refused: images, documents, redacted thinking. `thinking` says what the
chat template is told; its budget is refused, as nothing here would keep it. Marks for a cache have no effect on an answer.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qgraft.serving.answers import Choice, new_id
from qgraft.serving.protocol import ApiError, Ask, read_chat
from qgraft.serving.requests import Finish

_SAME = ("model", "temperature", "top_p", "top_k", "stream", "lora", "max_tokens")
_OWN = {"messages", "system", "stop_sequences", "tools", "tool_choice", "thinking", "metadata", "service_tier"}
_CHOICES = {"auto": "auto", "none": "none", "any": "required", "tool": "a function"}
_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def read_messages(body: object, *, counting: bool = False) -> Ask:
    """The value of a body of /v1/messages, or of its count_tokens. Raises ApiError."""
    given = body if isinstance(body, dict) else {}
    if unknown := [name for name in given if name not in _OWN and name not in _SAME and given[name] is not None]:
        raise ApiError(400, f"{unknown[0]}: not supported here", param=unknown[0])
    if not counting and given.get("max_tokens") is None:
        raise ApiError(400, "max_tokens: expected a number", param="max_tokens")
    chat: dict[str, Any] = {name: given[name] for name in _SAME if given.get(name) is not None}
    chat["messages"] = _system(given.get("system")) + _messages(given.get("messages"))
    chat["stop"] = given.get("stop_sequences")
    chat["tools"] = _tools(given.get("tools"))
    choice = _choice(given.get("tool_choice"))
    chat["tool_choice"], chat["parallel_tool_calls"] = _CHOICES[choice["type"]], not choice["disable_parallel_tool_use"]
    if choice["type"] == "tool":
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    if (thinking := _thinking(given.get("thinking"))) is not None:
        chat["chat_template_kwargs"] = {"enable_thinking": thinking}
    return replace(read_chat(chat), include_usage=True)


def _system(given: object) -> list[dict[str, Any]]:
    if given is None:
        return []
    text = given if isinstance(given, str) else "\n".join(_text(block, "system") for block in _blocks(given, "system"))
    return [{"role": "system", "content": text}]


def _messages(given: object) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages: expected a list of messages", param="messages")
    messages = [message for index, each in enumerate(given) for message in _message(each, f"messages.{index}")]
    if messages[-1]["role"] == "assistant":
        raise ApiError(400, "messages: the last one is the assistant's; an answer cannot be begun for it here",
                       param="messages")  # fmt: skip
    return messages


def _message(given: object, where: str) -> list[dict[str, Any]]:
    """The chat's messages of one of theirs: results of tools stand in it, and are messages of their own in a chat."""
    if not isinstance(given, dict) or given.get("role") not in ("user", "assistant"):
        raise ApiError(400, f"{where}.role: expected user or assistant", param=where)
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
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


def _blocks(given: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(block, dict) for block in given):
        raise ApiError(400, f"{where}: expected a text, or a list of blocks", param=where)
    return given


def _text(block: Mapping[str, Any], where: str) -> str:
    if block.get("type") != "text" or not isinstance(block.get("text"), str):
        raise ApiError(400, f"{where}: blocks of {str(block.get('type'))[:50]!r} are not supported here", param=where)
    return str(block["text"])


def _tools(given: object) -> list[dict[str, Any]] | None:
    if given is None:
        return None
    tools = []
    for tool in _blocks(given, "tools"):
        if tool.get("type") not in (None, "custom") or not isinstance(tool.get("input_schema"), dict):
            raise ApiError(400, "tools: expected name, description and input_schema; tools of a server are not here",
                           param="tools")  # fmt: skip
        function = {"name": tool.get("name"), "description": tool.get("description") or ""}
        strict = {"strict": True} if tool.get("strict") is True else {}
        tools.append({"type": "function", "function": {**function, "parameters": tool["input_schema"], **strict}})
    return tools


def _choice(given: object) -> dict[str, Any]:
    choice = {"type": "auto", "disable_parallel_tool_use": False, **(given if isinstance(given, dict) else {})}
    one = choice["disable_parallel_tool_use"]
    if not isinstance(given, dict | None) or str(choice["type"]) not in _CHOICES or not isinstance(one, bool):
        raise ApiError(400, f"tool_choice: expected a type, {', '.join(_CHOICES)}; tool with a name",
                       param="tool_choice")  # fmt: skip
    return choice


def _thinking(given: object) -> bool | None:
    if given is None:
        return None
    told = given if isinstance(given, dict) else {}
    kind = told.get("type")
    if kind not in ("enabled", "disabled", "adaptive") or told.get("budget_tokens") is not None:
        raise ApiError(400, "thinking: expected a type, enabled, disabled or adaptive, and no budget_tokens: it is not kept",
                       param="thinking")  # fmt: skip
    return None if kind == "adaptive" else kind == "enabled"


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
        return "max_tokens"
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
    if choice.text or not (choice.calls or choice.reasoning):
        content.append({"type": "text", "text": choice.text})
    content += [tool_use(call.name, json.loads(call.arguments)) for call in choice.calls]
    return {
        **message_head(identity, model, 0), "content": content, "stop_reason": stop_reason(choice),
        "stop_sequence": choice.finish.stop, "usage": usage(choice.finish),
    }  # fmt: skip


def tool_use(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The block of a call."""
    return {"type": "tool_use", "id": new_id("toolu"), "name": name, "input": arguments}

"""OpenAI's responses API: a body of /v1/responses as a chat, and an answer as its output items.

    instructions, input (a text, or items: messages, reasoning, function_call, function_call_output)  ->  a chat (protocol.py)
    an answer   ->   reasoning, message, function_call

Nothing is stored: previous_response_id and conversation are refused, as are tools of a server.
"""

import time
from dataclasses import dataclass, field, replace
from typing import Any

from qgraft.data.messages import Call
from qgraft.serving.answers import Choice, is_whole, new_id
from qgraft.serving.fields import MISSING, check_known, check_supported, flag_of, named, object_of, wrong
from qgraft.serving.protocol import Ask, read_chat
from qgraft.serving.requests import Finish

_SAME = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "lora")
_OWN = {"input", "instructions", "max_output_tokens", "tools", "tool_choice", "text", "reasoning"}
_SAY_NOTHING = {"metadata", "user", "store", "include", "service_tier", "safety_identifier", "prompt_cache_key",
                "prompt_cache_retention", "prompt_cache_options", "stream_options"}  # fmt: skip
_HARMLESS = {"background": False, "truncation": "disabled", "top_logprobs": 0}
_NAMES = {  # of a chat -> here
    "response_format.json_schema": "text.format", "response_format": "text.format", "messages": "input",
    "max_completion_tokens": "max_output_tokens",
}  # fmt: skip
_TEXTS = ("input_text", "output_text", "text")


def read_response(body: object) -> Ask:
    """The value of a body. Raises ApiError."""
    given = object_of(body)
    check_supported(given, _OWN | _SAY_NOTHING | {*_SAME}, _HARMLESS)
    if "message.output_text.logprobs" in (given.get("include") or ()):
        raise wrong("include", given["include"], "no message.output_text.logprobs: /v1/chat/completions tells them")
    flag_of(given, "store")
    form = object_of({} if given.get("text") is None else given["text"], "text")
    check_supported(form, {"format"}, {"verbosity": "medium"}, "text.")
    chat: dict[str, Any] = {name: given[name] for name in _SAME if given.get(name) is not None}
    chat["max_completion_tokens"], chat["response_format"] = given.get("max_output_tokens"), _format(form.get("format"))
    chat["tool_choice"] = _choice(given.get("tool_choice"))
    instructions = given.get("instructions")
    first = [] if instructions is None else [{"role": "system", "content": instructions}]
    chat["messages"] = first + _messages(given.get("input"))
    chat["tools"] = _tools(given.get("tools"))
    reasoning = object_of({} if given.get("reasoning") is None else given["reasoning"], "reasoning")
    check_known(reasoning, {"effort", "summary", "generate_summary"}, "reasoning.")  # a summary is never written
    chat["reasoning_effort"] = reasoning.get("effort")
    with named(_NAMES):
        return replace(read_chat(chat), param="input", schema_param="text.format.schema")


def _format(given: object) -> object:
    """A format as a chat says it: what belongs to a schema stands by itself there."""
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {key: given[key] for key in given if key != "type"}}


def _choice(given: object) -> object:
    """A tool_choice as a chat says it, likewise."""
    if not isinstance(given, dict) or given.keys() != {"type", "name"}:
        return given
    return {"type": given["type"], "function": {"name": given["name"]}}


def _messages(given: object) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise wrong("input", MISSING if given is None else given, "a text, or a list of items")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(given):
        _add(messages, item, f"input[{index}]")
    return messages


def _add(messages: list[dict[str, Any]], item: object, where: str) -> None:
    """An item as a message, or as a part of the answer that the items before it began."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if not isinstance(item, dict) or kind not in ("message", "reasoning", "function_call", "function_call_output"):
        raise wrong(f"{where}.type", kind, "message, reasoning, function_call or function_call_output")
    if kind == "message":
        content, role = _content(item.get("content"), where), item.get("role")
        last = messages[-1] if messages else {}
        if role == "assistant" and last.get("role") == "assistant" and "content" not in last:
            last["content"] = content
        else:
            messages.append({"role": role, "content": content})
        return
    if kind == "function_call_output":
        output = _content(item.get("output"), where)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        return
    if not messages or messages[-1].get("role") != "assistant" or (kind == "reasoning" and "content" in messages[-1]):
        messages.append({"role": "assistant"})
    answer = messages[-1]
    if kind == "reasoning":
        answer["reasoning_content"] = _content(item.get("content") or [], where, ("reasoning_text",))
        return
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    answer.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})


def _content(given: object, where: str, kinds: tuple[str, ...] = _TEXTS) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise wrong(where, given, "a text, or a list of parts")
    for part in given:
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise wrong(where, part, f"parts of {' or '.join(kinds)}")
    return "".join(part["text"] for part in given)


def _tools(given: object) -> list[dict[str, Any]] | None:
    if given is None:
        return None
    if not isinstance(given, list):
        raise wrong("tools", given, "a list of functions")
    for index, tool in enumerate(given):
        if (kind := object_of(tool, f"tools[{index}]").get("type", MISSING)) != "function":
            raise wrong(f"tools[{index}].type", kind, "function: a server's own tools are not here")
    told = ("name", "description", "parameters", "strict")
    return [{key: tool[key] for key in told if tool.get(key) is not None} for tool in given]


@dataclass
class ResponseBody:
    """A response as it is told: the same head at its beginning and at its end."""

    ask: Ask
    identity: str = field(default_factory=lambda: new_id("resp"))
    created: int = field(default_factory=lambda: int(time.time()))

    def told(self, status: str, output: list[dict[str, Any]], finish: Finish | None = None) -> dict[str, Any]:
        """The whole object."""
        system = self.ask.messages[0] if self.ask.messages else None
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.identity, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": cut, "model": self.ask.model, "output": output, "previous_response_id": None,
            "instructions": system.content if system is not None and system.role == "system" else None,
            "max_output_tokens": self.ask.max_tokens, "parallel_tool_calls": not self.ask.one_call,
            "temperature": self.ask.sampling.temperature, "top_p": self.ask.sampling.top_p, "tool_choice": self._choice(),
            "tools": [{"type": "function", **tool["function"]} for tool in self.ask.tools], "truncation": "disabled",
            "text": {"format": self._format()}, "metadata": {}, "store": False,
            "usage": None if finish is None else usage(finish),
        }  # fmt: skip

    def _format(self) -> dict[str, Any]:
        form = self.ask.response_format or {"type": "text"}
        return {"type": form["type"], **form.get("json_schema", {})}

    def _choice(self) -> object:
        names = self.ask.must_call
        if len(names) == len(self.ask.tools):
            return "required" if names else "auto"
        return {"type": "function", "name": names[0]} if names else "auto"


def usage(finish: Finish) -> dict[str, Any]:
    """The count of tokens; reasoning is not counted apart from the answer."""
    return {
        "input_tokens": finish.prompt_tokens, "input_tokens_details": {"cached_tokens": finish.cached},
        "output_tokens": finish.tokens, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": finish.prompt_tokens + finish.tokens,
    }  # fmt: skip


def status_of(finish: Finish) -> str:
    """How a response ended."""
    return "incomplete" if finish.reason == "length" else "completed"


def items(choice: Choice) -> list[dict[str, Any]]:
    """The output items of an answer."""
    assert choice.finish is not None
    status = status_of(choice.finish)
    found = []
    if choice.reasoning:
        found.append(reasoning_item(new_id("rs"), choice.reasoning))
    if choice.text or not (choice.calls or choice.reasoning):
        found.append(message_item(new_id("msg"), choice.text, status))
    return found + [
        call_item(new_id("fc"), call, "completed" if is_whole(call) else "incomplete") for call in choice.calls
    ]


def reasoning_item(identity: str, text: str) -> dict[str, Any]:
    """What the model thought."""
    return {"id": identity, "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def message_item(identity: str, text: str | None, status: str) -> dict[str, Any]:
    """What it said; without parts where there is none yet."""
    parts = [] if text is None else [text_part(text)]
    return {"id": identity, "type": "message", "role": "assistant", "status": status, "content": parts}


def text_part(text: str) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(identity: str, call: Call, status: str = "completed") -> dict[str, Any]:
    """A call of a function."""
    return {"id": identity, "type": "function_call", "call_id": call.id or new_id("call"), "name": call.name,
            "arguments": call.arguments, "status": status}  # fmt: skip

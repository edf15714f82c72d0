"""What clients ask over HTTP, read from JSON into values: OpenAI's chat completions and completions, with vLLM's and
llama-server's options beside them.

A request is what it says, or it is refused: a key that is not known here would change nothing without a word, so it is an
error that names it. Keys that have no effect on an answer (`user`, `metadata`) are taken. What OpenAI calls an option and
this server cannot do (`audio`, a list of allowed tools) is an error, too.

    read_chat(body), read_completion(body) -> Ask        raises ApiError, which holds OpenAI's status, type, code and param
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qgraft.data.calls import RowError, calls_of, tools_of
from qgraft.data.messages import Message, Tool
from qgraft.errors import OptionError, QgraftError, near_match
from qgraft.ranges import COUNT, Range
from qgraft.serving.sampling import TOP_LOGPROBS, Sampling

CHOICES = Range(1, 16, whole=True)  # n
STOPS, STOP_LENGTH = 16, 500  # stop strings, and characters of one: each is looked for at every token

_IGNORED = {  # say nothing about the answer
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "cache_prompt", "stream_options", "model", "stream", "n", "stop", "lora", "ignore_eos",
    "prediction",
}  # fmt: skip
_SAMPLING = {
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "logprobs",
}  # fmt: skip
_CHAT = {
    "messages", "max_tokens", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "response_format",
    "chat_template_kwargs", "parallel_tool_calls",
}  # fmt: skip
_MESSAGE = {"role", "content", "reasoning_content", "name", "tool_calls", "tool_call_id"}
_FORMS = 'a type, "text", "json_object", or "json_schema" with json_schema: {"name": ..., "schema": {...}}'
_SCHEMA = {"name", "description", "schema", "strict"}
_CHOICES = 'none, auto, required, or {"type": "function", "function": {"name": ...}} with a name of tools'
_COMPLETION = {"prompt", "max_tokens", "echo", "suffix", "best_of"}


class ApiError(QgraftError):
    """An answer that is an error, as OpenAI's API gives them.

    Attributes:
        status: of HTTP.
        kind, code, param: `type`, `code` and `param` of the error.
        retry_after: seconds.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None,
        param: str | None = None, hint: str | None = None, retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message, hint=hint)
        self.status, self.kind, self.code, self.param, self.retry_after = status, kind, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Ask:
    """What is asked for, without the model.

    Attributes:
        model: as the request names it: the base, an adapter, or a mix (lora_protocol.py).
        messages: of a chat; None of a completion.
        prompts: of a completion, texts or ids.
        count: `n`, how many answers to each prompt.
        lora: llama-server's list, or weights by names; None where it is not given.
        enable_thinking: what the chat template is told.
        echo: whether the prompt is a part of the text.
        response_format: as it was given; None for any text.
        param: what the API calls its prompts.
        must_call: the names of functions one of which answers must call; empty where they need not.
        one_call: whether an answer has one call of a tool at most.
    """

    model: str
    sampling: Sampling
    messages: tuple[Message, ...] | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    tools: tuple[Tool, ...] = ()
    count: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    ignore_ends: bool = False
    lora: object = None
    enable_thinking: bool | None = None
    echo: bool = False
    response_format: Mapping[str, Any] | None = None
    must_call: tuple[str, ...] = ()
    param: str = "messages"

    @property
    def strict(self) -> bool:
        """Whether calls that an answer need not make must be right where it makes them."""
        return not self.must_call and any(tool["function"].get("strict") is True for tool in self.tools)

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """Of the JSON that answers must be; None for any text."""
        if self.response_format is None:
            return None
        described: Mapping[str, Any] = self.response_format.get("json_schema", {"schema": {"type": "object"}})
        schema: Mapping[str, Any] = described["schema"]
        return schema

    one_call: bool = False


def read_chat(body: object) -> Ask:
    """The value of a body of /v1/chat/completions. Raises ApiError."""
    given = _object(body)
    _check_keys(given, _CHAT)
    thinking = _check_chat_options(given)
    tools = _tools(given.get("tools")) if given.get("tool_choice") != "none" else ()
    limit = "max_tokens" if given.get("max_completion_tokens") is None else "max_completion_tokens"
    top = given.get("top_logprobs")
    if top is not None and not given.get("logprobs"):
        raise _bad("top_logprobs", "it needs logprobs: true")
    logprobs = (0 if top is None else top) if _flag(given, "logprobs") else None
    return Ask(
        sampling=_sampling(given, logprobs, "top_logprobs"), messages=_messages(given.get("messages")), tools=tools,
        max_tokens=_tokens(given.get(limit), limit), enable_thinking=thinking,
        response_format=_response_format(given.get("response_format")), must_call=_must_call(given.get("tool_choice"), tools),
        one_call=not _flag(given, "parallel_tool_calls", default=True), **_shared(given),
    )  # fmt: skip


def read_completion(body: object) -> Ask:
    """The value of a body of /v1/completions. Raises ApiError."""
    given = _object(body)
    _check_keys(given, _COMPLETION)
    for name, harmless in (("suffix", ("", None)), ("best_of", (None, given.get("n", 1)))):
        if given.get(name) not in harmless:
            raise _bad(name, "nothing: it is not supported")
    if _flag(given, "echo") and given.get("logprobs") is not None:
        raise _bad("logprobs", "nothing beside echo: those of the prompt are not computed")
    wanted = given.get("max_tokens")
    return Ask(
        sampling=_sampling(given, given.get("logprobs"), "logprobs"), prompts=_prompts(given.get("prompt")),
        max_tokens=_tokens(16 if wanted is None else wanted, "max_tokens"), echo=_flag(given, "echo"), param="prompt",
        **_shared(given),
    )  # fmt: skip


def _object(body: object) -> Mapping[str, Any]:
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {type(body).__name__}, expected a JSON object")
    return body


def _check_keys(given: Mapping[str, Any], own: set[str]) -> None:
    known = _IGNORED | _SAMPLING | own
    if unknown := [name for name in given if name not in known and given[name] is not None]:
        raise ApiError(
            400, f"unknown option {unknown[0]!r}: it would have no effect", code="unknown_parameter", param=unknown[0],
            hint=near_match(unknown[0], known),
        )  # fmt: skip


def _check_chat_options(given: Mapping[str, Any]) -> bool | None:
    """What the template is told of thinking. Raises ApiError for what no answer here can be held to."""
    told = given.get("chat_template_kwargs") or {}
    if not isinstance(told, dict) or told.keys() - {"enable_thinking"}:
        raise _bad("chat_template_kwargs", 'only {"enable_thinking": true or false}')
    thinking = told.get("enable_thinking")
    if not isinstance(thinking, bool | None):
        raise _bad("chat_template_kwargs", 'only {"enable_thinking": true or false}')
    return thinking


def _response_format(form: object) -> Mapping[str, Any] | None:
    if form in (None, {"type": "text"}):
        return None
    if not isinstance(form, dict) or form.get("type") not in ("json_object", "json_schema"):
        raise _bad("response_format", _FORMS)
    if form.keys() != ({"type"} if form["type"] == "json_object" else {"type", "json_schema"}):
        raise _bad("response_format", _FORMS)
    told = form.get("json_schema", {"name": "", "schema": {}})
    if not isinstance(told, dict) or told.keys() - _SCHEMA:
        raise _bad("response_format", _FORMS)
    if not isinstance(told.get("name"), str) or not isinstance(told.get("schema"), dict):
        raise _bad("response_format", _FORMS)
    return form


def _must_call(choice: object, tools: tuple[Tool, ...]) -> tuple[str, ...]:
    """The names of functions one of which tool_choice makes an answer call."""
    names = tuple(tool["function"]["name"] for tool in tools)
    if choice in (None, "auto", "none"):
        return ()
    if choice == "required" and names:
        return names
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise _bad("tool_choice", _CHOICES)
    return (str(name),)


def _shared(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Ask that both have."""
    model, count, stop = given.get("model"), given.get("n"), given.get("stop")
    if not isinstance(model, str) or not model:
        raise _bad("model", "a name")
    count = 1 if count is None else count
    if count not in CHOICES:
        raise _bad("n", str(CHOICES))
    texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts) or len(texts) > STOPS:
        raise _bad("stop", f"a text, or a list of at most {STOPS}, none of them empty")
    if max(map(len, texts), default=0) > STOP_LENGTH:
        raise _bad("stop", f"texts of at most {STOP_LENGTH} characters")
    options = given.get("stream_options") or {}
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise _bad("stream_options", '{"include_usage": true or false}')
    return {
        "model": model, "count": count, "stop": tuple(texts), "stream": _flag(given, "stream"),
        "include_usage": _flag(options, "include_usage"), "ignore_ends": _flag(given, "ignore_eos"),
        "lora": given.get("lora"),
    }  # fmt: skip


def _sampling(given: Mapping[str, Any], logprobs: object, asked_as: str) -> Sampling:
    if logprobs is False:
        logprobs = None
    if logprobs is not None and logprobs not in TOP_LOGPROBS:
        raise _bad(asked_as, str(TOP_LOGPROBS))
    options: dict[str, Any] = {"logprobs": logprobs}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty", "seed"):  # fmt: skip
        value = given.get(name)
        if name == "repetition_penalty" and (other := given.get("repeat_penalty")) is not None:
            if value not in (None, other):
                raise _bad("repeat_penalty", f"the same as repetition_penalty, {value!r}")
            value = other
        if value is not None:
            options[name] = value % 2**32 if name == "seed" and type(value) is int else value
    bias = given.get("logit_bias") or {}
    if not isinstance(bias, dict) or not all(str(token).isascii() and str(token).isdigit() for token in bias):
        raise _bad("logit_bias", "numbers by token ids")
    try:
        return Sampling(logit_bias={int(token): value for token, value in bias.items()}, **options)
    except OptionError as error:
        raise ApiError(400, error.message, param=re.split("[=:]", error.message)[0]) from error


def _messages(given: object) -> tuple[Message, ...]:
    if not isinstance(given, list) or not given:
        raise _bad("messages", "a list of messages")
    return tuple(_message(each, f"messages[{index}]") for index, each in enumerate(given))


def _message(given: object, where: str) -> Message:
    if not isinstance(given, dict):
        raise _bad(where, "an object")
    if unknown := [key for key in given if key not in _MESSAGE and given[key] not in (None, "", [])]:
        raise _bad(f"{where}.{str(unknown[0])[:50]}", "nothing: it would have no effect")
    role = given.get("role")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise _bad(f"{where}.role", "system, developer, user, assistant or tool")
    content = _content(given.get("content"), f"{where}.content")
    try:
        calls = calls_of(given.get("tool_calls"))
    except RowError as error:
        raise ApiError(400, f"{where}.tool_calls: {error}", param=f"{where}.tool_calls") from error
    if not content and not calls and role != "assistant" and given.get("content") is None:
        raise _bad(f"{where}.content", "a text")
    texts = {key: given.get(key) for key in ("reasoning_content", "name", "tool_call_id")}
    if wrong := [key for key, value in texts.items() if not isinstance(value, str | None)]:
        raise _bad(f"{where}.{wrong[0]}", "a text")
    return Message(
        "system" if role == "developer" else role, content, reasoning=texts["reasoning_content"] or "", calls=calls,
        call_id=texts["tool_call_id"], name=texts["name"],
    )  # fmt: skip


def _content(given: object, where: str) -> str:
    """A message's text: text, its parts, or nothing."""
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, list):
        raise _bad(where, "a text, or a list of parts")
    for part in given:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _bad(where, f'parts of {{"type": "text"}} only, got {kind!r}')
    return "".join(part["text"] for part in given)


def _tools(given: object) -> tuple[Tool, ...]:
    try:
        tools = tools_of(given)
    except RowError as error:
        raise ApiError(400, f"tools: {error}", param="tools") from error
    names = [str(tool.get("function", tool).get("name")) for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ApiError(400, f"tools: {', '.join(twice)}: two functions have this name", param="tools")
    return tools


def _prompts(given: object) -> tuple[str | tuple[int, ...], ...]:
    """A text, ids, or a list of either."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list) and given:
        if all(type(each) is int for each in given):
            return (tuple(given),)
        if all(isinstance(each, str) for each in given):
            return tuple(given)
        if all(isinstance(each, list) and all(type(token) is int for token in each) for each in given):
            return tuple(map(tuple, given))
    raise _bad("prompt", "a text, a list of token ids, or a list of either")


def _tokens(given: object, name: str) -> int | None:
    if given is None or given == -1:  # llama-server's word for no limit
        return None
    if given not in COUNT:
        raise _bad(name, str(COUNT))
    return int(str(given))


def _flag(given: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = given.get(name)
    if not isinstance(value, bool | None):
        raise _bad(name, "true or false")
    return default if value is None else value


def _bad(param: str, expected: str) -> ApiError:
    return ApiError(400, f"{param}: expected {expected}", code="invalid_value", param=param)

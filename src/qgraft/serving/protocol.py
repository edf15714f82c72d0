"""What clients ask over HTTP, read from JSON into values: OpenAI's chat completions and completions, with vLLM's and
llama-server's options beside them.

A request is what it says, or it is refused: a key that is not known here would change nothing without a word, so it is an
error that names it. Keys that have no effect on an answer (`user`, `metadata`) are taken. What OpenAI calls an option and
this server cannot do (`audio`, a list of allowed tools) is an error, too.

    read_chat(body), read_completion(body) -> Ask        raises ApiError (fields.py)
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qgraft.data.calls import RowError, calls_of, tools_of
from qgraft.data.messages import Call, Message, Tool
from qgraft.errors import OptionError
from qgraft.ranges import COUNT, Range
from qgraft.serving.fields import MISSING, ApiError, check_known, flag_of, object_of, shown, text_of, wrong
from qgraft.serving.sampling import TOP_LOGPROBS, Sampling

CHOICES = Range(1, 16, whole=True)  # n
SEEDS = Range(-(2**63), 2**64 - 1, whole=True)
STOPS, STOP_LENGTH = 16, 500  # stop strings, and characters of one: each is looked for at every token

_IGNORED: dict[str, type] = {  # say nothing about the answer
    "user": str, "metadata": dict, "store": bool, "service_tier": str, "safety_identifier": str, "prompt_cache_key": str,
    "prompt_cache_retention": str, "cache_prompt": bool, "prediction": dict,
}  # fmt: skip
_KINDS = {str: "a text", dict: "an object", bool: "true or false"}
_SHARED = {"model", "stream", "stream_options", "n", "stop", "lora", "ignore_eos", "response_format"}
_SAMPLING = {
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "logprobs",
}  # fmt: skip
_CHAT = {
    "messages", "max_tokens", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
    "chat_template_kwargs", "parallel_tool_calls",
}  # fmt: skip
_MESSAGE = {"role", "content", "reasoning_content", "name", "tool_calls", "tool_call_id"}
_FORMS = ("text", "json_object", "json_schema")
_FORM_HINT = '{"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object", ...}}}'
_SCHEMA = {"name", "description", "schema", "strict"}
_ID = re.compile(r"0|[1-9][0-9]{0,9}")  # of a token, written in one way only: none is there twice
_NAME = re.compile(r"[\w.-]{1,128}")  # of a function: what templates write letter for letter
_CHOICES = 'none, auto, required, or {"type": "function", "function": {"name": ...}} with a name of tools'
_THINKING = '{"enable_thinking": true or false}, and nothing else'
_COMPLETION = {"prompt", "max_tokens", "echo", "suffix", "best_of"}


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
        param, schema_param: what the API calls its prompts, and the schema of a form.
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
    one_call: bool = False
    param: str = "messages"
    schema_param: str = "response_format.json_schema.schema"

    @property
    def strict(self) -> bool:
        """Whether calls that an answer need not make must be right where it makes them."""
        return not self.must_call and any(tool["function"].get("strict") is True for tool in self.tools)

    @property
    def formed(self) -> bool:
        """Whether an answer must be JSON, or calls, and nothing else."""
        return self.response_format is not None or bool(self.must_call)

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """Of the JSON that answers must be; None for any text."""
        if self.response_format is None:
            return None
        described: Mapping[str, Any] = self.response_format.get("json_schema", {"schema": {"type": "object"}})
        schema: Mapping[str, Any] = described["schema"]
        return schema


def read_chat(body: object) -> Ask:
    """The value of a body of /v1/chat/completions. Raises ApiError."""
    given = object_of(body)
    _check_keys(given, _CHAT)
    thinking = _thinking(given)
    tools = _tools(given.get("tools"))
    must_call = _must_call(given.get("tool_choice"), tools)
    limit = "max_tokens" if given.get("max_completion_tokens") is None else "max_completion_tokens"
    top = given.get("top_logprobs")
    if top is not None and not given.get("logprobs"):
        raise wrong("top_logprobs", top, "nothing: it needs logprobs: true")
    logprobs = (0 if top is None else top) if flag_of(given, "logprobs") else None
    return Ask(
        sampling=_sampling(given, logprobs, "top_logprobs"), messages=_messages(given.get("messages")),
        tools=() if given.get("tool_choice") == "none" else tools, max_tokens=_tokens(given.get(limit), limit),
        enable_thinking=thinking, must_call=must_call,
        one_call=not flag_of(given, "parallel_tool_calls", default=True), **_shared(given),
    )  # fmt: skip


def read_completion(body: object) -> Ask:
    """The value of a body of /v1/completions. Raises ApiError."""
    given = object_of(body)
    _check_keys(given, _COMPLETION)
    if given.get("suffix") not in ("", None):
        raise wrong("suffix", given["suffix"], "nothing: it is not supported")
    count = 1 if given.get("n") is None else given["n"]
    if (best := given.get("best_of")) is not None and (isinstance(best, bool) or best != count):
        raise wrong("best_of", best, "the same as n: more is not supported")
    if flag_of(given, "echo") and given.get("logprobs") is not None:
        raise wrong("logprobs", given["logprobs"], "nothing beside echo: those of the prompt are not computed")
    wanted = given.get("max_tokens")
    return Ask(
        sampling=_sampling(given, given.get("logprobs"), "logprobs"), prompts=_prompts(given.get("prompt")),
        max_tokens=_tokens(16 if wanted is None else wanted, "max_tokens"), echo=flag_of(given, "echo"), param="prompt",
        **_shared(given),
    )  # fmt: skip


def _check_keys(given: Mapping[str, Any], own: set[str]) -> None:
    check_known(given, own | _SHARED | _SAMPLING | _IGNORED.keys())
    for name, kind in _IGNORED.items():
        if given.get(name) is not None and not isinstance(given[name], kind):
            raise wrong(name, given[name], _KINDS[kind])


def _thinking(given: Mapping[str, Any]) -> bool | None:
    """What the template is told of thinking. Raises ApiError for what no answer here can be held to."""
    told = given.get("chat_template_kwargs")
    if told is None:
        return None
    if not isinstance(told, dict) or told.keys() - {"enable_thinking"}:
        raise wrong("chat_template_kwargs", told, _THINKING)
    thinking = told.get("enable_thinking")
    return None if thinking is None else flag_of(told, "enable_thinking", where="chat_template_kwargs.")


def _response_format(given: object) -> Mapping[str, Any] | None:
    """The form as it was given, with JSON; None for any text."""
    if given is None:
        return None
    form, where = object_of(given, "response_format"), "response_format."
    kind = form.get("type", MISSING)
    if kind not in _FORMS:
        raise wrong(f"{where}type", kind, " or ".join(_FORMS), hint=_FORM_HINT)
    check_known(form, {"type", "json_schema"} if kind == "json_schema" else {"type"}, where)
    if kind != "json_schema":
        return None if kind == "text" else form
    told, where = object_of(form.get("json_schema", MISSING), f"{where}json_schema"), f"{where}json_schema."
    check_known(told, _SCHEMA, where)
    text_of(told, "name", where=where)
    object_of(told.get("schema", MISSING), f"{where}schema")
    flag_of(told, "strict", where=where)
    if told.get("description") is not None:
        text_of(told, "description", where=where, empty=True)
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
        hint = f"tools has {', '.join(names)[:200]}" if names else "the request has no tools"
        raise wrong("tool_choice", choice, _CHOICES, hint=hint)
    return (str(name),)


def _shared(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Ask that both have."""
    model, count, stop = text_of(given, "model"), given.get("n"), given.get("stop")
    count = 1 if count is None else count
    if count not in CHOICES:
        raise wrong("n", count, str(CHOICES))
    texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts) or len(texts) > STOPS:
        raise wrong("stop", stop, f"a text, or a list of at most {STOPS}, none of them empty")
    if (longest := max(map(len, texts), default=0)) > STOP_LENGTH:
        raise ApiError(400, f"stop: got a text of {longest} characters, expected at most {STOP_LENGTH}", param="stop",
                       code="invalid_value")  # fmt: skip
    options = object_of({} if given.get("stream_options") is None else given["stream_options"], "stream_options")
    check_known(options, {"include_usage", "include_obfuscation"}, "stream_options.")
    flag_of(options, "include_obfuscation", where="stream_options.")
    return {
        "model": model, "count": count, "stop": tuple(texts), "stream": flag_of(given, "stream"),
        "include_usage": flag_of(options, "include_usage", where="stream_options."),
        "ignore_ends": flag_of(given, "ignore_eos"), "lora": given.get("lora"),
        "response_format": _response_format(given.get("response_format")),
    }  # fmt: skip


def _sampling(given: Mapping[str, Any], logprobs: object, asked_as: str) -> Sampling:
    if logprobs is False:
        logprobs = None
    if logprobs is not None and logprobs not in TOP_LOGPROBS:
        raise wrong(asked_as, logprobs, str(TOP_LOGPROBS))
    options: dict[str, Any] = {"logprobs": logprobs}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty", "seed"):  # fmt: skip
        value = given.get(name)
        if name == "repetition_penalty" and (other := given.get("repeat_penalty")) is not None:
            if value not in (None, other):
                raise wrong("repeat_penalty", other, f"the same as repetition_penalty, {shown(value)}")
            value = other
        if name == "seed" and value is not None:
            value = _seed(value)
        if value is not None:
            options[name] = value
    bias = object_of({} if given.get("logit_bias") is None else given["logit_bias"], "logit_bias")
    if odd := [token for token in bias if not _ID.fullmatch(token)]:
        raise wrong("logit_bias", odd[0], "ids of tokens as keys, as texts")
    try:
        return Sampling(logit_bias={int(token): value for token, value in bias.items()}, **options)
    except OptionError as error:
        param = re.split("[=:]", error.message)[0]
        message = re.sub(r"^(\w+)=(.*): expected", r"\1: got \2, expected", error.message, count=1, flags=re.DOTALL)
        raise ApiError(400, message, param=param, code="invalid_value") from error


def _seed(given: object) -> int | None:
    """OpenAI's are of 64 bits with a sign, others' without; -1 is llama-server's and vLLM's word for none."""
    if given not in SEEDS:
        raise wrong("seed", given, f"a whole number from {SEEDS.least} to {SEEDS.most}")
    number = int(str(given))
    return None if number == -1 else number % 2**64


def _messages(given: object) -> tuple[Message, ...]:
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


def _tools(given: object) -> tuple[Tool, ...]:
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
    raise wrong("prompt", MISSING if given is None else given, "a text, a list of token ids, or a list of either")


def _tokens(given: object, name: str) -> int | None:
    if given is None or (given == -1 and type(given) is int):  # llama-server's word for no limit
        return None
    if given not in COUNT:
        raise wrong(name, given, str(COUNT))
    return int(str(given))

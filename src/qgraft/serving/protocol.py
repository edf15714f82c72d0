"""What clients ask over HTTP, read from JSON into values: OpenAI's chat completions and completions, with vLLM's and
llama-server's options beside them.

A request is what it says, or it is refused: a key that is not known here would change nothing without a word, so it is an
error that names it. Keys that have no effect on an answer (`user`, `metadata`) are taken. What OpenAI calls an option and
this server cannot do (`audio`, a list of allowed tools) is an error, too.

    read_chat(body), read_completion(body) -> Ask        raises ApiError (fields.py)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qgraft.data.messages import Message, Tool
from qgraft.errors import OptionError
from qgraft.ranges import COUNT, Range
from qgraft.serving.conversation import read_tools, read_turns
from qgraft.serving.fields import MISSING, ApiError, check_known, flag_of, object_of, shown, text_of, wrong
from qgraft.serving.sampling import TOP_LOGPROBS, Sampling

CHOICES = Range(1, 16, whole=True)  # n
ANSWERED = Range(0, COUNT.most, whole=True)  # max_tokens: with 0 a prompt is read, and nothing is written
SEEDS = Range(-(2**63), 2**64 - 1, whole=True)
STOPS, STOP_LENGTH = 16, 500  # stop strings, and characters of one: each is looked for at every token

_IGNORED: dict[str, type] = {  # say nothing about the answer
    "user": str, "metadata": dict, "store": bool, "service_tier": str, "safety_identifier": str, "prompt_cache_key": str,
    "prompt_cache_retention": str, "prompt_cache_options": dict, "cache_prompt": bool, "prediction": dict,
}  # fmt: skip
_HARMLESS: dict[str, object] = {"modalities": ["text"], "verbosity": "medium"}  # OpenAI's own, where nothing is said
_KINDS = {str: "a text", dict: "an object", bool: "true or false"}
_SHARED = {"model", "stream", "stream_options", "n", "stop", "lora", "ignore_eos", "response_format"}
_SAMPLING = {
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "logprobs",
}  # fmt: skip
_ALIASES = {"repetition_penalty": "repeat_penalty"}
_CHAT = {
    "messages", "max_tokens", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
    "chat_template_kwargs", "parallel_tool_calls", "reasoning_effort", "modalities", "verbosity",
    "thinking_token_budget",
}  # fmt: skip
_FORMS = ("text", "json_object", "json_schema")
_FORM_HINT = '{"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object", ...}}}'
_SCHEMA = {"name", "description", "schema", "strict"}
_ID = re.compile(r"0|[1-9][0-9]{0,9}")  # of a token, written in one way only: none is there twice
_CHOICES = 'none, auto, required, or {"type": "function", "function": {"name": ...}} with a name of tools'
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
        enable_thinking, variables: what the chat template is told.
        thinking_budget: how many tokens an answer may think; None for as many as it likes.
        unsaid: the fields of `sampling` that the request says nothing of, which the model's files may.
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
    variables: Mapping[str, str | float] = field(default_factory=dict)
    echo: bool = False
    response_format: Mapping[str, Any] | None = None
    must_call: tuple[str, ...] = ()
    one_call: bool = False
    param: str = "messages"
    schema_param: str = "response_format.json_schema.schema"
    thinking_budget: int | None = None
    unsaid: frozenset[str] = frozenset()

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
    variables = _variables(given)
    for name, harmless in _HARMLESS.items():
        if given.get(name) not in (None, harmless):
            raise wrong(name, given[name], f"{shown(harmless)}: another value would have no effect")
    tools = read_tools(given.get("tools"))
    must_call = _must_call(given.get("tool_choice"), tools)
    limit = "max_tokens" if given.get("max_completion_tokens") is None else "max_completion_tokens"
    top = given.get("top_logprobs")
    if top is not None and not given.get("logprobs"):
        raise wrong("top_logprobs", top, "nothing: it needs logprobs: true")
    logprobs = (0 if top is None else top) if flag_of(given, "logprobs") else None
    return Ask(
        sampling=_sampling(given, logprobs, "top_logprobs"), messages=read_turns(given.get("messages")),
        tools=() if given.get("tool_choice") == "none" else tools, max_tokens=_tokens(given.get(limit), limit),
        enable_thinking=variables.pop("enable_thinking", None), variables=variables, must_call=must_call,
        thinking_budget=_tokens(given.get("thinking_token_budget"), "thinking_token_budget"),
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


def _variables(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is told beside the messages; OpenAI's "none" of reasoning is to think not at all. Raises ApiError."""
    told, where = given.get("chat_template_kwargs"), "chat_template_kwargs"
    found = {name: value for name, value in object_of({} if told is None else told, where).items() if value is not None}
    if odd := [name for name, value in found.items() if not isinstance(value, str | int | float)]:
        raise wrong(f"{where}.{odd[0][:50]}", found[odd[0]], "a text, a number, true or false")
    if "enable_thinking" in found:
        flag_of(found, "enable_thinking", where=f"{where}.")
    if (effort := given.get("reasoning_effort")) is not None:
        other = found.setdefault("reasoning_effort", text_of(given, "reasoning_effort"))
        if other != effort:
            raise wrong("reasoning_effort", effort, f"the same as in {where}, {shown(other)}")
    if effort == "none" and found.setdefault("enable_thinking", False) is False:
        del found["reasoning_effort"]
    return found


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
        "unsaid": frozenset(n for n in _SAMPLING if given.get(n) is None and given.get(_ALIASES.get(n, n)) is None),
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
    if given not in ANSWERED:
        raise wrong(name, given, str(ANSWERED))
    return int(str(given))

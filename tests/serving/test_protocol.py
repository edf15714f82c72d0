"""Requests as the official documentation shows them are read, and what would have no effect is refused."""

from typing import Any

import pytest

from qgraft.data.messages import Call, Message
from qgraft.serving.fields import ApiError, json_of
from qgraft.serving.lora_protocol import (
    adapters_body,
    lora_given,
    mix_named,
    models_body,
    read_load,
    read_scales,
    read_unload,
)
from qgraft.serving.protocol import read_chat, read_completion

# platform.openai.com/docs/api-reference/chat/create
DEFAULT = {
    "model": "VAR_chat_model_id",
    "messages": [
        {"role": "developer", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Hello!"},
    ],
}
FUNCTIONS: dict[str, Any] = {
    "model": "gpt-5.4",
    "messages": [{"role": "user", "content": "What is the weather like in Boston today?"}],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_current_weather",
                "description": "Get the current weather in a given location",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
                        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                    },
                    "required": ["location"],
                },
            },
        }
    ],
    "tool_choice": "auto",
}
LOGPROBS = {**DEFAULT, "logprobs": True, "top_logprobs": 2}
COMPLETION = {"model": "VAR_completion_model_id", "prompt": "Say this is a test", "max_tokens": 7, "temperature": 0}


@pytest.mark.parametrize(("given", "seed"), [(5, 5), (2**32 + 5, 2**32 + 5), (-2, 2**64 - 2), (-1, None), (None, None)])
def test_seeds(given: int | None, seed: int | None) -> None:
    """-1 asks for another answer each time: llama-server's default, which its clients send."""
    assert read_chat({**DEFAULT, "seed": given}).sampling.seed == seed


def test_what_openais_client_sends_back_of_its_parsed_answers() -> None:
    """As openai's parse() and stream() return a message, and write it when it is put among those of the next request."""
    call = {"id": "c1", "function": {"arguments": '{"a":1}', "name": "f", "parsed_arguments": {"a": 1}}, "type": "function",
            "index": 0}  # fmt: skip
    extra = {"role": "assistant", "refusal": None, "annotations": [], "audio": None, "function_call": None}
    turns = [
        {"role": "user", "content": "x"}, {**extra, "content": None, "tool_calls": [call], "parsed": None},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {**extra, "content": '{"a":1}', "tool_calls": None, "parsed": {"a": 1}}, {"role": "user", "content": "y"},
    ]  # fmt: skip
    said = read_chat({**DEFAULT, "messages": turns}).messages
    assert said is not None and said[1].calls[0].arguments == said[3].content == '{"a":1}'
    with pytest.raises(ApiError, match=r"messages\[0\]\.parsed"):
        read_chat({**DEFAULT, "messages": [{"role": "user", "content": "x", "parsed": 1}]})


def test_the_examples_of_the_documentation() -> None:
    ask = read_chat(DEFAULT)
    assert ask.messages == (Message("system", "You are a helpful assistant."), Message("user", "Hello!"))
    assert (ask.model, ask.count, ask.stream, ask.max_tokens) == ("VAR_chat_model_id", 1, False, None)
    assert (ask.sampling.temperature, ask.sampling.top_p, ask.sampling.logprobs) == (1.0, 1.0, None)
    assert read_chat({**DEFAULT, "stream": True, "stream_options": {"include_usage": True}}).include_usage
    assert (
        read_chat({**DEFAULT, "response_format": {"type": "json_object"}}).schema == {"type": "object"}
        and ask.schema is None
    )
    described = {"name": "reply", "strict": True, "schema": {"type": "array"}}
    asked = read_chat({**FUNCTIONS, "response_format": {"type": "json_schema", "json_schema": described}})
    assert asked.schema == {"type": "array"} and asked.must_call == ()
    name = FUNCTIONS["tools"][0]["function"]["name"]
    for choice in ("required", {"type": "function", "function": {"name": name}}):
        assert read_chat({**FUNCTIONS, "tool_choice": choice}).must_call == (name,)
    assert read_chat(FUNCTIONS).tools == tuple(FUNCTIONS["tools"])
    assert read_chat({**FUNCTIONS, "tool_choice": "none"}).tools == ()
    assert (
        read_chat(LOGPROBS).sampling.logprobs == 2 and read_chat({**DEFAULT, "logprobs": True}).sampling.logprobs == 0
    )
    ask = read_completion(COMPLETION)
    assert (ask.prompts, ask.max_tokens, ask.sampling.temperature) == (("Say this is a test",), 7, 0)
    for change in ({}, {"max_tokens": None}):
        assert read_completion({"model": "m", "prompt": "x", **change}).max_tokens == 16
    assert read_completion({"model": "m", "prompt": [[1, 2], [3]]}).prompts == ((1, 2), (3,))
    assert read_completion({"model": "m", "prompt": [1, 2]}).prompts == ((1, 2),)


def test_a_conversation_with_calls_parts_and_reasoning() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "time?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"at": "Rome"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]  # fmt: skip
    asked = read_chat({"model": "m", "messages": messages, "max_completion_tokens": 9, "stop": ["a", "b"]})
    assert asked.messages == (
        Message("user", "What time?"),
        Message("assistant", "", "Look.", (Call("time", '{"at": "Rome"}', "call_1"),)),
        Message("tool", "noon", call_id="call_1"),
    )
    assert (asked.max_tokens, asked.stop) == (9, ("a", "b"))
    assert read_chat({**DEFAULT, "max_completion_tokens": None, "max_tokens": 5}).max_tokens == 5
    assert read_chat({**FUNCTIONS, "parallel_tool_calls": False}).one_call and not read_chat(FUNCTIONS).one_call


@pytest.mark.parametrize(
    "change,param",
    [
        ({"temperature": "hot"}, "temperature"), ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"), ({"n": 0}, "n"), ({"n": 99}, "n"), ({"stop": [""]}, "stop"), ({"stop": 5}, "stop"),
        ({"max_tokens": -2}, "max_tokens"), ({"max_tokens": True}, "max_tokens"), ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "much"}}, "logit_bias"), ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
        ({"seed": 2**64}, "seed"), ({"seed": -(2**63) - 1}, "seed"), ({"seed": 1.5}, "seed"), ({"seed": True}, "seed"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tool_choice": "required"}, "tool_choice"), ({**FUNCTIONS, "tool_choice": "any"}, "tool_choice"),
        ({**FUNCTIONS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({**FUNCTIONS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({**FUNCTIONS, "tool_choice": []}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "z": 1}}},
         "response_format.json_schema.z"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"seed": "x"}, "seed"), ({"stop": "x" * 501}, "stop"),
        ({"repetition_penalty": 1.1, "repeat_penalty": 2}, "repeat_penalty"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"), ({"audio": {}}, "audio"), ({"temprature": 1}, "temprature"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"), ({"stream": 1}, "stream"),
        ({"model": None}, "model"), ({"messages": []}, "messages"), ({"messages": [{"role": "king"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"), ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"chat_template_kwargs": {"x": []}}, "chat_template_kwargs.x"), ({"modalities": ["audio"]}, "modalities"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_chat({**DEFAULT, **change})
    error = caught.value
    assert (error.status, error.param) == (400, param)
    body = error.body()["error"]
    assert body["type"] == "invalid_request_error" and body["param"] == param and param.split("[")[0] in body["message"]


def test_two_functions_of_one_name_are_refused() -> None:
    with pytest.raises(ApiError, match="get_current_weather: two functions have this name"):
        read_chat({**FUNCTIONS, "tools": FUNCTIONS["tools"] * 2})


def test_an_unknown_option_names_the_one_that_was_meant() -> None:
    with pytest.raises(ApiError, match="did you mean temperature"):
        read_chat({**DEFAULT, "temprature": 1})
    with pytest.raises(ApiError, match="expected a JSON object"):
        read_chat([])
    for change in (
        {"best_of": 3},
        {"suffix": "x"},
        {"prompt": []},
        {"prompt": [1, "a"]},
        {"logprobs": 30},
        {"echo": True, "logprobs": 1},
    ):
        with pytest.raises(ApiError):
            read_completion({**COMPLETION, **change})


def test_mixes_by_name() -> None:
    assert mix_named("law") == {"law": 1.0}
    assert mix_named("law=0.7+med=0.3") == {"law": 0.7, "med": 0.3}
    assert mix_named("law=-0.5+med") == {"law": -0.5, "med": 1.0}
    for wrong in (
        "",
        "law=",
        "law=x",
        "law+law",
        "law=nan",
        "=1",
        "law=1e999",
        "+",
        "law++med",
        "law=1_0",
        "law=\u0663",
        "law=101",
    ):
        assert mix_named(wrong) is None


def test_lora_as_llama_server_has_it() -> None:
    listed = {0: "law", 1: "med"}
    # github.com/ggml-org/llama.cpp/tree/master/tools/server: "lora": [{"id": 0, "scale": 0.5}, {"id": 1, "scale": 1.1}]
    assert lora_given([{"id": 0, "scale": 0.5}, {"id": 1, "scale": 1.1}], listed) == {"law": 0.5, "med": 1.1}
    assert lora_given([{"id": 1, "scale": 0.0}], listed) == {"med": 0.0}
    assert lora_given([], listed) == {} == lora_given({}, listed)
    assert lora_given([{"name": "tax", "scale": 2}], listed) == {"tax": 2.0} == lora_given({"tax": 2}, listed)
    assert read_scales([{"id": 0, "scale": 0.2}, {"id": 1, "scale": 0.8}], listed) == {"law": 0.2, "med": 0.8}
    for wrong in ("law", [1], [{"id": 2}], [{"id": True}], [{"id": 0, "name": "law"}], {"law": "x"}, [{"scale": 1}],
                  [{"id": 0}, {"name": "law"}], {"law": float("inf")}, [{"id": 0, "scale": None}],
                  {"law": 1e38}):  # fmt: skip
        with pytest.raises(ApiError):
            lora_given(wrong, listed)
    with pytest.raises(ApiError):
        read_scales({"law": 1}, listed)
    assert adapters_body(listed, {"law": "a.gguf"}, {"med": 0.5}) == [
        {"id": 0, "path": "a.gguf", "name": "law", "scale": 0.0},
        {"id": 1, "path": "", "name": "med", "scale": 0.5},
    ]


def test_loading_as_vllm_has_it() -> None:
    # docs.vllm.ai/en/latest/features/lora: {"lora_name": "sql_adapter", "lora_path": "/path/to/sql-lora-adapter"}
    body = read_load({"lora_name": "sql_adapter", "lora_path": "/path/to/sql-lora-adapter"})
    assert (body.name, body.path, body.replace) == ("sql_adapter", "/path/to/sql-lora-adapter", False)
    assert read_load({"lora_name": "a", "lora_path": "b", "load_inplace": True}).replace
    assert read_unload({"lora_name": "sql_adapter"}) == "sql_adapter"
    with pytest.raises(ApiError, match=r"Both 'lora_name' and 'lora_path' must be provided\."):
        read_load({"lora_name": "a"})
    with pytest.raises(ApiError, match="'lora_name' needs to be provided"):
        read_unload({})
    with pytest.raises(ApiError, match=r"the body: got \[\], expected a JSON object"):
        read_unload([])


def test_adapters_are_models_whose_parent_is_the_base() -> None:
    body = models_body("base.gguf", {"law": "adapters/law"}, 1, 128)
    assert body["object"] == "list" and [each["id"] for each in body["data"]] == ["base.gguf", "law"]
    assert [(each["parent"], each["root"]) for each in body["data"]] == [
        (None, "base.gguf"),
        ("base.gguf", "adapters/law"),
    ]


def test_errors_say_what_was_got_and_what_is_expected() -> None:
    def form(**told: Any) -> dict[str, Any]:
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, **told}}}

    def tool(**told: Any) -> dict[str, Any]:
        return {"tools": [FUNCTIONS["tools"][0], {"type": "function", "function": {"name": "f", **told}}]}

    for change, message in (
        ({"response_format": "json"}, 'response_format: got "json", expected an object'),
        ({"response_format": {"type": "jsno"}}, 'response_format.type: got "jsno", expected text or json_object'),
        ({"response_format": {}}, "response_format.type: got nothing, expected text or"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: got nothing, expected an object"),
        (form(schema=[1]), "response_format.json_schema.schema: got [1], expected an object"),
        (form(schema=None), "response_format.json_schema.schema: got null, expected an object"),
        (form(name=5), "response_format.json_schema.name: got 5, expected a text"),
        (form(strict="yes"), 'response_format.json_schema.strict: got "yes", expected true or false'),
        (form(strict=1), "response_format.json_schema.strict: got 1, expected true or false"),
        (form(description=[]), "response_format.json_schema.description: got [], expected a text"),
        (form(shema={}), 'unknown option "response_format.json_schema.shema": it would have no effect'),
        (tool(strict="yes"), 'tools[1].function.strict: got "yes", expected true or false'),
        (tool(parameters="{}"), 'tools[1].function.parameters: got "{}", expected an object'),
        (tool(description=5), "tools[1].function.description: got 5, expected a text"),
        (tool(name=5), "tools[1].function.name: got 5, expected a text"),
        ({"tools": [{"type": "web_search", "function": {"name": "f"}}]}, 'tools[0].type: got "web_search", expected'),
        ({"tools": "[]"}, 'tools: got "[]", expected a list of'), ({"tools": [5]}, "tools[0]: got 5, expected an object"),
        ({**tool(strict=5), "tool_choice": "none"}, "tools[1].function.strict: got 5"),
        ({"tool_choice": "required"}, 'tool_choice: got "required", expected none, auto, required, or'),
        ({"temperature": "hot"}, "temperature: got 'hot', expected 0, or a number"),
        ({"stop": 5}, "stop: got 5, expected a text, or a list"), ({"n": True}, "n: got true, expected a whole number"),
        ({"stream": "yes"}, 'stream: got "yes", expected true or false'),
        ({"stream_options": []}, "stream_options: got [], expected an object"),
        ({"stream_options": False}, "stream_options: got false, expected an object"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage: got 1, expected true or false"),
        ({"stream_options": {"include_obfuscation": 0}}, "stream_options.include_obfuscation: got 0, expected true or"),
        ({"logit_bias": []}, "logit_bias: got [], expected an object"), ({"logit_bias": 0}, "logit_bias: got 0, expected an"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs: got [], expected an object"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, 'chat_template_kwargs.enable_thinking: got "no"'),
        ({"store": "yes"}, 'store: got "yes", expected true or false'), ({"cache_prompt": 1}, "cache_prompt: got 1"),
        ({"user": 5}, "user: got 5, expected a text"), ({"metadata": []}, "metadata: got [], expected an object"),
        ({"max_tokens": -1.0}, "max_tokens: got -1.0, expected a whole number"), ({"top_logprobs": False}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs: got 1, expected true or false"), ({"model": 5}, "model: got 5, expected a text"),
        ({"messages": [{"role": "king"}]}, 'messages[0].role: got "king", expected system, developer'),
        ({"messages": [5]}, "messages[0]: got 5, expected an object"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: got 5, expected a text, or a list of parts"),
        ({"messages": [{"role": "assistant", "tool_calls": "[]"}]}, 'messages[0].tool_calls: got "[]", expected a list'),
    ):  # fmt: skip
        with pytest.raises(ApiError) as refused:
            read_chat({**DEFAULT, **change})
        assert refused.value.message.startswith(message), refused.value.message
    with pytest.raises(ApiError, match="hint: did you mean schema"):
        read_chat({**DEFAULT, **form(shema={})})
    for change, message in (
        ({"best_of": True}, "best_of: got true, expected the same as n"), ({"suffix": 0}, "suffix: got 0, expected nothing"),
        ({"logprobs": True}, "logprobs: got true, expected a whole number"), ({"echo": 1}, "echo: got 1, expected true or"),
        ({"prompt": 5}, "prompt: got 5, expected a text"),
    ):  # fmt: skip
        with pytest.raises(ApiError) as refused:
            read_completion({**COMPLETION, **change})
        assert refused.value.message.startswith(message), refused.value.message


def test_names_that_templates_write_otherwise_are_refused_as_names() -> None:
    for name in ('a"b', "a b", "a\nb", "", "<tool_call>", "x" * 129, "a{{b}}", "<|im_end|>"):
        for body in (
            {"tools": [{"type": "function", "function": {"name": name}}]},
            {"messages": [{"role": "user", "content": "x"},
                          {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": name or " "}}]}]},
        ):  # fmt: skip
            with pytest.raises(ApiError, match=r"function\.name: got .*expected") as refused:
                read_chat({**DEFAULT, **body})
            assert refused.value.param.endswith("function.name")
    for name in ("f", "get_current-weather.v2", "天气", "x" * 128):
        assert read_chat({**DEFAULT, "tools": [{"type": "function", "function": {"name": name}}]}).tools


@pytest.mark.parametrize(
    "body,told",
    [
        (b"", "it is empty"), (b"  \n", "it is empty"), (b"\xff{}", r"byte 0 \(0xff\) is no UTF-8"),
        (b"\xef\xbb\xbf{}", "byte order mark"), (b"{", "line 1, column 2: got its end, expected a key in double quotes"),
        (b"{'a': 1}", r'line 1, column 2: got "\'", expected a key in double quotes'),
        (b'{"a" 1}', "line 1, column 6: got '1', expected a colon"),
        (b'{"a": 1\n "b": 2}', "line 2, column 2: got '\"', expected a comma"),
        (b'{"a": }', "got '}', expected a value"), (b"{} {}", "expected nothing more behind the value"),
        (b'{"a": "x\ny"}', r"expected line feeds and tabs in texts as \\n and \\t"),
        (b'{"a": "\\q"}', "expected behind a backslash"),
        (b'{"a": "x', "expected a text with a double quote at its end"),
        (b'{"a": "\\ud800"}', r"\\ud800 is half of a character"),
        (b'{"a": NaN}', "NaN is no JSON"), (b'{"a": 1, "a": 2}', "the key 'a' stands twice"), (b"[" * 5000, "nested deeper"),
        (b'{"a": ' + b"1" * 5000 + b"}", "has 5000 digits"), (b'{"a": 1e999}', "larger than any float"),
        (b"undefined", "got 'u'"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_is_no_json_says_where_and_why(body: bytes, told: str) -> None:
    with pytest.raises(ApiError, match=f"the body is not JSON: .*{told}") as refused:
        json_of(body)
    assert refused.value.status == 400
    for word in ("codec", "Expecting", "surrogate", "recursion", "set_int_max", "Invalid"):
        assert word not in refused.value.message

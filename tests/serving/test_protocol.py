"""Requests as the official documentation shows them are read, and what would have no effect is refused."""

from typing import Any

import pytest

from qgraft.data.messages import Call, Message
from qgraft.serving.fields import ApiError
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
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": True}, "max_tokens"), ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "much"}}, "logit_bias"),
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
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
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

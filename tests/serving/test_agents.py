# ruff: noqa: E402 (what is imported below needs the extra)
"""What coding agents speak: Anthropic's messages by its documented events, OpenAI's responses by its own client."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs qgraft[serve]")
pytest.importorskip("sse_starlette", reason="needs qgraft[serve]")
pytest.importorskip("uvicorn", reason="needs qgraft[serve]")
httpx = pytest.importorskip("httpx")

from served import ALL, HELLO, LAW_ONLY, Running

from qgraft.data.messages import Call, Message
from qgraft.serving.fields import ApiError
from qgraft.serving.messages_protocol import read_messages
from qgraft.serving.responses_protocol import read_response

SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}}
WRITTEN = '<think>\nRome?</think>\n\nLook:<tool_call>\n{"name": "time", "arguments": {"at": "Rome"}}\n</tool_call>'


def post(running: Running, path: str, body: Any, **headers: str) -> Any:
    return httpx.post(f"{running.url}{path}", json=body, headers=headers, timeout=300)


def test_messages(running: Running, expected: Callable[[dict[str, float]], str]) -> None:
    body = {"model": "law", "max_tokens": 6, "messages": HELLO, "temperature": 0}
    key = {"x-api-key": ALL, "anthropic-version": "2023-06-01"}
    answer = post(running, "/v1/messages", body, **key).json()
    assert answer["content"] == [{"type": "text", "text": expected({"law": 1.0})}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "law")
    assert answer["stop_reason"] in ("max_tokens", "end_turn") and answer["usage"]["output_tokens"] <= 6
    counted = post(running, "/v1/messages/count_tokens", {"model": "law", "messages": HELLO}, **key).json()
    used = answer["usage"]
    assert counted == {"input_tokens": used["input_tokens"] + used["cache_read_input_tokens"]}
    word = expected({"law": 1.0})[2:5]
    stopped = post(running, "/v1/messages", {**body, "stop_sequences": [word]}, **key).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", word)
    for changed, headers, status, kind in (
        ({}, {}, 401, "authentication_error"), ({"model": "nobody"}, key, 404, "not_found_error"),
        ({"model": "med"}, {"x-api-key": LAW_ONLY}, 403, "permission_error"),
        ({"max_tokens": None}, key, 400, "invalid_request_error"),
    ):  # fmt: skip
        response = post(running, "/v1/messages", {**body, **changed}, **headers)
        assert response.status_code == status and response.json()["type"] == "error"
        assert response.json()["error"]["type"] == kind


def test_messages_with_tools_and_thinking_whole_and_streamed(running: Running, agent: Callable[[str], None]) -> None:
    tool = {"name": "time", "description": "Tells it.", "input_schema": SCHEMA}
    body = {"model": "base", "max_tokens": 300, "messages": HELLO, "tools": [tool]}
    agent(WRITTEN)
    answer = post(running, "/v1/messages", body, **{"x-api-key": ALL}).json()
    thinking, text, use = answer["content"]
    assert (thinking["thinking"], text["text"], use["name"], use["input"]) == (
        "\nRome?",
        "Look:",
        "time",
        {"at": "Rome"},
    )
    assert answer["stop_reason"] == "tool_use"
    agent(WRITTEN)
    lines = post(running, "/v1/messages", {**body, "stream": True}, **{"x-api-key": ALL}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [line[7:] for line in lines if line.startswith("event: ")] == [event["type"] for event in events]
    assert events[0]["type"] == "message_start" and events[0]["message"]["usage"]["input_tokens"] > 0
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    blocks: dict[int, dict[str, Any]] = {}
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            blocks[event["index"]] = {**event["content_block"], "json": "", "open": True}
        elif event["type"] == "content_block_stop":
            blocks[event["index"]]["open"] = False
        else:
            block, delta = blocks[event["index"]], event["delta"]
            key = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "json"}[delta["type"]]
            block[key] += delta["partial_json" if key == "json" else key]
    assert [block["type"] for block in blocks.values()] == ["thinking", "text", "tool_use"]
    assert not any(block["open"] for block in blocks.values())
    assert (blocks[0]["thinking"], blocks[1]["text"].rstrip()) == ("\nRome?", "Look:")
    assert json.loads(blocks[2]["json"]) == {"at": "Rome"} and blocks[2]["input"] == {}


def test_what_a_prompt_would_leave_out_is_refused(running: Running) -> None:
    """Calls that the template has no words for; an answer that somebody has begun."""
    call = {"type": "tool_use", "id": "1", "name": "look", "input": {"city": "x"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "sun"}
    history = [*HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    chat = [*HELLO, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {
        "name": "look", "arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "sun"}]  # fmt: skip
    with running.client() as client:
        for path, body in (
            ("/v1/messages", {"max_tokens": 4, "messages": history}),
            ("/v1/messages/count_tokens", {"messages": history}),
            ("/v1/chat/completions", {"messages": chat}),
        ):
            response = client.post(path, json={"model": "base", **body})
            assert response.status_code == 400 and "tool_calls: " in response.text, response.text
        begun = [*HELLO, {"role": "assistant", "content": "My name is"}]
        response = client.post("/v1/messages", json={"model": "base", "max_tokens": 4, "messages": begun})
        assert response.status_code == 400 and "the last one is the assistant's" in response.text


def test_a_conversation_of_blocks() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": "time?"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Look.", "signature": "x"}, {"type": "text", "text": "A moment."},
            {"type": "tool_use", "id": "toolu_1", "name": "time", "input": {"at": "Rome"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "noon"}]},
            {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}}]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be brief."}]
    asked = read_messages({"model": "m", "max_tokens": 5, "messages": messages, "system": system, "top_k": 3})
    assert asked.messages == (
        Message("system", "Be brief."), Message("user", "What\ntime?"),
        Message("assistant", "A moment.", "Look.", (Call("time", '{"at": "Rome"}', "toolu_1"),)),
        Message("tool", "noon", call_id="toolu_1"), Message("user", "And?"),
    )  # fmt: skip
    assert (asked.max_tokens, asked.sampling.top_k) == (5, 3)
    good = {"model": "m", "max_tokens": 5, "messages": HELLO}
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    for change in (
        {"messages": image}, {"messages": []}, {"messages": [{"role": "system", "content": "x"}]}, {"max_tokens": "x"},
        {"tools": [{"type": "bash_20250124", "name": "bash"}]}, {"tool_choice": {"type": "any"}}, {"system": 1},
        {"thinking": {"type": "enabled", "budget_tokens": -9}}, {"mcp_servers": []}, {"stop_sequences": "x" * 501},
        {"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, {"tools": [{}]}, {"tools": {}},
    ):  # fmt: skip
        with pytest.raises(ApiError):
            read_messages({**good, **change})
    assert read_messages({**good, "thinking": {"type": "disabled"}}).enable_thinking is False
    asked = read_messages({**good, "thinking": {"type": "enabled", "budget_tokens": 9}})
    assert (asked.enable_thinking, asked.thinking_budget) == (True, 9)


def test_turns_of_one_role_are_one_and_a_result_says_that_it_is_an_error() -> None:
    calls = [{"type": "tool_use", "id": f"t{n}", "name": "time", "input": {}} for n in range(2)]
    results = [
        {"type": "tool_result", "tool_use_id": "t0", "content": "no clock", "is_error": True},
        {"type": "tool_result", "tool_use_id": "t1", "is_error": True},
    ]
    turns = [
        {"role": "user", "content": "What"}, {"role": "user", "content": "time?"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, calls[0]]},
        {"role": "assistant", "content": [{"type": "text", "text": "So."}, calls[1]]}, {"role": "user", "content": results},
    ]  # fmt: skip
    called = tuple(Call("time", "{}", f"t{n}") for n in range(2))
    assert read_messages({"model": "m", "max_tokens": 0, "messages": turns}).messages == (
        Message("user", "What\ntime?"), Message("assistant", "So.", "Hm.", called),
        Message("tool", "Error: no clock", call_id="t0"), Message("tool", "Error", call_id="t1"),
    )  # fmt: skip
    with pytest.raises(ApiError, match=r"messages\.0\.content\.is_error: got 1"):
        odd = [{"role": "user", "content": [{**results[0], "is_error": 1}]}]
        read_messages({"model": "m", "max_tokens": 1, "messages": odd})


def test_an_answer_of_a_form_and_an_effort_in_anthropics_words() -> None:
    good = {"model": "m", "max_tokens": 5, "messages": HELLO}
    config = {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}
    asked = read_messages(
        {**good, "output_config": config, "cache_control": {"type": "ephemeral"}, "speed": "standard"}
    )
    assert (asked.schema, asked.variables) == (SCHEMA, {"reasoning_effort": "low"})
    for change, param in (
        ({"output_config": {"format": {"type": "x"}}}, "output_config.format.type"), ({"speed": "fast"}, "speed"),
        ({"output_config": {"format": {"type": "json_schema", "schema": 5}}}, "output_config.format.schema"),
        ({"container": "c"}, "container"), ({"tools": [{"name": "f", "input_schema": {}, "input_examples": []}]},
                                            "tools[0].input_examples"),
        ({"thinking": {"type": "enabled", "display": "omitted"}}, "thinking.display"),
        ({"thinking": {"type": "enabled", "budget_tokens": "x"}}, "thinking.budget_tokens"),
    ):  # fmt: skip
        with pytest.raises(ApiError) as refused:
            read_messages({**good, **change})
        assert refused.value.param == param, refused.value


def test_responses_by_openais_client(running: Running, expected: Callable[[dict[str, float]], str]) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=ALL, max_retries=0)
    options: Any = {"model": "law", "temperature": 0, "max_output_tokens": 6}
    whole = client.responses.create(**options, input="hello world")
    assert whole.output_text == expected({"law": 1.0}) and whole.usage.output_tokens <= 6
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(**options, input=HELLO) as stream:
        events = list(stream)
    assert (
        events[-1].type == "response.incomplete" and events[-1].response.output[0].content[0].text == whole.output_text
    )
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for change in ({"previous_response_id": "resp_1"}, {"tools": [{"type": "web_search"}]}, {"input": []}):
        with pytest.raises(openai.BadRequestError):
            client.responses.create(**{**options, "input": "hello", **change})


def test_responses_with_tools_and_reasoning(running: Running, agent: Callable[[str], None]) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=ALL, max_retries=0)
    tool = {"type": "function", "name": "time", "description": "Tells it.", "parameters": SCHEMA, "strict": False}
    options: Any = {"model": "base", "input": "hello", "tools": [tool]}
    agent(WRITTEN)
    reasoning, message, call = client.responses.create(**options).output
    assert (reasoning.content[0].text, message.content[0].text) == ("\nRome?", "Look:")
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "time",
        {"at": "Rome"},
    ) and call.call_id
    agent(WRITTEN)
    with client.responses.stream(**options) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_response()
    assert events[:2] == ["response.created", "response.in_progress"] and events[-1] == "response.completed"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert events.count("response.output_item.added") == events.count("response.output_item.done") == 3


def test_items_of_a_response_are_a_conversation() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Time?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A moment."}]},
        {"type": "function_call", "call_id": "call_1", "name": "time", "arguments": '{"at": "Rome"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "noon"},
    ]
    asked = read_response({"model": "m", "input": items, "instructions": "Be brief.", "store": True})
    assert asked.messages == (
        Message("system", "Be brief."), Message("user", "Time?"),
        Message("assistant", "A moment.", "Look.", (Call("time", '{"at": "Rome"}', "call_1"),)),
        Message("tool", "noon", call_id="call_1"),
    )  # fmt: skip
    for change in (
        {"input": 5}, {"input": [{"type": "input_image"}]}, {"text": {"format": {"type": "json_schema"}}}, {"stop": "x"},
        {"background": True}, {"truncation": "auto"}, {"conversation": "c"}, {"reasoning": {"effort": 1}},
        {"reasoning": {"mode": "x"}}, {"include": ["message.output_text.logprobs"]}, {"text": {"verbosity": "low"}},
        {"tool_choice": "required"}, {"tools": "x"}, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
    ):  # fmt: skip
        with pytest.raises(ApiError):
            read_response({"model": "m", "input": "x", **change})

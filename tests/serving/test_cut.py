# ruff: noqa: E402 (what is imported below needs the extra)
"""Answers that end before their form does: nothing of them says that it is whole, in any of the APIs."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

for _module in ("fastapi", "sse_starlette", "uvicorn", "llguidance"):
    pytest.importorskip(_module, reason="needs qgraft[serve]")
openai = pytest.importorskip("openai")

from pydantic import BaseModel
from served import ALL, HELLO, Running

Writes = Callable[[str], None]
SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOLS: Any = [{"type": "function", "function": {"name": "time", "description": "", "parameters": SCHEMA}}]
ARGUMENTS = '{"at": "Rome, or wherever"}'
CALL = f'<tool_call>\n{{"name": "time", "arguments": {ARGUMENTS}}}\n</tool_call>'
OPTIONS: Any = {"model": "base", "messages": HELLO, "tools": TOOLS, "temperature": 0}
MESSAGES: Any = {"model": "base", "messages": HELLO, "tools": [{"name": "time", "input_schema": SCHEMA}]}


class Reply(BaseModel):
    mood: str


@pytest.fixture
def client(running: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=ALL, max_retries=0, timeout=300) as client:
        yield client


def tokens(running: Running, text: str) -> int:
    return len(running.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_call_that_max_tokens_cuts_is_a_call_without_its_end(client: Any, running: Running, agent: Writes) -> None:
    whole, seen = tokens(running, CALL), set()
    for most in range(1, whole + 1, 3):
        agent(CALL)
        choice = client.chat.completions.create(**OPTIONS, max_tokens=most).choices[0]
        assert choice.finish_reason == "length", most
        calls = choice.message.tool_calls or []
        assert "{" not in (choice.message.content or ""), choice.message.content
        seen.add(len(calls))
        for call in calls:
            assert call.function.name == "time" and ARGUMENTS.startswith(call.function.arguments)
        agent(CALL)
        chunks = list(client.chat.completions.create(**OPTIONS, max_tokens=most, stream=True))
        deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert [d.function.arguments for d in deltas] == [c.function.arguments for c in calls]
        assert chunks[-1].choices[0].finish_reason == "length"
    assert seen == {0, 1}
    agent(CALL)
    choice = client.chat.completions.create(**OPTIONS, max_tokens=whole + 5).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls[0].function.arguments == ARGUMENTS


def test_the_other_apis_say_so_in_their_words(running: Running, client: Any, agent: Writes) -> None:
    most = tokens(running, CALL[: CALL.index("wherever")])
    with running.client() as http:
        agent(CALL)
        told = http.post("/v1/messages", json={**MESSAGES, "max_tokens": most}).json()
        (use,) = told["content"]
        assert (use["type"], use["name"], use["input"], told["stop_reason"]) == ("tool_use", "time", {}, "max_tokens")
        agent(CALL)
        lines = http.post("/v1/messages", json={**MESSAGES, "max_tokens": most, "stream": True}).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        (partial,) = [
            e["delta"]["partial_json"] for e in events if e.get("delta", {}).get("type") == "input_json_delta"
        ]
        assert ARGUMENTS.startswith(partial) and len(partial) > 8
        assert [e["delta"]["stop_reason"] for e in events if e["type"] == "message_delta"] == ["max_tokens"]
    tool = {"type": "function", "name": "time", "parameters": SCHEMA, "strict": False}
    agent(CALL)
    answer = client.responses.create(model="base", input=HELLO, tools=[tool], max_output_tokens=most)
    (item,) = answer.output
    assert (answer.status, item.type, item.status, item.arguments) == (
        "incomplete",
        "function_call",
        "incomplete",
        partial,
    )
    agent(CALL)
    stream = list(client.responses.create(model="base", input=HELLO, tools=[tool], max_output_tokens=most, stream=True))
    done = [event for event in stream if event.type == "response.output_item.done"]
    assert done[-1].item.status == "incomplete" and stream[-1].type == "response.incomplete"


def test_a_stop_string_that_cuts_a_form_is_no_stop(client: Any, running: Running, agent: Writes) -> None:
    text = '{"mood": "so, so"}'
    for stop, cut in (([","], '{"mood": "so'), (["}"], '{"mood": "so, so"'), (["zzz"], text)):
        agent(text)
        choice = client.chat.completions.create(
            model="base", messages=HELLO, stop=stop, max_tokens=90, response_format={"type": "json_object"}
        ).choices[0]
        assert choice.message.content == cut
        assert choice.finish_reason == ("stop" if cut == text else "length")
        agent(text)
        with running.client() as http:
            body = {
                "model": "base",
                "prompt": "hello",
                "stop": stop,
                "max_tokens": 90,
                "response_format": {"type": "json_object"},
            }
            (told,) = http.post("/v1/completions", json=body).json()["choices"]
        assert (told["text"], told["finish_reason"]) == (cut, choice.finish_reason)
    agent(text)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="base", messages=HELLO, stop=",", response_format=Reply, max_tokens=90)
    agent(text)
    parsed = client.chat.completions.parse(
        model="base", messages=HELLO, stop="zzz", response_format=Reply, max_tokens=90
    )
    assert parsed.choices[0].message.parsed == Reply(mood="so, so")
    for choice in ("auto", "required"):  # a stop string within a call
        agent(CALL)
        answer = client.chat.completions.create(**OPTIONS, stop=",", tool_choice=choice, max_tokens=90).choices[0]
        assert answer.finish_reason == "length" and not answer.message.content, choice
        assert [call.function.arguments for call in answer.message.tool_calls or ()] in ([], [""])
    agent("It is late, and dark.")
    answer = client.chat.completions.create(**OPTIONS, stop=",", max_tokens=90).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("It is late", "stop")


def test_completions_are_held_to_a_form(client: Any, running: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    blanks = dict.fromkeys(map(str, running.tokenizer("\t\n\r ", add_special_tokens=False)["input_ids"]), -20)
    for stream in (False, True):
        told = client.completions.create(
            model="law", prompt=["hello", "world"], max_tokens=60, temperature=0, stream=stream,
            logit_bias=blanks, extra_body={"response_format": form},
        )  # fmt: skip
        texts = ["", ""]
        for each in told if stream else [told]:
            for choice in each.choices:
                texts[choice.index] += choice.text
        assert all(json.loads(text)["n"] in (1, 22) for text in texts)
    with pytest.raises(openai.BadRequestError, match=r"response_format\.json_schema\.schema is refused: .*uniqueItems"):
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"uniqueItems": True}}}
        client.completions.create(model="law", prompt="x", extra_body={"response_format": form})


def test_refused_schemas_name_their_place_in_every_api(client: Any, running: Running, agent: Writes) -> None:
    inner = {"type": "array", "items": {"type": "object", "properties": {"a": {"not": {}}}}}
    for told, place, reason in (
        ({"properties": {"x": inner}}, ".properties.x.items.properties.a", r"answers cannot be held to .*not"),
        ({"properties": {"x": {"pattern": "("}}}, ".properties.x", "unclosed group"),
        ({"properties": {"x": {"format": "zzz"}}}, ".properties.x", "zzz"),
        ({"properties": {"y": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"pattern": "("}}}, ".properties.y", "unclosed"),
        ({"properties": {"x": {"minItems": "1"}}}, ".properties.x.minItems", "expected a whole number"),
        ({"$ref": "#"}, "", "no answer of it has an end"),
    ):
        schema = {"type": "object", **told}
        for where, ask in (
            ("response_format.json_schema.schema", lambda schema: client.chat.completions.create(
                model="base", messages=HELLO,
                response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})),
            ("text.format.schema", lambda schema: client.responses.create(
                model="base", input=HELLO, text={"format": {"type": "json_schema", "name": "n", "schema": schema}})),
            ("tools[1].function.parameters", lambda schema: client.chat.completions.create(
                model="base", messages=HELLO, tool_choice="required",
                tools=[*TOOLS, {"type": "function", "function": {"name": "f", "parameters": schema}}])),
        ):  # fmt: skip
            with pytest.raises(openai.BadRequestError, match=reason) as refused:
                ask(schema)
            assert f"{where}{place}" in refused.value.message, refused.value.message
            assert "NoExtension" not in refused.value.message and "json-schema:" not in refused.value.message


def test_fields_are_called_as_the_api_calls_them(running: Running) -> None:
    tool = {"name": "time", "input_schema": SCHEMA}
    with running.client() as http:
        for path, body, told in (
            ("/v1/messages", {"stop_sequences": 5}, "stop_sequences: got 5"),
            ("/v1/messages", {"tools": [{**tool, "strict": "yes"}]}, 'tools[0].strict: got "yes", expected true or false'),
            ("/v1/messages", {"tools": [{"name": "x"}]}, "tools[0].input_schema: got nothing, expected an object"),
            ("/v1/messages", {"tool_choice": {"disable_parallel_tool_use": 1}}, "tool_choice.disable_parallel_tool_use: got"),
            ("/v1/messages", {"stream": "yes"}, 'stream: got "yes"'),
            ("/v1/messages", {"max_tokens": "9"}, 'max_tokens: got "9", expected a whole number'),
            ("/v1/messages", {"system": 5}, "system: got 5, expected a text, or a list of blocks"),
            ("/v1/responses", {"max_output_tokens": True}, "max_output_tokens: got true"),
            ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": "yes"}}},
             'text.format.strict: got "yes"'),
            ("/v1/responses", {"text": {"format": {"type": "jsn"}}}, 'text.format.type: got "jsn"'),
            ("/v1/responses", {"text": []}, "text: got [], expected an object"), ("/v1/responses", {"store": "no"}, "store"),
            ("/v1/responses", {"tools": [{"type": "function", "name": "f", "strict": "yes"}]}, 'tools[0].strict: got "yes"'),
            ("/v1/responses", {"input": [{"role": "king", "content": "x"}]}, 'input[0].role: got "king"'),
            ("/tokenize", {"add_special": 1}, "add_special: got 1, expected true or false"),
        ):  # fmt: skip
            own = {"/v1/messages": {"model": "base", "max_tokens": 5, "messages": HELLO},
                   "/v1/responses": {"model": "base", "input": "x"}, "/tokenize": {"content": "x"}}[path]  # fmt: skip
            response = http.post(path, json={**own, **body})
            assert response.status_code == 400
            assert response.json()["error"]["message"].startswith(told), response.text

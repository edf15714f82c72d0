# ruff: noqa: E402 (what is imported below needs the extra)
"""Schemas and forced calls by OpenAI's own client and Anthropic's bodies: answers of random models parse."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

for _module in ("fastapi", "sse_starlette", "uvicorn", "llguidance"):
    pytest.importorskip(_module, reason="needs qgraft[serve]")
openai = pytest.importorskip("openai")

from pydantic import BaseModel, ConfigDict, Field
from served import ALL, HELLO, Running
from talkers import MISTRAL_TEMPLATE

from qgraft.serving.prompting import Prompting
from qgraft.serving.sampling import Sampler, Token

ORIGINALS = Path(__file__).parents[1] / "data/originals"
TEMPLATES = ("qwen2_5", "qwen3", "llama3_1", "mistral")


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")
    mood: Literal["good", "bad"]
    score: Annotated[int, Field(ge=0, le=9)]
    more: Annotated[list[bool], Field(max_length=2)]


class Move(BaseModel):
    """Go somewhere."""

    model_config = ConfigDict(extra="forbid")
    to: Literal["north", "south"]
    steps: Annotated[int, Field(ge=1, le=9)]


class Look(BaseModel):
    """Look around."""

    model_config = ConfigDict(extra="forbid")
    at: Literal["sky", "floor"]


KINDS: dict[str, type[BaseModel]] = {"Move": Move, "Look": Look}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": kind.__doc__, "parameters": kind.model_json_schema()},
    }
    for name, kind in KINDS.items()
]
NAMED = {"type": "function", "function": {"name": "Look"}}


@pytest.fixture
def client(running: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=ALL, max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture
def blanks(running: Running) -> dict[str, int]:
    """Few of them: a model without a mind writes as many as it may."""
    return {str(token): -8 for token in running.tokenizer("\t\n\r ", add_special_tokens=False)["input_ids"]}


@pytest.fixture
def prompted(running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Prompts by another template, and room for what it writes of tools."""
    monkeypatch.setattr(running.service.engine, "context", None)
    (tmp_path / "mistral.jinja").write_text(MISTRAL_TEMPLATE)

    def by(name: str) -> None:
        path = (tmp_path if name == "mistral" else ORIGINALS) / f"{name}.jinja"
        monkeypatch.setattr(running.service.prompter, "prompting", Prompting(template=str(path)))

    return by


def test_answers_parse_as_the_model_that_was_asked_for(running: Running, client: Any, blanks: Any) -> None:
    options: Any = {"messages": HELLO, "response_format": Reply, "max_tokens": 90, "logit_bias": blanks}
    found = set()
    for seed, model in enumerate(("base", "law", "law=0.7+med=0.3")):
        whole = client.chat.completions.parse(model=model, seed=seed, temperature=1.5, n=2, **options)
        for choice in whole.choices:
            assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Reply)
            found.add(choice.message.content)
    assert len(found) > 2
    with client.chat.completions.stream(model="law", seed=1, temperature=1, **options) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message
    assert isinstance(final.parsed, Reply) and "".join(pieces) == final.content and len(pieces) > 5
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="base", **{**options, "max_tokens": 5})


def test_json_objects(client: Any, blanks: Any) -> None:
    answers = [
        client.chat.completions.create(model="base", messages=HELLO, seed=seed, max_tokens=60, logit_bias=blanks,
                                       response_format={"type": "json_object"}).choices[0]
        for seed in range(8)
    ]  # fmt: skip
    ended = [each.message.content for each in answers if each.finish_reason == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)
    assert all(each.message.content.lstrip()[:1] in ("{", "") for each in answers)


@pytest.mark.parametrize("template", TEMPLATES)
def test_forced_calls(client: Any, blanks: Any, prompted: Any, template: str) -> None:
    prompted(template)
    options: Any = {"model": "law", "messages": HELLO, "tools": TOOLS, "max_tokens": 400, "logit_bias": blanks}
    names = set()
    for seed, choice in enumerate(("required", "required", "required", NAMED, NAMED)):
        answer = client.chat.completions.create(**options, tool_choice=choice, seed=seed, temperature=1.5).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        assert choice == "required" or len(answer.message.tool_calls) == 1
        for call in answer.message.tool_calls:
            KINDS[call.function.name].model_validate_json(call.function.arguments)
            assert choice == "required" or call.function.name == "Look"
            names.add(call.function.name)
    assert names == {"Move", "Look"}
    one = client.chat.completions.create(
        **options, tool_choice="required", parallel_tool_calls=False, stream=True, seed=3
    )
    deltas = [chunk.choices[0] for chunk in one]
    (call,) = [call for each in deltas for call in each.delta.tool_calls or ()]
    KINDS[call.function.name].model_validate_json(call.function.arguments)
    assert deltas[-1].finish_reason == "tool_calls" and not any(each.delta.content for each in deltas)
    cut = client.chat.completions.create(**{**options, "max_tokens": 8}, tool_choice="required").choices[0]
    assert cut.finish_reason == "length" and not cut.message.tool_calls


@pytest.mark.parametrize("template", TEMPLATES)
def test_strict_tools_are_called_rightly_where_they_are_called(
    client: Any, blanks: Any, prompted: Any, template: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that says something, and then begins a call that only a random one goes on with."""
    prompted(template)
    begun = {"llama3_1": '{"', "mistral": "Now: [TOOL_CALLS]"}.get(template, "Now: <tool_call>")
    script, draw = running.tokenizer(begun, add_special_tokens=False)["input_ids"], Sampler.draw

    def take(self: Any, logits: Any, allowed: Any = None) -> Any:
        if said:
            assert allowed is None or allowed[said[0]]
            return Token(said.pop(0))
        return draw(self, logits, allowed)

    monkeypatch.setattr(Sampler, "draw", take)
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    options: Any = {
        "model": "law",
        "messages": HELLO,
        "max_tokens": 150,
        "logit_bias": blanks,
        "parallel_tool_calls": False,
    }
    names = set()
    for seed in range(12):
        said = list(script)
        answer = client.chat.completions.create(**options, tools=strict, seed=seed, temperature=2).choices[0]
        (call,) = answer.message.tool_calls
        KINDS[call.function.name].model_validate_json(call.function.arguments)
        names.add(call.function.name)
        assert answer.finish_reason == "tool_calls"
        assert (answer.message.content or "").strip() == ("" if template == "llama3_1" else "Now:")
    assert names == {"Move", "Look"}
    said = []
    free = [client.chat.completions.create(**options, tools=strict, seed=seed).choices[0].message for seed in range(4)]
    assert any(message.content for message in free)
    said = list(script)
    wild = client.chat.completions.create(**options, tools=TOOLS, seed=1).choices[0].message
    assert not wild.tool_calls  # what is not strict is what the model writes


def test_a_schema_beside_tools_is_one_or_the_other(client: Any, blanks: Any, prompted: Any) -> None:
    prompted("qwen3")
    form = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "integer", "minimum": 0, "maximum": 9}},
    }
    seen = set()
    for seed in range(12):
        answer = client.chat.completions.create(
            model="base", messages=HELLO, tools=TOOLS, response_format=form, max_tokens=400, seed=seed, temperature=2,
            logit_bias=blanks,
        ).choices[0]  # fmt: skip
        for call in answer.message.tool_calls or ():
            KINDS[call.function.name].model_validate_json(call.function.arguments)
        assert answer.message.tool_calls or 0 <= int(answer.message.content) <= 9
        seen.add(answer.finish_reason)
    assert seen == {"stop", "tool_calls"}


def test_behind_reasoning_that_the_prompt_begins(
    client: Any, blanks: Any, prompted: Any, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R1's template ends prompts in <think>: what comes before </think> is free, what comes after it is not."""
    prompted("r1_distill")
    thoughts, draw = running.tokenizer("{Hm}</think>", add_special_tokens=False)["input_ids"], Sampler.draw

    def take(self: Any, logits: Any, allowed: Any = None) -> Any:
        if thoughts:
            assert allowed[thoughts[0]]
            return Token(thoughts.pop(0))
        return draw(self, logits, allowed)

    monkeypatch.setattr(Sampler, "draw", take)
    message = client.chat.completions.parse(
        model="base", messages=HELLO, response_format=Reply, max_tokens=150, logit_bias=blanks, seed=1
    ).choices[0].message  # fmt: skip
    assert isinstance(message.parsed, Reply) and message.reasoning_content == "{Hm}"


def test_the_responses_api(client: Any, blanks: Any, prompted: Any) -> None:
    prompted("qwen3")
    parsed = client.responses.parse(model="law", input=HELLO, text_format=Reply, max_output_tokens=600, temperature=0)
    assert parsed.status == "completed" and isinstance(parsed.output_parsed, Reply)
    assert parsed.text.format.type == "json_schema" and parsed.text.format.schema_ == Reply.model_json_schema()
    tools = [{"type": "function", "strict": True, **tool["function"]} for tool in TOOLS]
    for choice, told in (("required", "required"), ({"type": "function", "name": "Look"}, None)):
        answer = client.responses.create(
            model="law", input=HELLO, tools=tools, tool_choice=choice, max_output_tokens=900, temperature=0
        )
        calls = [item for item in answer.output if item.type == "function_call"]
        assert calls and answer.status == "completed"
        for call in calls:
            KINDS[call.name].model_validate_json(call.arguments)
            assert told or call.name == "Look"
        assert told is None or answer.tool_choice == told


def test_anthropics_messages(running: Running, prompted: Any) -> None:
    prompted("qwen3")
    tools = [
        {"name": name, "description": kind.__doc__, "input_schema": kind.model_json_schema()}
        for name, kind in KINDS.items()
    ]
    body = {"model": "law", "max_tokens": 900, "messages": HELLO, "tools": tools, "temperature": 0}
    with running.client() as client:
        for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "Move"}):
            answer = client.post("/v1/messages", json={**body, "tool_choice": choice}).json()
            (use,) = answer["content"]
            KINDS[use["name"]].model_validate(use["input"])
            assert answer["stop_reason"] == "tool_use" and use["name"] == choice.get("name", use["name"])
        for choice in ({"type": "tool", "name": "x"}, {"type": "tool"}, {"type": "all"}):
            response = client.post("/v1/messages", json={**body, "tool_choice": choice})
            assert response.status_code == 400 and "tool_choice" in response.text


def test_what_cannot_be_kept_says_why(client: Any, running: Running, prompted: Any) -> None:
    def schema(of: Any) -> Any:
        return {"type": "json_schema", "json_schema": {"name": "n", "schema": of}}

    def must_call(parameters: Any) -> Any:
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        return {"tools": [tool], "tool_choice": "required"}

    prompted("qwen3")
    for options, param, reason in (
        ({"response_format": schema({"type": "array", "uniqueItems": True})}, "response_format", "uniqueItems"),
        (must_call({"type": "array"}), "tools", "the schema of an object"),
        (must_call({"properties": {"a": {"not": {}}}}), "tools", "not"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason) as refused:
            client.chat.completions.create(model="base", messages=HELLO, **options)
        assert refused.value.param == param and refused.value.code == "invalid_value"

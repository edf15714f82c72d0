"""Keys of a message: each has its effect, drops the row with a reason, or is named."""

import math
import re

import pytest

from qgraft.data.messages import Call, Message
from qgraft.data.reading import read_dataset
from qgraft.errors import DataError

USER = {"role": "user", "content": "q"}
FUNCTION = {"name": "look", "arguments": '{"at": "Paris"}'}
LOOK = Call("look", '{"at": "Paris"}')
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def answer(**keys):
    """The last message of a row whose answer has these keys."""
    (conversation,), _ = read_dataset([{"messages": [USER, {"role": "assistant", "content": "a", **keys}]}])
    return conversation.messages[-1]


def reason(messages, **keys):
    good = {"instruction": "q", "output": "a"}
    _, accounting = read_dataset([{"messages": messages, **keys}, good])
    assert accounting.kept == 1
    return next(iter(accounting.dropped))


@pytest.mark.parametrize(
    ("keys", "weight"),
    [({}, 1), ({"weight": 0}, 0), ({"weight": 1}, 1), ({"weight": 0.25}, 0.25), ({"weight": 3}, 3), ({"weight": None}, 1),
     ({"weight": True}, 1), ({"weight": False}, 0), ({"train": False}, 0), ({"train": True}, 1),
     ({"loss": False}, 0), ({"loss": 0}, 0), ({"trainable": False}, 0), ({"trainable": None}, 1), ({"loss": 1.0}, 1),
     ({"train": False, "weight": 2}, 0), ({"train": True, "weight": 2}, 2)],
)  # fmt: skip
def test_what_an_answer_weighs(keys, weight):
    assert answer(**keys).weight == weight


@pytest.mark.parametrize(
    ("keys", "why"),
    [({"weight": -1}, "weight is '-1'"), ({"weight": "0"}, "weight is '0'"), ({"weight": math.inf}, "weight is 'inf'"),
     ({"weight": math.nan}, "weight is 'nan'"), ({"weight": 1e39}, r"expected a number from 0 to 1,000,000"),
     ({"train": "no"}, "train is 'no', expected true or false"), ({"loss": 0.5}, "loss is '0.5'"),
     ({"trainable": [0]}, r"trainable is '\[0\]'"), ({"weight": {}}, "weight is '{}'"),
     ({"reasoning_content": ["t"]}, "reasoning_content is a list"), ({"tool_calls": 3}, "tool_calls is a int, not a list"),
     ({"tool_calls": "nope"}, "tool_calls: not JSON"), ({"tool_calls": [{"function": {}}]}, "a tool call has no name"),
     ({"tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments of a tool call: not JSON"),
     ({"tool_calls": [{"name": "f", "arguments": [1]}]}, "arguments of a tool call are a list, not an object"),
     ({"tool_calls": [{"name": "f", "arguments": {"x": object()}}]}, "cannot be written as JSON"),
     ({"tools": [3]}, "a tool is a int, not an object"), ({"tools": [{"type": "function"}]}, "a tool has no name")],
)  # fmt: skip
def test_what_cannot_be_meant_drops_the_row(keys, why):
    assert re.search(why, reason([USER, {"role": "assistant", "content": "a", **keys}]))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_by_any_of_its_names(key):
    assert answer(**{key: " t "}) == Message("assistant", "a", reasoning=" t ")
    assert answer(**{key: ""}) == answer(**{key: None}) == Message("assistant", "a")


@pytest.mark.parametrize(
    "keys",
    [{"tool_calls": [{"type": "function", "function": FUNCTION}]}, {"tool_calls": [FUNCTION]}, {"function_call": FUNCTION},
     {"tool_calls": [{"function": {**FUNCTION, "arguments": {"at": "Paris"}}}]},
     {"tool_calls": '[{"name": "look", "arguments": {"at": "Paris"}}]'}],
)  # fmt: skip
@pytest.mark.parametrize("content", ["a", "", None])
def test_calls_in_every_form(keys, content):
    assert answer(**keys, content=content) == Message("assistant", content or "", calls=(LOOK,))


def test_calls_as_chat_templates_read_them():
    assert Call("f", '{"x": null}', "1").as_dict() == {
        "id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": None}}}  # fmt: skip
    assert Call("f").as_dict(as_text=True) == {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    (message,) = [answer(tool_calls=[{"id": "c1", "function": {"name": "f", "arguments": ""}}])]
    assert message.calls == (Call("f", "{}", "c1"),)


@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython"])
def test_results_of_tools_by_any_role(role):
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [FUNCTION]},
            {"role": role, "content": [{"type": "text", "text": "12"}, {"type": "text", "text": " C"}],
             "tool_call_id": "c1", "name": "look"}, {"role": "assistant", "content": "b"}]  # fmt: skip
    (conversation,), accounting = read_dataset([{"messages": chat}])
    assert conversation.messages[2] == Message("tool", "12 C", call_id="c1", name="look")
    assert accounting.ignored == {}


@pytest.mark.parametrize(
    ("written", "expected"),
    [('{"name": "look", "arguments": {"at": "Paris"}}', Message("assistant", calls=(LOOK,))),
     ('[{"name": "look", "arguments": {"at": "Paris"}}, {"name": "f"}]', Message("assistant", calls=(LOOK, Call("f")))),
     ("Action: look", Message("assistant", "Action: look")), ("{}", Message("assistant", "{}"))],
)  # fmt: skip
def test_sharegpt_calls(written, expected):
    turns = [("human", "q"), ("function_call", written), ("observation", "12"), ("gpt", "b")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns],
           "tools": '[{"name": "look", "parameters": {}}]'}  # fmt: skip
    (conversation,), _ = read_dataset([row])
    assert conversation.messages[1] == expected
    assert conversation.tools == (TOOL,)


@pytest.mark.parametrize("where", ["tools", "functions"])
@pytest.mark.parametrize("tools", [[TOOL], TOOL, [{"name": "look", "parameters": {}}], '[{"name": "look", "parameters": {}}]',
                                   ['{"name": "look", "parameters": {}}']])  # fmt: skip
def test_tools_of_the_row_or_of_a_message(where, tools):
    chat = [USER, {"role": "assistant", "content": "a"}]
    for row in ({"messages": chat, where: tools},
                {"messages": [{"role": "system", "content": "s", where: tools}, *chat]},
                {"instruction": "q", "output": "a", where: tools}):  # fmt: skip
        (conversation,), accounting = read_dataset([row])
        assert conversation.tools == (TOOL,) and accounting.ignored == {}
    for nothing in (None, "", [], "[]", math.nan):
        (conversation,), _ = read_dataset([{"messages": chat, where: nothing}])
        assert conversation.tools == ()


def test_keys_without_effect_are_named_once_with_their_number():
    chat = [{**USER, "weight": 1, "train": False}, {"role": "assistant", "content": "a", "score": 5}]
    rows = [{"messages": chat, "id": n} for n in range(3)]
    _, accounting = read_dataset(
        [*rows, {"prompt": "q", "response": "a", "answer": "unread", "source": "", "tags": []}]
    )
    assert accounting.ignored == {"id": 3, "messages[].weight": 3, "messages[].score": 3, "answer": 1}
    (said,) = accounting.said()
    assert said.startswith("keys of rows that have no effect: ") and "id (3)" in said
    _, accounting = read_dataset([{**rows[0], f"key{n}": 1} for n in range(90)])
    assert len(accounting.ignored) == 50


def test_columns_that_somebody_named_are_no_unknown_keys():
    row = {"ask": "q", "say": "a", "input": "not named", "tools": [TOOL]}
    (conversation,), accounting = read_dataset([row], columns={"prompt": "ask", "response": "say"})
    assert conversation.tools == () and accounting.ignored == {"input": 1, "tools": 1}
    (conversation,), accounting = read_dataset([row], columns={"prompt": "ask", "response": "say", "tools": "tools"})
    assert conversation.tools == (TOOL,) and accounting.ignored == {"input": 1}


def test_placeholders_in_reasoning_are_filled():
    row = {"messages": [USER, {"role": "assistant", "content": "{{name}}", "thinking": "I am {{name}}"}]}
    (conversation,), _ = read_dataset([row], name="Ada")
    assert conversation.messages[-1] == Message("assistant", "Ada", reasoning="I am Ada")
    with pytest.raises(DataError, match="nothing is given"):
        read_dataset([row])


def test_other_tools_in_another_place_are_refused():
    other = {**TOOL, "function": {"name": "other"}}
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in ({"messages": [{"role": "system", "content": "s", "tools": [TOOL]}, *chat], "tools": [other]},
                {"messages": [{**chat[0], "tools": [TOOL]}, {**chat[1], "tools": [other]}]}):  # fmt: skip
        with pytest.raises(DataError, match="names other tools in one place than in another"):
            read_dataset([row])

# ruff: noqa: E402 (what is imported below needs the extra)
"""Whatever a model would say, its answer is of the form: random models, judged by pydantic and by json."""

import json
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

pytest.importorskip("llguidance", reason="needs qgraft[serve]")
pydantic = pytest.importorskip("pydantic")

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from talkers import MIXES

import qgraft
from qgraft.errors import OptionError
from qgraft.models.chatglm2_tokenizer import ChatGLM2Tokenizer
from qgraft.models.chatglm_tokenizer import ChatGLMTokenizer
from qgraft.serving import grammars
from qgraft.serving.engine import Engine, answer_all
from qgraft.serving.grammars import CallText, Form, Grammars
from qgraft.serving.requests import BusyError, Request
from qgraft.serving.sampling import Sampling

Maker = Callable[..., Any]


class Exact(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Colour(StrEnum):
    RED = "red"
    GREEN = "grün"


class Place(Exact):
    city: Annotated[str, Field(max_length=6)]
    number: Annotated[int, Field(ge=-5, le=120)]


class Trip(Exact):
    stops: Annotated[list[Place], Field(min_length=1, max_length=2)]
    mode: Literal["rail", "air"] | None


class Tree(Exact):
    value: bool
    left: "Tree | None"


SMALL = Annotated[int, Field(ge=0, le=99)]
TYPES = (
    Place, Trip, Colour, bool, SMALL, Annotated[list[SMALL], Field(max_length=3)], tuple[bool, Colour], Place | bool | None,
    Annotated[str, Field(pattern=r"^[a-c]{2}-\d{3}$")], Annotated[list[Place | bool], Field(max_length=2)],
    Literal["a", 1, None], Annotated[str, Field(json_schema_extra={"format": "date"}, max_length=20)],
)  # fmt: skip


def valid(kind: Any, text: str) -> Any:
    return TypeAdapter(kind).validate_json(text)


@pytest.fixture
def engine(talker: Any) -> Any:
    engine = Engine(*talker)
    yield engine
    engine.stop()


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_answers_of_a_random_model_are_of_their_schema(engine: Engine, kind: Any) -> None:
    """With every mix of adapters, greedy and hot, beside one another and beside an answer that may be anything."""
    grammar = engine.grammars.compile(Form(TypeAdapter(kind).json_schema()))
    blanks = dict.fromkeys(engine.tokenizer("\t\n\r ", add_special_tokens=False)["input_ids"], -6.0)  # or nothing else
    how = [Sampling(logit_bias=blanks, **options) for options in ({"temperature": 0, "repetition_penalty": 1.5}, {},
                                                                  {"temperature": 2, "top_p": 0.9})]  # fmt: skip
    requests = [
        Request((5, 6 + n), mix, replace(how[n % 3], seed=n), max_tokens=100, grammar=grammar)
        for n, mix in enumerate(MIXES)
    ]
    free = Request((5, 6), sampling=Sampling(temperature=0), max_tokens=30)
    *answers, other = answer_all(engine, [*requests, free])
    assert other["tokens"] == answer_all(engine, [free])[0]["tokens"]
    ended = [each["text"] for each in answers if each["finish"].reason == "stop"]
    assert [each["finish"].error for each in answers] == [None] * len(answers) and len(ended) >= 5
    for text in ended:
        valid(kind, text)
    assert len({repr(valid(kind, text)) for text in ended}) > 1


def test_a_type_that_contains_itself_and_what_max_tokens_cuts(engine: Engine) -> None:
    grammar = engine.grammars.compile(Form(Tree.model_json_schema()))
    whole, cut = answer_all(engine, [
        Request((5,), sampling=Sampling(seed=4), max_tokens=n, grammar=grammar, ignore_ends=True) for n in (250, 6)
    ])  # fmt: skip
    assert valid(Tree, whole["text"]) and whole["finish"].reason == "stop"
    assert (cut["finish"].reason, len(cut["tokens"])) == ("length", 6) and whole["text"].startswith(cut["text"])


TEXT = st.text(st.characters(exclude_characters="\x7f", exclude_categories=["Cs"]), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def loaded(tiny_gguf: Maker) -> tuple[Any, Any]:
    tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")[1]
    return tokenizer, Grammars(tokenizer, len(tokenizer) + 10, [0, 2])


def taken(loaded: tuple[Any, Any], form: Form, text: str) -> Any:
    """What follows after the text; None where the form has no such text."""
    tokenizer, grammars = loaded
    matching = grammars.compile(form).begin()
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not matching.allowed()[token]:
            return None
        matching.take(token)
    return matching


@settings(max_examples=25, deadline=None)
@given(value=st.dictionaries(TEXT, VALUES, max_size=4), indent=st.sampled_from([None, 1, 2]))
def test_any_object_may_be_an_answer(loaded: tuple[Any, Any], value: dict[str, object], indent: int | None) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    matching = taken(loaded, Form({"type": "object"}), text)
    assert matching is not None and matching.complete
    end = matching.allowed()[: len(loaded[0])].nonzero()[:, 0].tolist()
    assert end == [0, 2]  # both end tokens, and nothing else
    assert taken(loaded, Form({"type": "object"}), text[:-1] + ",}") is None


def test_what_no_answer_may_be(loaded: tuple[Any, Any]) -> None:
    for text in (
        "[",
        "x",
        '{"a"}',
        "{,",
        '{"a":01',
        '{"a":tru}',
        '{"a":1,}',
        '{"a":"\n',
        "{" + " " * 30,
        " " * 30 + "{",
    ):
        assert taken(loaded, Form({"type": "object"}), text) is None, text
    assert taken(loaded, Form({"type": "object"}), '{"a" :  1,\n  "b":[]').complete is False


def test_behind_reasoning_whose_end_is_text_or_a_token(loaded: tuple[Any, Any]) -> None:
    form = Form({"enum": [7]}, behind="</think>")
    for text, complete in (
        ("Hm <", False),
        ("[[</thin</think>", False),
        ("x</think>\n\n7", True),
        ("</think> 7", True),
    ):
        assert taken(loaded, form, text).complete is complete, text
    assert taken(loaded, form, "7</think>8") is None and not taken(loaded, form, "x").allowed()[2]
    special = replace(form, behind="<|im_start|>")
    assert taken(loaded, special, "Hm <|im_start|>\n7").complete and not taken(loaded, special, "7").complete


def test_calls_are_written_letter_for_letter(loaded: tuple[Any, Any]) -> None:
    calls = tuple(CallText(f'<|im_start|> "{name}" ', {"enum": [{}]}, "</end>") for name in ("a\\b", "c"))
    form = Form(calls=calls, several=True)
    one, two = '<|im_start|> "a\\b" {}</end>', '<|im_start|> "c" { }</end>'
    assert taken(loaded, form, one + "\n" + two + one) is not None and not taken(loaded, form, one).complete
    assert taken(loaded, replace(form, several=False), one).complete
    assert (
        taken(loaded, replace(form, several=False), one + two) is None and taken(loaded, form, one[:-1] + "x") is None
    )
    either = replace(form, schema={"type": "integer"}, several=False)
    assert taken(loaded, either, "12") is not None and taken(loaded, either, two).complete
    assert taken(loaded, either, "1" + two) is None


@pytest.mark.parametrize(
    "schema,reason",
    [
        ({"type": "zzz"}, "expected string, number"), ({"not": {}}, "not"), ({"enum": []}, "a list of values"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "http://x/y"}, "http://x/y"), ({"type": "string", "format": "zzz"}, "zzz"), ({"enum": [float("nan")]}, ""),
        ({"enum": list(range(40000))}, "expected at most 262144"), ({"$ref": "#"}, "asks for itself"),
        ({"type": "object", "properties": {str(n): {"type": "integer"} for n in range(3000)}}, "Current row has"),
        ({"const": 0.1 + 0.2}, "15 digits"), ({"type": "integer", "minimum": -(2**63)}, "15 digits"),
        ({"enum": [[{"a": 2**53}]]}, "15 digits"), ({"const": 10**400}, "15 digits"),
        ({"uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_with_its_reason(loaded: tuple[Any, Any], schema: Any, reason: str) -> None:
    with pytest.raises(OptionError, match=r"schema.*: .+") as refused:
        loaded[1].compile(Form(schema))
    assert reason in refused.value.message and len(refused.value.message) < 400 and "%json" not in refused.value.message


def test_a_form_that_cannot_be_followed_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found out only while it is followed: here a schema that is its own, as nothing has looked at it before."""
    monkeypatch.setattr(Grammars, "_problem", lambda self, schemas: None)
    monkeypatch.setattr(grammars, "settled", lambda schema, where: schema)
    grammar = engine.grammars.compile(Form({"$ref": "#"}))
    free = Request((5, 6), sampling=Sampling(temperature=0), max_tokens=30)
    failed, other = answer_all(engine, [replace(free, grammar=grammar), free])
    error = failed["finish"].error
    assert isinstance(error, OptionError) and "refused: " in error.message and len(error.message) < 400
    assert other["finish"].error is None and other["tokens"] == answer_all(engine, [free])[0]["tokens"]


@pytest.mark.parametrize(
    "schema,reason",
    [
        ({"$ref": "#/$defs/d0",
          "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(4900)} | {"d4900": {}}}, "stack"),
        ({"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvwxyz"]}, "longer"),
    ],
    ids=["deep", "long"],
)  # fmt: skip
def test_what_would_end_the_process_or_hold_it_up_is_refused(
    loaded: tuple[Any, Any], schema: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "CHECK_SECONDS", 2.0)
    with pytest.raises(OptionError, match=reason):
        loaded[1].compile(Form(schema))


def test_numbers_are_kept_to_their_last_digit(loaded: tuple[Any, Any]) -> None:
    for number in (0.1, -2.5e-7, 123456789012345, 9007199254740991, -9007199254740991, 1e-5, 99.99, 1e14):
        for other in (number, number * 2):
            text = format(Decimal(repr(other)), "f").removesuffix(".0")
            matching = taken(loaded, Form({"enum": [number, None]}), text)
            assert (matching is not None and bool(matching.allowed()[2])) is (number == other), text


def test_who_waits_too_long_for_a_schema_to_be_read_is_told(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "PATIENCE", 0.05)
    for _ in range(grammars.CHECKS):
        assert loaded[1]._checks.acquire(timeout=1)
    with pytest.raises(BusyError):
        loaded[1].compile(Form({"enum": ["another"]}))
    for _ in range(grammars.CHECKS):
        loaded[1]._checks.release()
    monkeypatch.undo()
    assert loaded[1].compile(Form({"enum": ["another"]}))


def test_what_was_not_read_in_time_is_read_again(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy says nothing of a schema."""
    monkeypatch.setattr(grammars, "PATIENCE", 0.01)
    with pytest.raises(BusyError, match=r"in 0\.01 seconds"):
        loaded[1].compile(Form({"enum": ["slow machine"]}))
    monkeypatch.undo()
    assert loaded[1].compile(Form({"enum": ["slow machine"]}))


def test_a_text_that_is_a_token_of_its_own_is_refused_before_anything_is_written(loaded: tuple[Any, Any]) -> None:
    special = next(iter(loaded[1]._special))
    escaped = "".join("\\" + c if c in "|<>[]" else c for c in special)
    for schema in ({"const": special}, {"properties": {"a": {"enum": ["x", f"y{special}"]}}}, {"required": [special]},
                   {"properties": {special: {}}}, {"type": "string", "pattern": f"^{escaped}x$"}):  # fmt: skip
        with pytest.raises(OptionError, match="is a token of this model"):
            loaded[1].compile(Form(schema))


def test_keys_of_any_name_are_not_counted(loaded: tuple[Any, Any]) -> None:
    """One that is written twice would count twice."""
    least = {"type": "object", "minProperties": 2}
    for more in ({}, {"patternProperties": {"^a$": {}}, "additionalProperties": False}, {"required": ["a"]}):
        with pytest.raises(OptionError, match="minProperties is kept where"):
            loaded[1].compile(Form({"items": {**least, **more}}))
    named = {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    assert loaded[1].compile(Form({**least, **named, "required": ["a", "b"]}))


def test_a_grammar_is_made_once(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form({"enum": ["once"]})
    grammar = loaded[1].compile(form)
    monkeypatch.setattr(Grammars, "_problem", lambda self, schemas: 1 / 0)
    assert loaded[1].compile(form) is grammar


def test_a_schema_deep_as_python_goes_is_refused(loaded: tuple[Any, Any]) -> None:
    for depth in (400, 5000):
        deep: dict[str, Any] = {"type": "integer"}
        for _ in range(depth):
            deep = {"type": "array", "items": deep}
        with pytest.raises(OptionError, match="refused"):
            loaded[1].compile(Form(deep))


@pytest.mark.parametrize(
    "kind,file", [(ChatGLMTokenizer, "ice_text.model"), (ChatGLM2Tokenizer, "tokenizer.model")], ids=["first", "second"]
)
def test_sentencepiece_files_are_followed_by_their_pieces(kind: Any, file: str, tiny_vocabulary: Any) -> None:
    """What decodes to JSON is what is let through, in blanks of all kinds, Chinese and bytes."""
    tokenizer = kind(vocab_file=tiny_vocabulary(file))
    end = tokenizer.eos_token_id
    loaded = tokenizer, Grammars(tokenizer, len(tokenizer) + 20, [end])
    for value in ({"你": "好    a\\", "n": [1.5, None]}, {"text": "Grüße, 世界 . !"}, {"": "\U0001f600 𝄞"}):
        text = json.dumps(value, ensure_ascii=False, indent=3)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(json.loads(decoded), dict)
        matching = loaded[1].compile(Form({"type": "object"})).begin()
        for token in ids:
            assert matching.allowed()[token], (decoded, tokenizer.convert_ids_to_tokens(token))
            matching.take(token)
        assert matching.complete and matching.allowed()[: len(tokenizer)].nonzero()[:, 0].tolist() == [end]
    allowed = loaded[1].compile(Form({"type": "object"})).begin().allowed()[: len(tokenizer)]
    texts = {tokenizer.decode([token], clean_up_tokenization_spaces=False).strip() for token in allowed.nonzero()[:, 0]}
    assert texts <= {"", "{"}


def test_chatglm_answers_in_a_form(tiny_chatglm: Callable[[str], Path]) -> None:
    for generation in ("chatglm", "chatglm2"):
        model, tokenizer = qgraft.load(str(tiny_chatglm(generation)), device="cpu")
        engine = Engine(model, tokenizer)
        grammar = engine.grammars.compile(Form({"enum": ["你 好, a", {"n": [1, 2]}]}))
        prompt = tuple(tokenizer.prompt_ids([("user", "你好")]))
        requests = [
            Request(prompt, sampling=Sampling(seed=n, temperature=9), max_tokens=80, grammar=grammar) for n in range(8)
        ]
        answers = answer_all(engine, requests)
        assert {str(json.loads(each["text"])) for each in answers} == {"你 好, a", "{'n': [1, 2]}"}
        assert {each["finish"].reason for each in answers} == {"stop"}
        engine.stop()


@pytest.mark.parametrize("mark", ["<tool_call>", "<|im_start|>"], ids=["text", "token"])
def test_text_may_come_before_calls_that_need_not_come(loaded: tuple[Any, Any], mark: str) -> None:
    """But a call that has begun is one, and behind the last of them text may follow."""
    calls = (CallText(f'{mark}\n"a" ', {"enum": [{}]}, "</end>"), CallText(f'{mark}\n"b" ', {"enum": [7]}, "</end>"))
    form = Form(calls=calls, several=True, optional=True, mark=mark)
    a, b = f'{mark}\n"a" {{}}</end>', f'{mark}\n"b" 7</end>'
    end = loaded[0]("<|im_end|>")["input_ids"][0]
    for text, may_end in (("", True), ("Hi <tool {", True), (f"Hi {mark}", False), (f"Hi {a}", True),
                          (a + b + "\nOK. <", True),
                          (f"{a} and {mark}\n", False)):  # fmt: skip
        assert bool(taken(loaded, form, text).allowed()[end]) is may_end, text
    for text in (f"Hi {mark}x", f'Hi {mark}\n"c"', a + mark + "!", f'{mark}\n"b" 8'):
        assert taken(loaded, form, text) is None, text
    one = replace(form, several=False)
    assert taken(loaded, one, "Hi " + b).complete and taken(loaded, one, "Hi. <t") is not None
    assert taken(loaded, one, f"Hi {a}x") is None and taken(loaded, one, a + b) is None


def test_text_with_reasoning_in_tokens_and_calls_without_a_mark(loaded: tuple[Any, Any]) -> None:
    call = CallText('{"name": "a", "arguments": ', {"enum": [{}]}, "}")
    thinks = Form(calls=(CallText("<c>", {"enum": [{}]}, ""),), optional=True, mark="<c>", free=("<|im_start|>",))
    assert (
        taken(loaded, thinks, "<|im_start|>Hm<|im_start|> So <c>{}").complete
        and taken(loaded, thinks, "Hm<c>x") is None
    )
    assert taken(loaded, replace(thinks, free=()), "<|im_start|>") is None
    bare = Form(calls=(call,), optional=True)
    for text, complete in (
        ("It is {x}", False),
        ("\n 7", False),
        ('{"name": "a", "arguments": {}}', True),
        ("", False),
    ):
        assert taken(loaded, bare, text).complete is complete, text
    assert taken(loaded, bare, '{"x"') is None and taken(loaded, bare, "[") is None


def test_a_form_outlives_a_place_that_was_lost(talker: Any) -> None:
    """Where memory runs out the latest request starts again from its ids, in the middle of its form."""
    engine = Engine(*talker, cache_tokens=128, max_batch=8)
    kind = Annotated[list[SMALL], Field(min_length=8, max_length=8)]
    grammar = engine.grammars.compile(Form(TypeAdapter(kind).json_schema()))
    requests = [Request((5, 6 + n), sampling=Sampling(seed=n), max_tokens=100, grammar=grammar) for n in range(8)]
    passes, sent_back = engine.passes.release, 0

    def release(running: Any) -> None:
        nonlocal sent_back
        sent_back += not running.finished and running.answered > 0
        passes(running)

    engine.passes.release = release
    answers = answer_all(engine, requests)
    assert sent_back > 3
    for answer in answers:
        assert answer["finish"].error is None
        assert answer["finish"].reason == "length" or valid(kind, answer["text"])
    assert sum(answer["finish"].reason == "stop" for answer in answers) > 3
    engine.stop()

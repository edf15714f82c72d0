"""Schemas of requests: what is wrong is named with its place, what is harmless is let through, what never ends is refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraft.errors import OptionError
from qgraft.serving.fields import SHOWN, shown
from qgraft.serving.schemas import settled

TREE = {"$defs": {"T": {"type": "object", "required": ["l"], "properties": {
    "l": {"anyOf": [{"$ref": "#/$defs/T"}, {"type": "null"}]}}}}, "$ref": "#/$defs/T"}  # fmt: skip


WRONG: list[tuple[Any, str]] = [
    (5, "S: got 5, expected a schema"), ({"type": "zzz"}, 'S.type: got "zzz", expected string, number'),
    ({"properties": {"a": {"maxLength": "3"}}}, 'S.properties.a.maxLength: got "3", expected a whole number from 0'),
    ({"items": {"minItems": -1}}, "S.items.minItems: got -1"), ({"maxLength": 3.5}, "S.maxLength: got 3.5"),
    ({"maxLength": True}, "S.maxLength: got true"), ({"uniqueItems": "no"}, 'S.uniqueItems: got "no", expected true or'),
    ({"anyOf": [{}, {"required": "a"}]}, 'S.anyOf[1].required: got "a", expected a list of keys'),
    ({"anyOf": []}, "S.anyOf: got [], expected a list of schemas"), ({"enum": 5}, "S.enum: got 5, expected a list"),
    ({"minimum": "1"}, 'S.minimum: got "1", expected a finite number'), ({"multipleOf": 0}, "S.multipleOf: got 0"),
    ({"$defs": {"x": {"properties": []}}}, "S.$defs.x.properties: got [], expected an object of schemas"),
    ({"$ref": 5}, "S.$ref: got 5, expected a text"), ({"additionalProperties": 5}, "S.additionalProperties: got 5"),
    ({"type": ["string", "nul"]}, 'S.type: got ["string", "nul"]'), ({"exclusiveMinimum": "x"}, "S.exclusiveMinimum"),
]  # fmt: skip


@pytest.mark.parametrize("schema,told", WRONG, ids=str)
def test_what_is_of_another_kind_is_named_with_its_place(schema: Any, told: str) -> None:
    with pytest.raises(OptionError) as refused:
        settled(schema, "S")
    assert refused.value.message.startswith(told)


def test_the_schema_of_schemas_says_the_same() -> None:
    kind = pytest.importorskip("jsonschema").Draft202012Validator
    for schema, _ in WRONG:
        assert not kind(kind.META_SCHEMA).is_valid(schema), schema
    for schema in ({"items": {"uniqueItems": False, "maxLength": 3.0}, "minItems": 1.0}, TREE, *ENDLESS):
        assert kind(kind.META_SCHEMA).is_valid(schema), schema


def test_what_is_harmless_is_let_through() -> None:
    assert settled({"items": {"uniqueItems": False, "maxLength": 3.0}, "minItems": 1.0}, "S") == {
        "items": {"maxLength": 3}, "minItems": 1,
    }  # fmt: skip
    kept = {"const": {"uniqueItems": False, "maxLength": 3.0}, "properties": {"uniqueItems": {"type": "null"}}}
    assert repr(settled(kept, "S")) == repr(kept)  # values and names are no keywords
    for schema in ({}, True, TREE, {"exclusiveMinimum": True, "minimum": 1}, {"x-mine": 5}, {"uniqueItems": True}):
        assert settled(schema, "S") == schema


ENDLESS = [
    {"$ref": "#"}, {"anyOf": [{"$ref": "#"}]}, {"allOf": [{"$ref": "#"}, {"type": "null"}]},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 2},
    {"$defs": {"a/b": {"oneOf": [{"$ref": "#/$defs/a~1b"}]}}, "$ref": "#/$defs/a~1b"},
    {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#/$defs/a%20b"}},
     "$defs": {"a b": {"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/a b"}]}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", ENDLESS, ids=str)
def test_what_never_ends_is_refused_in_words(schema: Any) -> None:
    with pytest.raises(OptionError, match=r"S: got \{.*no answer of it has an end") as refused:
        settled(schema, "S")
    assert "be null" in refused.value.hint
    settled({"anyOf": [schema, {"type": "null"}]}, "S")  # there "#" is another one
    assert settled({**schema, "enum": [1]}, "S")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 5), min_size=1, max_size=3)), min_size=6, max_size=6)
)
def test_endless_is_what_no_depth_makes_an_end_of(rules: list[tuple[int, list[int]]]) -> None:
    """Against counting up: what can end can with so many levels as there are definitions."""

    def schema(kind: int, used: list[int]) -> dict[str, Any]:
        refs = [{"$ref": f"#/$defs/d{n}"} for n in used]
        names = [f"p{n}" for n in range(len(used))]
        return [
            {"type": "null"}, {"anyOf": refs}, {"allOf": refs},
            {"type": "object", "properties": dict(zip(names, refs, strict=True)), "required": names},
        ][kind]  # fmt: skip

    ends = [False] * 6
    for _ in range(6):
        ends = [kind == 0 or (any if kind == 1 else all)(ends[n] for n in used) for kind, used in rules]
    whole = {"$defs": {f"d{n}": schema(*rule) for n, rule in enumerate(rules)}, "$ref": "#/$defs/d0"}
    try:
        settled(whole, "S")
        found = True
    except OptionError:
        found = False
    assert found is ends[0]


def test_long_chains_take_no_time_and_deep_ones_are_refused() -> None:
    chain = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(20_000)}
    assert settled({"$defs": {**chain, "d20000": {}}, "$ref": "#/$defs/d0"}, "S")
    with pytest.raises(OptionError, match="no answer of it has an end"):
        settled({"$defs": {**chain, "d20000": {"$ref": "#"}}, "$ref": "#/$defs/d0"}, "S")
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(OptionError, match="S is refused: its brackets are nested too deep"):
        settled(deep, "S")


def test_values_are_shown_as_json_and_cut() -> None:
    assert shown(None) == "null" and shown({"a": [True, "ü"]}) == '{"a": [true, "ü"]}'
    assert shown("x" * 500) == json.dumps("x" * 500)[:SHOWN] + "..."

"""Every beginning of an object is one; what no object begins with is refused at its first wrong character."""

import json
import string

from hypothesis import given, settings
from hypothesis import strategies as st

from qgraft.serving.json_text import JsonText
from qgraft.serving.json_tokens import JsonTokens

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)


@settings(max_examples=20, deadline=None)
@given(OBJECTS, st.sampled_from([None, 1, 2]), st.booleans())
def test_objects_are_followed_to_their_end(value: dict[str, object], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    state = JsonText()
    for at, character in enumerate(text):
        assert not state.complete, text[:at]
        following = state.after(character)
        assert following is not None, text[: at + 1]
        state = following
    assert state.complete and state == JsonText().after(text) and state.after("x") is None


@settings(max_examples=40, deadline=None)
@given(OBJECTS, st.integers(0, 200), st.sampled_from(string.printable))
def test_what_is_let_through_and_complete_is_json(value: dict[str, object], place: int, other: str) -> None:
    text = json.dumps(value)
    changed = text[: place % len(text)] + other + text[place % len(text) + 1 :]
    state = JsonText().after(changed)
    try:
        parsed = json.loads(changed, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        assert state is None or not state.complete
    else:
        assert not isinstance(parsed, dict) or (state is not None and state.complete)


def test_wrong_beginnings() -> None:
    for text in ("[", "x", '{"a"}', "{,", '{"a":01', '{"a":-}', '{"a":1.}', '{"a":tru}', '{"a":"\n', '{"a":"\\x', '{"a":1,}',
                 '{"a":[1,]', '{"a":[1}', "{" + " " * 30, '{"a":"\\u12g', "{}{", '{"a":1e}', '{"a":--1'):  # fmt: skip
        assert JsonText().after(text) is None, text
    assert JsonText().after("{}").complete and not JsonText().after('{"a":1').complete


def test_an_object_behind_other_text() -> None:
    state = JsonText.behind("</think>")
    for text, following in (("Hm <", True), ("/thin", True), ("<</think>", True), ("x", False), ('\n{"a": 1}', True)):
        after = state.after(text)
        assert (after is not None) == following
        state = after or state
    assert state.complete


@settings(max_examples=30, deadline=None)
@given(OBJECTS, st.integers(0, 200))
def test_tokens_are_left_by_their_texts(value: dict[str, object], place: int) -> None:
    texts = [
        *string.printable,
        "",
        "true",
        "tru",
        "trx",
        '"}',
        '",',
        '": {"',
        "12.5",
        " {",
        "}}",
        "\ufffd",
        'x"\n',
        "\u4f60",
    ]
    text = json.dumps(value)
    state = JsonText().after(text[: place % len(text)])
    assert state is not None
    may = [state.in_string if text == "\ufffd" else bool(text) and state.after(text) is not None for text in texts]
    tokens = JsonTokens(texts)
    assert tokens.whole(state).tolist() == may
    assert not (tokens.whole(state) & ~tokens.beginning(state)).any()

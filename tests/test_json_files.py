"""JSON from outside: what Python's reader lets through and other programs read otherwise is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraft.errors import CheckpointError
from qgraft.json_files import DEEPEST, covered_text, is_covered, json_text, parse_json, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_what_python_writes_is_read_as_python_reads_it(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text) == json.loads(text) == parse_json(text.encode())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "'a' stands twice"),
        ("NaN", "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ("1e999", "larger than any float"),
        ("[" * 99_999 + "]" * 99_999, f"deeper than {DEEPEST}"),
        ("[" * 102 + "]" * 102, f"deeper than {DEEPEST}"),
        ('{"a":' * 102 + "1" + "}" * 102, f"deeper than {DEEPEST}"),
        ("1" * 5000, r"^the number 1{40}\.\.\. has 5000 digits$"),
        ('{"a": -' + "1" * 5000 + "}", r"^the number -1{39}\.\.\. has 5000 digits$"),
        ("{", "property name"),
    ],
)
def test_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_brackets_up_to_the_bound_are_read() -> None:
    text = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(text) == json.loads(text)


def test_infinity_where_it_may_stand() -> None:
    assert parse_json("[Infinity, 1e999]", finite=False) == [float("inf")] * 2


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"\xff{}", "byte 0 is no UTF-8"), (b"[]", "got a JSON list, expected an object"), (b"", "is not JSON")],
)
def test_files(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=why):
        read_object(path, CheckpointError)
    with pytest.raises(CheckpointError, match=r"y\.json cannot be read: No such file"):
        read_object(tmp_path / "y.json", CheckpointError)


def test_names_that_are_no_utf8_are_written_as_json_has_them(tmp_path):
    value = {"a\udcff": ["\ud83d", "\U0001f600 \\udcff"]}
    assert json.loads(json_text(value).encode()) == value
    (path := tmp_path / "own.json").write_bytes(covered_text(value).encode())
    read = read_object(path, CheckpointError)
    assert is_covered(path.read_text(encoding="utf-8"), read.pop("sha256")) and read == value

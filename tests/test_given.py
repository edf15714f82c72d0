"""What is no path is said in words."""

from pathlib import Path
from typing import Any

import pytest

from qgraft.errors import OptionError
from qgraft.given import described, path_given


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None"), (True, "True"), (3, "an int (3)"), ("x", "a str ('x')"), (["x"], "a list"), ("x" * 99, "a str"),
        (b"x", "a bytes (b'x')"), (object(), "an object"),
    ],
)  # fmt: skip
def test_a_value_is_described(value: Any, words: str) -> None:
    assert described(value) == words


def test_paths_are_taken_and_nothing_else() -> None:
    assert path_given("folder", "a/b") == path_given("folder", Path("a/b")) == Path("a/b")
    for value in (None, 3, b"a", ["a"], "", object()):
        with pytest.raises(OptionError, match=r"folder: got .*, expected a path\nhint: a text or a pathlib.Path"):
            path_given("folder", value)

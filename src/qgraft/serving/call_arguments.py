"""Calls and their arguments: JSON, or Python's keywords as ChatGLM3 writes them, `at='Rome', days=3`, read and never run."""

import ast
import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from qgraft.data.messages import Call

_KEYWORD = re.compile(r"\s*([\w.$-]+)\s*=(.*)", re.DOTALL)  # also of names that are none in Python: from, max-days
_ARGUMENTS = ("arguments", "parameters")
_DEEPEST = 64  # brackets within brackets
_MARKS = re.compile(r"""'(?:\\.|[^'\\])*(?:'|\\?\Z)|"(?:\\.|[^"\\])*(?:"|\\?\Z)|[()\[\]{},]""", re.DOTALL)


def json_at(text: str, start: int) -> tuple[Any, int] | None:
    """(the JSON value that begins there, behind blanks, where it ends); None where there is none, or not whole.

    None also for what Python reads and other programs do not: NaN, infinite numbers, half of a surrogate pair.
    """
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        value, stop = json.JSONDecoder().raw_decode(text, start)
        _check_sendable(value)
    except (ValueError, RecursionError):
        return None
    return value, stop


def _check_sendable(value: Any) -> None:
    """Raises ValueError for what no answer can hold as JSON in UTF-8."""
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def keywords_at(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    """(the keywords that begin there, where the text goes on behind their bracket); None as json_at."""
    end, commas = _bounds(text, start)
    found = None if end is None else _read(_between(text, start, commas, end))
    return None if found is None or end is None else (found, end + 1)


def begun_keywords(text: str) -> str:
    """As JSON what there is of arguments that may be cut off: an object, or the beginning of one with the whole keywords."""
    if (whole := keywords_at(text, 0)) is not None:
        return json.dumps(whole[0], ensure_ascii=False)
    _, commas = _bounds(text, 0)
    whole_ones = _read(_between(text, 0, commas[:-1], commas[-1])) if commas else None
    return json.dumps(whole_ones or {}, ensure_ascii=False)[:-1]


def _between(text: str, start: int, commas: Sequence[int], end: int) -> list[str]:
    """The keywords from `start` to `end`."""
    starts = [start, *(comma + 1 for comma in commas)]
    return [text[first:stop] for first, stop in zip(starts, [*commas, end], strict=True)]


def _bounds(text: str, start: int) -> tuple[int | None, list[int]]:
    """(where the bracket around the arguments closes, where the commas between them are)."""
    depth, commas = 0, list[int]()
    for mark in _MARKS.finditer(text, start):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] == "," and not depth:
            commas.append(mark.start())
        elif mark[0] in ")]}":
            if not depth:
                return (mark.start() if mark[0] == ")" else None), commas
            depth -= 1
        if depth > _DEEPEST:
            break
    return None, commas


def _read(each: Sequence[str]) -> dict[str, Any] | None:
    """The values of keywords; None for anything but literals that JSON has too."""
    found = [_KEYWORD.fullmatch(one) for one in (each if each[-1].strip() else each[:-1])]
    try:
        values = {one[1]: ast.literal_eval(one[2].strip()) for one in found if one is not None}
        _check_sendable(values)
        same = json.loads(json.dumps(values)) == values
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return values if len(values) == len(found) and same else None


def object_call(value: object, names: Collection[str]) -> Call | None:
    """The call that a JSON object is; None where it names none of the tools, or its arguments are no object."""
    if not isinstance(value, dict):
        return None
    inner = value.get("function") if isinstance(value.get("function"), dict) else value
    assert isinstance(inner, dict)
    return named_call(inner.get("name"), next((inner[key] for key in _ARGUMENTS if key in inner), None), names)


def named_call(name: object, arguments: object, names: Collection[str]) -> Call | None:
    """The call of this name with these arguments; None as object_call."""
    if name not in names or not isinstance(arguments, dict):
        return None
    return Call(str(name), json.dumps(arguments, ensure_ascii=False))

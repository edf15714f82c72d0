"""Arguments of a call: JSON, or Python's keywords as ChatGLM3 writes them, `at='Rome', days=3`, read and never run."""

import ast
import json
import re
from typing import Any

_DEEPEST = 64  # brackets within brackets
_MARKS = re.compile(r"""'(?:\\.|[^'\\])*(?:'|\\?\Z)|"(?:\\.|[^"\\])*(?:"|\\?\Z)|[()\[\]{},]""", re.DOTALL)


def json_at(text: str, start: int) -> tuple[Any, int] | None:
    """(the JSON value that begins there, behind blanks, where it ends); None where there is none, or not whole."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        value, stop = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return value, stop


def keywords_at(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    """(the keywords that begin there, where the text goes on behind their bracket); None as json_at."""
    end, _ = _bounds(text, start)
    found = None if end is None else _read(text[start:end])
    return None if found is None or end is None else (found, end + 1)


def begun_keywords(text: str) -> str:
    """As JSON what there is of arguments that may be cut off: an object, or the beginning of one with the whole keywords."""
    if (whole := keywords_at(text, 0)) is not None:
        return json.dumps(whole[0], ensure_ascii=False)
    _, last = _bounds(text, 0)
    return json.dumps((_read(text[:last]) if last else None) or {}, ensure_ascii=False)[:-1]


def _bounds(text: str, start: int) -> tuple[int | None, int]:
    """(where the bracket around the arguments closes, where the comma behind the last whole one is or 0)."""
    depth, comma = 0, 0
    for mark in _MARKS.finditer(text, start):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] == "," and not depth:
            comma = mark.start()
        elif mark[0] in ")]}":
            if not depth:
                return (mark.start() if mark[0] == ")" else None), comma
            depth -= 1
        if depth > _DEEPEST:
            break
    return None, comma


def _read(text: str) -> dict[str, Any] | None:
    """The values of keywords; None for anything but literals that JSON has too."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        same = json.loads(json.dumps(values, allow_nan=False)) == values
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    whole = len(values) == len(call.keywords) and all(each.arg is not None for each in call.keywords)
    return values if whole and same else None

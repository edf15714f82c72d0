"""JSON: what comes from outside is read as it stands, or refused; what is written is JSON to every reader.

What Python's own reader lets through is refused here, because other programs read it otherwise, or nothing that computes
with it can be right: a key that stands twice, NaN and Infinity, numbers that no float holds, brackets nested deeper than any
real file (Python answers with a RecursionError, and only where it happens to be called from deep enough). Errors say where.

A file that lists the hashes of others can hold its own beside them (`covered_text`), so that a bit that flips in it is seen
too: under `sha256` stands the hash of the text with 64 zeros in the place of that value.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from qgraft.errors import QgraftError

DEEPEST = 100  # brackets within brackets; tokenizer.json, the deepest of real files, has 8
OWN = "sha256"  # under which a file holds its own hash
_BLANK = "0" * 64
_HALVES = re.compile("[\ud800-\udfff]")


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The value that `text` stands for.

    Args:
        finite: whether NaN and Infinity are refused. Mamba-2's config.json has an Infinity, so some must be let through.

    Raises ValueError, which says where it can.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")  # Python's reader would take halves of pairs, and UTF-16
    try:
        if finite:
            value = json.loads(
                text, object_pairs_hook=_object, parse_int=_whole, parse_float=_finite, parse_constant=_refuse
            )
        else:
            value = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"brackets are nested deeper than {DEEPEST}") from None
    _check_depth(value)
    return value


def read_object(path: Path, error: type[QgraftError], *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in the file at `path`. Raises `error` for anything else; see parse_json."""
    try:
        value = parse_json(path.read_bytes(), finite=finite)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from reason
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not JSON: byte {reason.start} is no UTF-8") from reason
    except ValueError as reason:
        raise error(f"{path} is not JSON: {reason}") from reason
    if not isinstance(value, dict):
        raise error(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value


def json_text(value: Any) -> str:
    """`value` as indented JSON and a line feed; numbers that JSON does not have, NaN and infinities, become null.

    Halves of surrogate pairs, which stand for the bytes of a file's name that is no UTF-8 and cannot be written as UTF-8, are
    written as JSON has them: \\udcff.
    """
    text = json.dumps(_as_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _HALVES.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def covered_text(value: Mapping[str, Any]) -> str:
    """`value` as json_text has it, with the hash of this text in it."""
    text = json_text({**value, OWN: _BLANK})
    return text.replace(_BLANK, _hash(text))


def is_covered(text: str, own: Any) -> bool:
    """Whether `text`, which holds `own` as its hash, is as covered_text wrote it."""
    return isinstance(own, str) and _hash(text.replace(own, _BLANK)) == own


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # of Python, whose advice is for programmers
        raise ValueError(f"the number {text[:40]}... has {len(text.lstrip('-'))} digits") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is larger than any float")
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"brackets are nested deeper than {DEEPEST}")

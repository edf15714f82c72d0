"""Regular expressions of users and of files, with a bound on the time that they may take.

PEFT's options are full of them (target_modules, rank_pattern, alpha_pattern, layers_pattern), and a file may hold one that
Python's `re` works on until the end of the world: `(([a-z.]+)+)+!` takes twice as long for each further letter of a path. So
no repetition without end may stand within another, nor more than 50 groups within each other, and `regex`, which transformers
brings along and which knows the same language, matches, because it takes a time-out for what is left. Not chosen: an engine
of linear time, such as RE2, which has no lookahead; `^(?!.*vision).*q_proj$` is a common target of adapters for models that
see.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from time import monotonic
from typing import Any

import regex

from qgraft.errors import UnsupportedError

LONGEST = 1 << 20  # characters; an adapter of ours may list the paths of all its layers in one
SECONDS = 0.2  # for one path
DEEPEST = 50  # groups within groups
# One element of a pattern with what repeats it: an escaped character, a class of characters, a bracket, any other character
_TOKENS = re.compile(r"(?P<token>\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.)(?P<endless>[*+]|\{\d*,\})?[?+]?", re.DOTALL)


def is_pattern(text: object, groups: int = 0) -> bool:
    """Whether it is a regular expression, of so many groups at least."""
    try:
        return isinstance(text, str) and bool(_compiled(text).groups >= groups)
    except ValueError:
        return False


def matches(pattern: str, path: str) -> bool:
    """Whether the whole of `path` matches. Raises ValueError for no pattern, UnsupportedError for one that never ends."""
    return _within(pattern, path, "fullmatch") is not None


def is_ending(text: object) -> bool:
    """Whether it is a regular expression for the end of a path, as the keys of PEFT's tables are."""
    return isinstance(text, str) and is_pattern(text) and is_pattern(_ending(text))


def first_matching(keys: Iterable[str], path: str) -> str | None:
    """The first key that matches the end of the module path: `(.*\\.)?(key)` all of it. Raises as `matches`."""
    return next((key for key in keys if matches(_ending(key), path)), None)


def _ending(key: str) -> str:
    return rf"(.*\.)?({key})"


def first_group(pattern: str, path: str) -> str | None:
    """What the first group of the pattern is at the beginning of `path`; None where it is none. Raises as `matches`."""
    found = _within(pattern, path, "match")
    return None if found is None or found[1] is None else str(found[1])


def _within(pattern: str, path: str, how: str) -> Any:
    began = monotonic()
    try:
        return getattr(_compiled(pattern), how)(path, timeout=SECONDS)
    except (TimeoutError, MemoryError) as error:
        raise UnsupportedError(
            f"the regular expression {pattern[:80]!r} was not through with {path!r} after {monotonic() - began:.1f} s",
            hint="write it without a repetition within a repetition, such as (a+)+",
        ) from error


@lru_cache(maxsize=1024)
def _compiled(text: str) -> Any:
    if len(text) > LONGEST:
        raise ValueError("it is too long")
    _check_repetitions(text)
    try:
        return regex.compile(text)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(str(error)) from error


def _check_repetitions(text: str) -> None:
    """Raise ValueError for groups in groups in groups, and for a repeated group that holds a repetition, both without end."""
    repeats = [False]  # of each group that is open: whether it holds a repetition without end
    for match in _TOKENS.finditer(text):
        token, endless = match["token"], bool(match["endless"])
        if token == "(":
            repeats.append(False)
            if len(repeats) > DEEPEST:
                raise ValueError(f"groups are nested deeper than {DEEPEST}")
            continue
        inner = repeats.pop() if token == ")" and len(repeats) > 1 else False
        if inner and endless:
            raise ValueError("a repetition without end stands within another")
        repeats[-1] |= inner or endless

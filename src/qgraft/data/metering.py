"""What the operations of a chat template cost, and what a rendering may spend; sandbox.py has it paid.

A unit is what 20 ns suffice for on a CPU of these years, measured with each operation repeated until the allowance ends.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jinja2

from qgraft.json_files import DEEPEST

ALLOWANCE = 25_000_000  # units of a rendering,
FOR_TEXT, FOR_VALUE = 10, 1_000  # and more for each character that it is given, and each message, key or text
LONGEST, TIMES = 1_000_000, 4  # characters of a text that is made, and how many times what is given
TICK, ENTRY = 250, 25  # what a step costs, and an entry of a list
LARGEST_INT = 10_000  # bits
WIDEST = 100_000  # an integer that a function or filter is given: widths, counts
_UNBOUNDED = 1 << 62
_FAST, _KEPT = 8, 2  # characters of a text for a unit: that is gone through, that is made

_FREE = {"length", "count", "first", "last", "default", "d", "attr", "random"}  # filters, which take no whole
_FREE_TESTS = {
    "defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "integer", "float", "boolean",
    "true", "false", "callable", "odd", "even", "divisibleby", "sameas", "filter", "test",
}  # fmt: skip
_BY_ENTRY = {"list", "reverse", "batch", "slice", "items", "map", "select", "reject", "selectattr", "rejectattr"}
_COMPARING = {"min", "max", "sort", "unique", "groupby", "sum", "join", "dictsort"}  # by entry, and looks into each
_SLOW = {
    "wordwrap",
    "urlize",
    "striptags",
    "title",
    "wordcount",
    "pprint",
    "urlencode",
    "xmlattr",
    "strftime_now",
    "translate",
}
_SEARCHING = {"find", "index", "count", "split", "partition"}
_BACKWARDS = {"rfind", "rindex", "rsplit", "rpartition"}  # Python takes the product of both lengths for these
_STRIPPING = {"strip", "lstrip", "rstrip", "trim"}  # so it does for these, of characters that are named
_PLAIN = {"startswith", "endswith", "string", "removeprefix", "removesuffix"}
_COUNTED = {
    "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson", "wordwrap", "batch", "slice", "safe_range",
}  # fmt: skip
_PARTS = 20  # of an attribute's name, which map() and others look up for each entry
_ATTRIBUTE_AT = {"join": 2} | dict.fromkeys(_COMPARING - {"join", "dictsort"} | {"selectattr", "rejectattr"}, 1)
_WIDTH = re.compile(r"\d{5,}")  # in a format: '{:99999999}'
_WIDTH_GIVEN = re.compile(r"\{[^}]*\{|%[^a-zA-Z%]*\*")  # '{:{}}', '%*d': the width is an argument


class TooCostly(jinja2.TemplateError):
    """A template that asks for more than a rendering is allowed."""


@dataclass
class Allowance:
    """What a rendering has left.

    Attributes:
        left: units.
        longest: characters that a text may have, and entries of a list.
    """

    left: int
    longest: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Allowance":
        """That of a rendering of these values."""
        characters = [_characters(each) for each in _walk(values, _UNBOUNDED)]  # they share nothing
        texts = sum(characters)
        return cls(ALLOWANCE + FOR_TEXT * texts + FOR_VALUE * len(characters), LONGEST + TIMES * texts)

    def spend(self, units: int) -> None:
        """Raises TooCostly when the allowance ends."""
        self.left -= units
        if self.left < 0:
            raise TooCostly("it asks for more steps than a rendering is allowed")

    def check(self, size: int) -> None:
        """Raise TooCostly before something of this size is made."""
        if size > self.longest:
            raise TooCostly(f"it asks for a text or list longer than {self.longest:,}")


_allowance: ContextVar[Allowance] = ContextVar("allowance")


@contextmanager
def allowed(values: Mapping[str, Any]) -> Iterator[Allowance]:
    """Within the block there is an allowance to spend."""
    allowance = Allowance.of(values)
    token = _allowance.set(allowance)
    try:
        yield allowance
    finally:
        _allowance.reset(token)


def tick(units: int) -> bool:
    """Pay; true, so that it can stand in a condition."""
    _allowance.get().spend(units)
    return True


def looked_at(value: Any) -> Any:
    """`value`, all of which is looked at: paid for, an iterator as its entries come."""
    _allowance.get().spend(_whole(value))
    return _counted(value)


def searched(value: Any) -> Any:
    """`value`, in which something is looked for, or which is looked for."""
    if not isinstance(value, str):
        return looked_at(value)
    tick(len(value) // 2)
    return value


def made(value: Any) -> Any:
    """`value`, which came out of something: paid for by its length, and that of the lists in it."""
    allowance = _allowance.get()
    if isinstance(value, (str, bytes)):
        allowance.check(len(value))
        allowance.spend(len(value) // _KEPT)
    elif isinstance(value, int):
        if value.bit_length() > LARGEST_INT:
            raise TooCostly(f"it asks for a number of more than {LARGEST_INT * 3 // 10:,} digits")
        allowance.spend(value.bit_length() // 4)
    elif isinstance(value, (list, tuple, set, frozenset, Mapping)):
        allowance.check(len(value))
        allowance.spend(ENTRY * (len(value) + sum(len(each) for each in value if isinstance(each, (list, tuple)))))
    return value


def written(value: Any) -> Any:
    """`value`, which is written; other things than texts become one by it."""
    allowance = _allowance.get()
    if not isinstance(value, str):
        allowance.spend(TICK + 2 * _whole(value))
        return value
    allowance.spend(TICK // 5 + len(value) // _KEPT)
    return value


def concatenated(*values: Any) -> str:
    """What `~` gives."""
    _allowance.get().check(sum(len(value) if isinstance(value, str) else _texts(value) for value in values))
    return str(made("".join(str(written(value)) for value in values)))


def product(operator: str, left: Any, right: Any) -> None:
    """Pay for `left operator right`, which is refused before it is made where it is too large."""
    allowance = _allowance.get()
    allowance.spend(TICK // 5)
    if operator == "%" and isinstance(left, str):
        pay_call("%", (left, *(right if isinstance(right, tuple) else (right,))), {})
        return
    lengths = [_length(value) for value in (left, right)]
    counts = [value for value in (left, right) if isinstance(value, int)]
    if operator == "*" and len(counts) == 1:
        allowance.check(max(lengths) * abs(counts[0]))
    elif operator == "**" and len(counts) == 2:
        if left.bit_length() * max(right, 0) > LARGEST_INT:
            raise TooCostly("it asks for too large a power")
    elif operator == "+":
        allowance.check(sum(lengths))
    allowance.spend(sum(lengths) // _FAST)


def pay_call(name: str, values: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Pay for the call of a function, a method (the first of `values` is its owner) or a filter."""
    _check_growth(name, values, options)
    everything = (*values, *options.values())
    text = len(values[0]) if values and isinstance(values[0], str) else 0
    rest = sum(map(_whole, everything)) if text else _whole(everything)
    units = TICK + rest
    if name in _SLOW:
        characters = _texts(everything)
        units += 40 * characters + characters * characters // 64
    elif name in _SEARCHING or name == "replace":
        units += text // 4
    elif name in _BACKWARDS:
        sought = max((len(each) for each in everything[1:] if isinstance(each, str)), default=1)
        units += text * (8 + sought) // 40
    elif name in _STRIPPING:
        units += text * sum(len(each) for each in everything[1:] if isinstance(each, str)) // 20
    elif name in _COMPARING or name in _BY_ENTRY:
        units += 2 * ENTRY * _length(values[0] if values else 0)
        if name == "sum" and any(isinstance(each, (list, tuple)) for each in everything[1:]):
            units += rest * _length(values[0])  # lists are added one by one to one that grows
    elif name not in _PLAIN:
        units += text
    _allowance.get().spend(units)


def pay_entries(values: tuple[Any, ...]) -> None:
    """Pay for values that are handed over as they are, to a macro."""
    _allowance.get().spend(TICK + ENTRY * len(values))


def metered(name: str, function: Callable[..., Any], free: bool = False) -> Callable[..., Any]:
    """A filter or test that pays for what it looks at and for what it gives."""

    @wraps(function)
    def paying(*values: Any, **options: Any) -> Any:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0
        own = tuple(map(_counted, values[first:]))
        if free:
            tick(TICK)
        elif name in _BY_ENTRY:
            _check_growth(name, own, options)
            tick(TICK + 4 * ENTRY * _length(own[0] if own else 0) + _whole(own[1:]) + _whole(options))
        else:
            pay_call(name, own, options)
        result = function(*values[:first], *own, **options)
        return result if free else made(result)

    return paying


def metered_filters(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Filters that pay."""
    return {name: metered(name, function, name in _FREE) for name, function in filters.items()}


def metered_tests(tests: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Tests that pay."""
    return {name: metered(name, function, name in _FREE_TESTS) for name, function in tests.items()}


def _counted(value: Any) -> Any:
    """An iterator that pays for each entry that is taken from it; anything else as it is."""
    return _paying(value) if isinstance(value, Iterator) else value


def _paying(entries: Iterator[Any]) -> Iterator[Any]:
    for entry in entries:
        tick(4 * ENTRY)
        yield entry


def _length(value: Any) -> int:
    return len(value) if isinstance(value, Sized) and not isinstance(value, jinja2.Undefined) else 0


def _walk(value: Any, most: int | None = None) -> Iterator[Any]:
    """All that is in a value, and whatever is shared as often as it is; raises TooCostly beyond what is left to spend."""
    most = _allowance.get().left if most is None else most
    waiting = [value]
    while waiting:
        each = waiting.pop()
        yield each
        if isinstance(each, Mapping):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple, set, frozenset)):
            waiting += each
        else:
            continue
        most -= ENTRY * (1 + len(each))
        if most < 0:
            raise TooCostly("it asks for a list of too many entries")


def _whole(value: Any) -> int:
    """Units for looking at all of a value."""
    if isinstance(value, str):
        return len(value) // _FAST
    total = 0
    for each in _walk(value):
        if isinstance(each, (str, bytes)):
            total += len(each) // _FAST
        elif isinstance(each, int):
            total += each.bit_length() // _FAST
        total += ENTRY
    return total


def _texts(value: Any) -> int:
    """Characters of a value as text, about."""
    return sum(map(_characters, _walk(value)))


def _characters(value: Any) -> int:
    """Of a value without what is in it."""
    if isinstance(value, (str, bytes)):
        return 4 + len(value)
    return 4 + (value.bit_length() // 3 if isinstance(value, int) else 0)


def check_nesting(value: Any, indent: int) -> None:
    """Refuse JSON that is nested too deeply, or grows too much by being indented."""
    level, depth, entries = [value], 0, 0
    while level := [each for each in level if isinstance(each, (list, tuple, Mapping))]:
        level = [inner for each in level for inner in (each.values() if isinstance(each, Mapping) else each)]
        depth, entries = depth + 1, entries + len(level)
        if depth > DEEPEST:
            raise TooCostly(f"it asks for JSON that is nested deeper than {DEEPEST}")
    _allowance.get().check(2 * _texts(value) + indent * depth * entries)


def _check_growth(name: str, values: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Refuse calls whose result is much larger than what goes in: widths, formats, replacements, joins."""
    everything = (*values, *options.values())
    texts = [value for value in everything if isinstance(value, str)]
    widest = max((abs(value) for value in everything if isinstance(value, int)), default=0)
    if name in _COUNTED and widest > WIDEST:
        raise TooCostly(f"{name} is given a number beyond {WIDEST:,}")
    if name in _BY_ENTRY | _COMPARING:
        _check_attribute(name, values, options)
    check = _allowance.get().check
    if name in ("format", "format_map", "%") and texts:
        if _WIDTH.search(texts[0]) or (widest > WIDEST and _WIDTH_GIVEN.search(texts[0])):
            raise TooCostly("a format asks for a width beyond 10,000")
        check((1 + texts[0].count("{") + texts[0].count("%")) * _texts(everything))
    elif name == "replace" and len(texts) >= 3:
        check(len(texts[0]) + (texts[0].count(texts[1]) if texts[1] else len(texts[0]) + 1) * len(texts[2]))
    elif name == "join":
        separator = max(map(len, texts), default=0)
        check(_texts(everything) + separator * max(map(_length, everything), default=0))
    elif name == "indent":
        lines = sum(text.count("\n") + 1 for text in texts[:1])
        check(_texts(everything) + lines * max(widest, *map(len, texts), 4))
    elif name in ("expandtabs", "urlize") and texts:
        check(len(texts[0]) + texts[0].count("\t") * widest if name == "expandtabs" else 64 * len(texts[0]))


def _check_attribute(name: str, values: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Refuse names of attributes with many parts, which are looked up for each entry."""
    at = _ATTRIBUTE_AT.get(name)
    for given in (options.get("attribute"), *(values[at : at + 1] if at else ())):
        if isinstance(given, str) and given.count(".") + given.count(",") > _PARTS:
            raise TooCostly(f"{name} is given an attribute of more than {_PARTS} parts")

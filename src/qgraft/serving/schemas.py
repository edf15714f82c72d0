"""JSON Schemas that answers are held to, before anything follows them: what is of another kind is named with its place.

    {"properties": {"a": {"maxLength": "3"}}}  ->  tools[0].function.parameters.properties.a.maxLength: got "3", expected ...

What is right and would be refused further on is written as it can be read: 3.0 as 3 where something is counted, and
`uniqueItems: false` left out. A schema of which no value has an end is refused here, in words:

    {"$ref": "#"}                                                   it asks for itself, and for nothing else
    {"properties": {"next": {"$ref": "#"}}, "required": ["next"]}   each value holds another one

Whether a value of a schema can end is the least answer that fits all of them: none can at first; those that can without
others can; then those that can with these, until nothing changes. Where it is not certain, a schema counts as one that can.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from qgraft.errors import OptionError
from qgraft.ranges import ABOVE_0, FINITE, Range
from qgraft.serving.fields import shown

TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
_COUNT = Range(whole=True)
_COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
_NUMBERS = {"minimum", "maximum"}
_FLAGS = {"uniqueItems", "nullable"}
_TEXTS = {"$ref", "$schema", "$id", "$anchor", "pattern", "format"}
_ONE = {"additionalProperties", "additionalItems", "not", "contains", "if", "then", "else", "propertyNames"}
_LISTS = {"anyOf", "allOf", "oneOf", "prefixItems"}
_BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}

_COMPARED = {
    "const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength",
    "minItems", "maxItems", "minProperties", "maxProperties",
}  # fmt: skip
DIGITS, LARGEST, WHOLE = 15, 1e15, 2**53 - 1  # of numbers that llguidance keeps exactly; -2**63 ends the process


def settled(schema: object, where: str) -> Any:
    """The schema as it can be followed. Raises OptionError for one that is none, or of which no value has an end.

    Args:
        where: how the schema is called.
    """
    try:
        found = _schema(schema, where)
        if not _Ends(found).can_end():
            raise OptionError(
                f"{where}: got {shown(schema)}: no answer of it has an end, as it asks for itself again and again",
                hint='let what comes back be left out, or be null: {"anyOf": [{"$ref": ...}, {"type": "null"}]}',
            )
    except RecursionError:
        raise OptionError(f"{where} is refused: its brackets are nested too deep") from None
    return found


def _schema(given: object, where: str) -> Any:
    if isinstance(given, bool):
        return given
    if not isinstance(given, Mapping):
        raise _wrong(where, given, "a schema: an object, true or false")
    return {
        key: value
        for key, each in given.items()
        if (value := _keyword(key, each, f"{where}.{key}")) is not False or key != "uniqueItems"
    }


def _keyword(key: str, given: Any, where: str) -> Any:
    """What a keyword says, as it can be read. Raises OptionError."""
    if key in _COUNTS:
        number = int(given) if isinstance(given, float) and given.is_integer() else given
        return _checked(number, number in _COUNT, where, str(_COUNT))
    if key in _NUMBERS:
        return _checked(given, given in FINITE, where, str(FINITE))
    if key in ("exclusiveMinimum", "exclusiveMaximum"):  # of draft 4: true or false
        return _checked(given, isinstance(given, bool) or given in FINITE, where, str(FINITE))
    if key == "multipleOf":
        return _checked(given, given in ABOVE_0, where, str(ABOVE_0))
    if key in _FLAGS:
        return _checked(given, isinstance(given, bool), where, "true or false")
    if key in _TEXTS:
        return _checked(given, isinstance(given, str), where, "a text")
    if key == "type":
        right = given in TYPES if isinstance(given, str) else isinstance(given, list) and bool(given)
        right = right and (isinstance(given, str) or all(isinstance(each, str) and each in TYPES for each in given))
        return _checked(given, right, where, f"{', '.join(TYPES)}, or a list of them")
    if key == "required":
        right = isinstance(given, list) and all(isinstance(name, str) for name in given)
        return _checked(given, right, where, "a list of keys")
    if key == "enum":
        return _checked(given, isinstance(given, list) and bool(given), where, "a list of values")
    return _inner(key, given, where)


def _inner(key: str, given: Any, where: str) -> Any:
    """A keyword that holds schemas; all others as they are."""
    if key in _ONE or (key == "items" and not isinstance(given, list)):
        return _schema(given, where)
    if key in _LISTS or key == "items":
        _checked(given, isinstance(given, list) and bool(given or key == "items"), where, "a list of schemas")
        return [_schema(each, f"{where}[{index}]") for index, each in enumerate(given)]
    if key in _BY_NAME:
        _checked(given, isinstance(given, Mapping), where, "an object of schemas")
        return {name: _schema(each, f"{where}.{name}") for name, each in given.items()}
    return given


def _checked(given: Any, right: bool, where: str, expected: str) -> Any:
    if not right:
        raise _wrong(where, given, expected)
    return given


def _wrong(where: str, given: object, expected: str) -> OptionError:
    where = where if len(where) <= 300 else f"{where[:200]}...{where[-100:]}"
    return OptionError(f"{where}: got {shown(given)}, expected {expected}")


def subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """(the keys that lead to it, schema) of those that stand directly in a schema, definitions last."""
    for key in sorted(schema, key=lambda name: name in ("$defs", "definitions")):
        value = schema[key]
        if key in _ONE or (key == "items" and not isinstance(value, list)):
            yield (key,), value
        elif (key in _LISTS or key == "items") and isinstance(value, list):
            yield from (((key, index), each) for index, each in enumerate(value))
        elif key in _BY_NAME and isinstance(value, Mapping):
            yield from (((key, name), each) for name, each in value.items())


def check_numbers(schema: object, counts: bool = False) -> None:
    """Raise OptionError for a number that answers are compared with, and that llguidance may take for another."""
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            check_numbers(value, counts or key in _COMPARED)
    elif isinstance(schema, list):
        for value in schema:
            check_numbers(value, counts)
    elif counts and isinstance(schema, int | float) and not _is_kept(schema):
        raise OptionError(f"{str(schema)[:40]}: numbers are kept up to {DIGITS} digits and {WHOLE}")


def counts_keys(schema: Mapping[str, Any]) -> bool:
    """Whether keys of any name would have to be counted: one that comes twice is counted twice, and is one."""
    least, required = schema.get("minProperties"), schema.get("required", [])
    if not isinstance(least, int | float) or (isinstance(required, list) and least <= len(set(map(str, required)))):
        return False
    return "patternProperties" in schema or schema.get("additionalProperties", True) is not False


def _is_kept(number: int | float) -> bool:
    if isinstance(number, int):
        return abs(number) <= WHOLE
    digits = repr(number).partition("e")[0].removesuffix(".0").replace(".", "").lstrip("-0")
    return number == 0 or (len(digits) <= DIGITS and 1 / LARGEST <= abs(number) <= LARGEST)


@dataclass
class _Ends:
    """Whether a value of a schema can end; see the module.

    Attributes:
        known: of schemas that are referred to, by their references.
    """

    root: Any
    known: dict[str, bool] = field(default_factory=dict)
    _used_by: dict[str, set[str]] = field(default_factory=dict)
    _left: list[str] = field(default_factory=list)
    _now: str = ""

    def can_end(self) -> bool:
        """Of the whole schema."""
        self.known["#"], self._left = False, ["#"]
        while self._left:
            self._now = self._left.pop()
            if not self.known[self._now] and self._ends(self._target(self._now)):
                self.known[self._now] = True
                self._left += [each for each in self._used_by.get(self._now, ()) if not self.known[each]]
        return self.known["#"]

    def _refers(self, reference: str) -> bool:
        self._used_by.setdefault(reference, set()).add(self._now)
        if reference not in self.known:
            self.known[reference] = False
            self._left.append(reference)
        return self.known[reference]

    def _target(self, reference: str) -> Any:
        """What a reference leads to; True, which can end, where that is not in the schema."""
        found = self.root
        for part in unquote(reference).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdigit() and int(key) < len(found):
                found = found[int(key)]
            else:
                return True
        return found

    def _ends(self, schema: Any) -> bool:
        if not isinstance(schema, Mapping):
            return True
        if "const" in schema or "enum" in schema:
            return True
        reference = schema.get("$ref")
        inside = isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))
        return (
            (not inside or self._refers(str(reference)))
            and all(self._ends(each) for each in schema.get("allOf", ()))
            and all(any(self._ends(each) for each in schema[key]) for key in ("anyOf", "oneOf") if key in schema)
            and self._kinds_end(schema)
        )

    def _kinds_end(self, schema: Mapping[str, Any]) -> bool:
        """Whether a value of one of its types can end."""
        kinds = schema.get("type", TYPES)
        kinds = [kinds] if isinstance(kinds, str) else kinds
        ends = {"object": self._object_ends, "array": self._array_ends}
        return any(kind not in ends or ends[kind](schema) for kind in kinds)

    def _object_ends(self, schema: Mapping[str, Any]) -> bool:
        properties = schema.get("properties", {})
        return all(name not in properties or self._ends(properties[name]) for name in schema.get("required", ()))

    def _array_ends(self, schema: Mapping[str, Any]) -> bool:
        items = schema.get("items", True)
        first = schema.get("prefixItems", items if isinstance(items, list) else [])
        rest = True if isinstance(items, list) else items
        least = schema.get("minItems", 0)
        needed = [*first[:least], *([rest] if least > len(first) else [])]
        return all(self._ends(each) for each in needed)

"""Arguments of calls that are no JSON: between tags, as Qwen 3.5, Qwen3-Coder, Nemotron 3 and GLM-4.5 write them; Gemma 4's.

    <parameter=city>\\nRome\\n</parameter>\\n<parameter=days>\\n3\\n</parameter>
    <arg_key>city</arg_key>\\n<arg_value>Rome</arg_value>\\n<arg_key>days</arg_key>\\n<arg_value>3</arg_value>
    {city:<|"|>Rome<|"|>,days:3}

Between tags texts stand as they are and all else as JSON, so that the schema of a function says which of them 3 is; where it
says nothing, what can be read as JSON is JSON.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qgraft.serving.call_arguments import json_at

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Tags:
    """What stands before a name, between it and its value, and behind the value."""

    open: str
    middle: str
    close: str

    def at(self, text: str, start: int, schema: object) -> tuple[Arguments, int]:
        """(the arguments that begin there, one behind the other, where they end).

        Args:
            schema: of the function's parameters, as far as it is one.
        """
        found: Arguments = {}
        pattern = re.compile(
            rf"\s*{re.escape(self.open.strip())}([^<>\n]+?){_beside(self.middle)}(.*?){_beside(self.close)}", re.DOTALL
        )
        while argument := pattern.match(text, start):
            found[argument[1]] = _value(argument[2], _types(schema, argument[1]))
            start = argument.end()
        return found, start

    def begun(self, text: str, schema: object) -> str:
        """As JSON the beginning of an object, with those that are whole."""
        found, _ = self.at(text, 0, schema)
        return json.dumps(found, ensure_ascii=False)[:-1]


def _beside(tag: str) -> str:
    """A pattern of a tag, with one line feed beside it where it is written with one."""
    inner = re.escape(tag.strip())
    return ("\n?" if tag.startswith("\n") else "") + inner + ("\n?" if tag.endswith("\n") else "")


def _types(schema: object, name: str) -> set[str]:
    """The types that a schema gives an argument; none where it says nothing of them."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    told = properties.get(name) if isinstance(properties, Mapping) else None
    found: set[str] = set()
    each = [told] if isinstance(told, Mapping) else []
    for one in each:
        kinds = one.get("type")
        found |= {kinds} if isinstance(kinds, str) else {*kinds} if isinstance(kinds, list) else set()
        found |= {"string"} if any(isinstance(value, str) for value in one.get("enum") or ()) else set()
        each += [more for key in ("anyOf", "oneOf") for more in one.get(key) or () if isinstance(more, Mapping)]
    return found


def _value(text: str, types: set[str]) -> Any:
    """What an argument's text says."""
    if "string" in types and not (text.strip() == "null" and "null" in types):
        return text
    value = json_at(text, 0)
    return value[0] if value is not None and not text[value[1] :].strip() else text


@dataclass(frozen=True)
class Braces:
    """Gemma 4's: {city:<|"|>Rome<|"|>,days:3}, where texts stand between marks of their own, and nothing is escaped."""

    def at(self, text: str, start: int, schema: object) -> tuple[Arguments, int]:
        """As of Tags; nothing, and `start`, where it is none or not whole."""
        try:
            value, stop = _braced(text, start, _DEEPEST)
        except ValueError:
            return {}, start
        return (value, stop) if isinstance(value, dict) else ({}, start)

    def begun(self, text: str, schema: object) -> str:
        """As of Tags."""
        commas = [found.start() for found in re.finditer(",", text)]
        for comma in [len(text), *commas[: -_TRIED - 1 : -1]]:
            found, stop = self.at(text[:comma] + "}", 0, schema)
            if stop:
                return json.dumps(found, ensure_ascii=False)[:-1]
        return "{"


QUOTE, _DEEPEST, _TRIED = '<|"|>', 64, 256
_BARE = re.compile(r"[^,:{}\[\]<]+")


def _braced(text: str, at: int, depth: int) -> tuple[Any, int]:
    """(the value that begins there, where it ends). Raises ValueError where there is none."""
    if not depth or at >= len(text):
        raise ValueError
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text[at] not in "{[":
        bare = _BARE.match(text, at)
        value = None if bare is None else json_at(bare[0], 0)
        if bare is None or value is None or bare[0][value[1] :].strip():
            raise ValueError
        return value[0], bare.end()
    closes, found, at = "}]"["{[".index(text[at])], list[tuple[Any, Any]](), at + 1
    while not text.startswith(closes, at):
        key: Any = None
        if closes == "}":
            bare = _BARE.match(text, at)
            key, at = (bare[0], bare.end()) if bare is not None else _braced(text, at, depth - 1)
            if not isinstance(key, str) or not text.startswith(":", at):
                raise ValueError
            at += 1
        value, at = _braced(text, at, depth - 1)
        found.append((key, value))
        if text.startswith(",", at):
            at += 1
        elif not text.startswith(closes, at):
            raise ValueError
    return (dict(found) if closes == "}" else [value for _, value in found]), at + 1

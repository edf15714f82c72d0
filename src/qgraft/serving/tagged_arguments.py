"""Arguments of calls that stand between tags, as Qwen 3.5, Qwen3-Coder, Nemotron 3 and GLM-4.5 write them.

    <parameter=city>\\nRome\\n</parameter>\\n<parameter=days>\\n3\\n</parameter>
    <arg_key>city</arg_key>\\n<arg_value>Rome</arg_value>\\n<arg_key>days</arg_key>\\n<arg_value>3</arg_value>

Texts stand there as they are and all else as JSON, so that the schema of a function says which of them 3 is; where it says
nothing, what can be read as JSON is JSON.
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

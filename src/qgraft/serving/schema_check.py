"""Whether schemas can be followed at all: tried in a process of its own, as `python -m qgraft.serving.schema_check SECONDS`.

A schema comes from whoever may ask. Some take llguidance minutes (twenty patterns at once), some end its process (references
through thousands of others fill the stack). So each is read here first, with little stack, within bounds of memory and
time, and some tokens are taken. stdin: a list of schemas as JSON texts. stdout: [the number of one that is refused, why], and
the keys that lead to the smallest part of it that is refused by itself. Exit status 0: none is.
"""

import json
import sys
import threading
from typing import Any
from urllib.parse import quote

from qgraft.serving.schemas import subschemas

STACK, MEMORY = 1 << 20, 2 << 30  # bytes; the server's threads have several times that stack
STEPS, TRIES = 24, 200  # tokens; parts
EXTENSION = "x-guidance"  # where a schema says how llguidance shall read it


def main() -> int:
    """See the module."""
    found: list[int] = []
    _bound(float(sys.argv[1]))
    threading.stack_size(STACK)
    thread = threading.Thread(target=lambda: found.extend(_refused(json.load(sys.stdin))))
    thread.start()
    thread.join()
    return 1 if found else 0


def _refused(schemas: list[str]) -> list[int]:
    """The number of the first schema that is refused; why, and which part of it, is printed."""
    for number, schema in enumerate(schemas):
        if reason := _tried(schema):
            print(json.dumps([number, reason]), flush=True)  # to find the part may take all the time that is left
            print(json.dumps(_place(json.loads(schema))), flush=True)
            return [number]
    return []


def _place(schema: dict[str, Any]) -> list[str | int]:
    """The keys that lead to the smallest part that is refused by itself."""
    place: list[str | int] = []
    left, part = TRIES, schema
    while True:
        for keys, each in subschemas(part):
            left -= 1
            if left < 0:
                return place
            if isinstance(each, dict) and _tried(json.dumps(_alone(schema, [*place, *keys]))):
                place, part = [*place, *keys], each
                break
        else:
            return place


def _alone(schema: dict[str, Any], place: list[str | int]) -> dict[str, Any]:
    """A schema that is the part at this place: the whole one becomes a definition, where its references lead."""
    root = {key: value for key, value in schema.items() if key not in ("$schema", "$id", EXTENSION)}
    pointer = "".join("/" + quote(str(key).replace("~", "~0").replace("/", "~1")) for key in place)
    alone = {"$ref": f"#/$defs/root{pointer}", "$defs": {"root": _below(root)}}
    return {**alone, EXTENSION: schema[EXTENSION]} if EXTENSION in schema else alone


def _below(value: Any) -> Any:
    """The same with references to where the root is now."""
    if isinstance(value, list):
        return [_below(each) for each in value]
    if not isinstance(value, dict):
        return value
    inner = {key: _below(each) for key, each in value.items()}
    reference = inner.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        inner["$ref"] = f"#/$defs/root{reference[1:]}"
    return inner


def _bound(seconds: float) -> None:
    """Of memory, and of seconds that are computed, whatever others compute meanwhile."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (max(1, round(seconds)), max(2, round(seconds) + 1)))


def _tried(schema: str) -> str:
    """What is wrong with a schema; "" where nothing is found."""
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
    matcher: Any = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0, limits=limits)
    for step in range(STEPS):
        bits = matcher.compute_bitmask()
        allowed = [token for token in range(256) if bits[token // 8] >> token % 8 & 1]
        if matcher.is_error() or matcher.is_stopped() or not allowed:
            break
        matcher.consume_token(allowed[0 if step % 2 else -1])
    return str(matcher.get_error())


if __name__ == "__main__":
    sys.exit(main())

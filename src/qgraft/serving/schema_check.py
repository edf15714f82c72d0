"""Whether schemas can be followed at all: tried in a process of its own, as `python -m qgraft.serving.schema_check SECONDS`.

A schema comes from whoever may ask. Some take llguidance minutes (twenty patterns at once), some end its process (references
through thousands of others fill the stack). So each is read here first, with little stack, within bounds of memory and
time, and some tokens are taken. stdin: a list of schemas as JSON texts. stdout: why one is refused. Exit status 0: none is.
"""

import json
import sys
import threading
from typing import Any

STACK, MEMORY = 1 << 20, 2 << 30  # bytes; the server's threads have several times that stack
STEPS = 24


def main() -> int:
    """See the module."""
    schemas, reasons = json.load(sys.stdin), list[str]()
    _bound(float(sys.argv[1]))
    threading.stack_size(STACK)
    thread = threading.Thread(target=lambda: reasons.extend(filter(None, map(_tried, schemas))))
    thread.start()
    thread.join()
    print("\n".join(reasons[:1]))
    return 1 if reasons else 0


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

"""What a metadata key of a GGUF file must say, where only that is computed: predicates for the tables of gguf_keys.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qgraft.checkpoints.gguf_header import Header, is_number


@dataclass(frozen=True)
class Must:
    """A key that is refused unless what it says is computed anyway: when that is, and in words."""

    holds: Callable[[Header, Any], bool]
    expected: str


def one_of(*values: float) -> Must:
    """One of these numbers, or a list of such."""
    words = " or ".join(str(value) for value in values)
    return Must(lambda _, got: all(near(each, values) for each in (got if isinstance(got, list) else [got])), words)


def near(got: Any, values: tuple[float, ...]) -> bool:
    """Whether what a file says is one of these, as float32 rounds them; True and False are no numbers."""
    if isinstance(got, bool) or isinstance(values[0], bool):
        return got in values and isinstance(got, bool)
    return is_number(got) and any(math.isclose(got, value, rel_tol=1e-5) for value in values)


def same(what: str, value: Callable[[Header], float]) -> Must:
    """What another key says, or follows from others."""
    return Must(lambda header, got: near(got, (value(header),)), what)


def positions_of_texts(header: Header, sections: Any) -> bool:
    """Whether every rotated pair is in one of the first three sections, interleaved: in the fourth a text's position is 0."""
    if (
        not isinstance(sections, list)
        or len(sections) != 4
        or not all(type(each) is int and each >= 0 for each in sections)
    ):
        return False
    return any(sections) and all(
        place < 3 * sections[place % 3] for place in (pair % sum(sections) for pair in range(header.rotated // 2))
    )


def whole_context(header: Header, window: Any) -> bool:
    """A window that nothing of the context is outside of, or none."""
    return window in (0, None) or (is_number(window) and window >= header.count("context_length"))


def if_yarn(must: Must) -> Must:
    """A key that only yarn has a use for."""

    def holds(header: Header, got: Any) -> bool:
        return header.get("rope.scaling.type") != "yarn" or must.holds(header, got)

    return Must(holds, f"{must.expected}, where rope.scaling.type is yarn")


def if_experts(must: Must) -> Must:
    """A key that only experts have a use for."""
    return Must(lambda header, got: not header.get("expert_count") or must.holds(header, got), must.expected)

"""Which layers of the decoder an adapter is put in: PEFT's `layers_to_transform`.

The layer of a module is the first number behind a name in its path, as PEFT reads it:

    model.layers.15.self_attn.q_proj      15
    transformer.h.3.attn.c_attn            3
    lm_head                                none: with layers_to_transform it gets no adapter

Adapters in the upper layers only train in less time: the backward pass ends at the lowest of them, and what enters it
is the same in every epoch (passes/frozen_cache.py).
"""

import re
from collections.abc import Iterable, Sequence

from qgraft.errors import OptionError
from qgraft.patterns import first_group

LayerNumbers = int | str | Sequence[int]  # 15, "15-29", "15,16,20-29", [15, 16]

_PATH = re.compile(r".*?\.[^.]*\.(\d+)\.")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def parse_layers(layers: LayerNumbers) -> tuple[int, ...]:
    """The numbers of layers, sorted; raises OptionError for what names none."""
    if isinstance(layers, int):
        layers = [layers]
    if not isinstance(layers, str | Sequence):
        raise OptionError(f"layers_to_transform={layers!r}: expected numbers of layers, counted from 0")
    if not isinstance(layers, str):
        wrong = [number for number in layers if type(number) is not int or number < 0]
        if wrong or not layers:
            raise OptionError(f"layers_to_transform={list(layers)}: expected numbers of layers, counted from 0")
        return tuple(sorted(set(layers)))
    found: set[int] = set()
    for part in layers.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise OptionError(
                f'layers_to_transform={layers!r}: expected numbers of layers such as "15-29" or "15,16,17"'
            )
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def layer_number(path: str, patterns: str | Sequence[str] | None = None) -> int | None:
    """The layer of the module at `path`, None where it is in none.

    Args:
        patterns: PEFT's `layers_pattern`: how the list of layers is called, "layers" or ["h", "layers"]; None for any.
    """
    match = _PATH.match(path)
    if patterns:
        names = [patterns] if isinstance(patterns, str) else patterns
        found = (first_group(list_pattern(name), path) for name in names)
        number = next(
            (each for each in found if each and each.isdecimal()), None
        )  # a group of the pattern's own is none
        return None if number is None else int(number)
    return int(match[1]) if match else None


def list_pattern(name: str) -> str:
    """The pattern whose first group is the number behind a list of layers of this name, one of PEFT's `layers_pattern`."""
    return rf"(?:^|.*?\.){name}\.(\d+)\."


def within_layers(paths: Iterable[str], layers: Sequence[int]) -> list[str]:
    """Those of the module paths that are in one of these layers. Raises OptionError where a layer has none of them."""
    numbers = {path: layer_number(path) for path in paths}
    there = {number for number in numbers.values() if number is not None}
    if missing := sorted(set(layers) - there):
        said = f"{min(there)} to {max(there)}" if there else "none"
        more = f", ... ({len(missing)} in all)" if len(missing) > 8 else ""
        raise OptionError(
            f"layers_to_transform: no target layer in {', '.join(map(str, missing[:8]))}{more}; "
            f"there are targets in layers {said}"
        )
    return [path for path, number in numbers.items() if number in layers]

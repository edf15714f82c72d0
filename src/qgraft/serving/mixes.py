"""The adapters of a request, as passes need them: LoRAs for their tokens, prefixes in front of their keys.

    {"law": 0.7, "style": 1.0}  ->  loras {"law": 0.7}, prefixes ("style",), root (("law", 3, 0.7), ("style", 5, 1.0))

The root says under what keys and values were computed: adapters by the number of their loading, as another adapter may be
loaded under the name of one that is gone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qgraft.adapters.attach_prefix import prefixes_of
from qgraft.adapters.base import selection_of
from qgraft.adapters.choose import check_weights
from qgraft.adapters.token_rows import check_together
from qgraft.errors import OptionError

_COUNT = count(1)
_NUMBERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # of an adapter's loading, by the first of its parts


@dataclass(frozen=True)
class Mix:
    """See the module.

    Attributes:
        shift: how many positions the prefixes take.
        length: how many slots they take.
    """

    loras: Mapping[str, float]
    prefixes: tuple[str, ...]
    root: tuple[tuple[str, int, float], ...]
    shift: int = 0
    length: int = 0


def mix_of(model: nn.Module, adapters: Mapping[str, float]) -> Mix:
    """The mix of these adapters. Raises AdapterError for one that is not attached, OptionError for an impossible weight."""
    selection = selection_of(model)
    selection.require(adapters)
    check_weights(adapters)
    check_together(selection.adapters, adapters)
    attached = selection.adapters
    prefixes = tuple(name for name in adapters if attached[name].is_prefix)
    if wrong := [f"{name}={adapters[name]}" for name in prefixes if adapters[name] != 1]:
        raise OptionError(
            f"weights of prefixes: got {', '.join(wrong)}, expected 1",
            hint="a prefix is there or not: attention is not proportional to its keys, so a share of one means nothing",
        )
    loras = {name: float(weight) for name, weight in adapters.items() if name not in prefixes}
    root = tuple((name, _number(next(iter(attached[name].parts.values()))), float(adapters[name])) for name in adapters)
    home = prefixes_of(model) if prefixes else None
    length = sum(home.encoder(name).config.pre_seq_len for name in prefixes) if home else 0
    return Mix(loras, prefixes, root, length if home and home.counted else 0, length)


def _number(part: nn.Module) -> int:
    return _NUMBERS[part] if part in _NUMBERS else _NUMBERS.setdefault(part, next(_COUNT))


@torch.inference_mode()
def prefix_layers(model: nn.Module, mix: Mix) -> list[tuple[int, Tensor, Tensor]]:
    """(number of a layer, keys [G, P, D], values) of the mix's prefixes, one after another."""
    home = prefixes_of(model)
    assert home is not None
    stacked = torch.cat([home.encoder(name).key_values() for name in mix.prefixes], dim=2)
    return [(layer, stacked[2 * i], stacked[2 * i + 1]) for i, layer in enumerate(home.geometry.layers)]

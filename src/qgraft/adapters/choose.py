"""Choose which of a model's adapters are active, LoRAs and prefixes alike; selection.py says what that means when."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from qgraft.adapters.base import selection_of
from qgraft.adapters.token_rows import check_together
from qgraft.adapters.whole import has_whole
from qgraft.errors import OptionError
from qgraft.given import described
from qgraft.ranges import FINITE


def use_adapter(model: nn.Module, adapter: str | Mapping[str, float] | None) -> None:
    """Make one adapter active ("law"), a weighted few ({"law": 0.7, "med": 0.3}), or none (None), for all threads.

    It is a default: a call of the model that has begun, or is within adapters_off(), goes on by its own, and one with
    `adapter_names` names its own. The active adapters are the ones that train: their weights require gradients, all
    others do not.
    Raises AdapterError when a name is not attached, OptionError for a weight that is not finite, or not 1 for a prefix,
    UnsupportedError while another thread trains or merges.
    """
    weights = weights_given(adapter)
    selection = selection_of(model)
    selection.require(weights)
    check_weights(weights)
    if wrong := [
        f"{name}={weights[name]}" for name in weights if selection.adapters[name].is_prefix and weights[name] != 1
    ]:
        raise OptionError(
            f"weights of prefixes: got {', '.join(wrong)}, expected 1",
            hint="a prefix is there or not: attention is not proportional to its keys, so a share of one means nothing",
        )
    check_together(selection.adapters, weights)
    heads = has_whole(selection.adapters[name] for name in weights)
    if heads and (len(heads) > 1 or weights[heads[0]] != 1):
        raise OptionError(
            f"weights of classifiers: got {', '.join(f'{name}={weights[name]}' for name in heads)}, expected one with 1",
            hint="heads have no sum: choose one adapter, or name one for each row with adapter_names",
        )
    selection.choose(weights)


def weights_given(adapter: Any) -> dict[str, float]:
    """The weights that use_adapter's argument stands for. Raises OptionError for another kind of value."""
    if adapter is None or isinstance(adapter, str):
        return {} if adapter is None else {adapter: 1.0}
    if not isinstance(adapter, Mapping):
        named = [name for name in adapter if isinstance(name, str)] if isinstance(adapter, list | tuple) else []
        raise OptionError(
            f"use_adapter: got {described(adapter)}, expected a name, weights by names, or None for the base",
            hint=f"use_adapter(model, {dict.fromkeys(named or ['law'], 1.0)})",
        )
    return dict(adapter)


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise OptionError for a weight that is no number, or not finite."""
    wrong = [f"{name}={weight!r}" for name, weight in weights.items() if weight not in FINITE]
    if wrong:
        raise OptionError(f"weights of adapters: got {', '.join(wrong)}, expected finite numbers")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the base, in this thread or asyncio task alone; afterwards adapters are active again.

    A thread that is started in the block does not know of it.
    """
    with selection_of(model).within(None, weights={}):
        yield


def active_adapters(model: nn.Module) -> dict[str, float]:
    """The adapters with their weights that a call from here would go by."""
    return dict(selection_of(model).now().weights)

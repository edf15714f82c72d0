"""Replicas: the modules of a model once more, around the same weights.

A replica is what a training run may take for its own: its configuration, its attention, what is active on it and whether
it trains are its own, and of the adapters it holds one. Parameters and buffers are the very same tensors, so a replica
takes a megabyte of modules, and what trains in it trains in the model.
"""

import copy
from itertools import chain
from typing import TypeVar

from torch import nn

from qgraft.adapters.attach import adapter_names, detach_adapter, lora_modules, share, wrapped
from qgraft.adapters.rows import accept_rows
from qgraft.adapters.selection import one_at_a_time

Model = TypeVar("Model", bound=nn.Module)


def replicate(model: Model, keep: str) -> Model:
    """A replica of the model with the adapter `keep`, if it has one of that name, and no other."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    replica = copy.deepcopy(model, shared)
    for name in adapter_names(replica):
        if name != keep:
            detach_adapter(replica, name)
    return replica


@one_at_a_time
def adopt_lora(model: nn.Module, replica: nn.Module, name: str) -> None:
    """Put the LoRA `name` that was attached to a replica on the model, inactive: the same modules in both."""
    if name in adapter_names(model):
        return
    selection = share(model)
    for path, lora in lora_modules(replica, name):
        wrapped(model, path, selection).loras[name] = lora
        selection.add(name, lora)
    accept_rows(model, selection)

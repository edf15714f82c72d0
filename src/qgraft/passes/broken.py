"""Where NaN and infinity come from: the base's file, the adapter, or the computation itself."""

import math

import torch
from torch import nn

from qgraft.adapters.base import adapter_names, base_of, find_adapter
from qgraft.adapters.states import non_finite
from qgraft.errors import TrainingError
from qgraft.experts import PackedLayer
from qgraft.formats import dequantize


def check_held_out(model: nn.Module, loss: float) -> None:
    """Raise TrainingError for a held-out loss that is no number, which says where that comes from."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the held-out loss is {loss}",
            hint=where_it_comes_from(model) or "weights are numbers, so the computation overflows: lower learning_rate",
        )


def where_it_comes_from(model: nn.Module) -> str | None:
    """What of the model holds NaN or infinity, in a sentence; None where all of it are numbers."""
    for name in adapter_names(model):
        if broken := non_finite(find_adapter(model, name).state_dict()):
            return f"the adapter {name!r} holds NaN or infinity, in {broken[0]}: load it again, or start anew"
    if path := _broken_weight(model):
        info = base_of(model).info
        return (
            f"the base holds NaN or infinity, in {path}: {info.source if info else 'its file'} is broken, not the rows"
        )
    return None


@torch.no_grad()
def _broken_weight(model: nn.Module) -> str | None:
    """The path of a weight of the base that is not finite. Unpacks one layer after the other."""
    for path, module in model.named_modules():
        weights = [(name, weight.detach()) for name, weight in module.named_parameters(recurse=False)]
        if isinstance(module, PackedLayer):
            weights.append(("weight", dequantize(module.packed_weight.get(), torch.float32)))
        for name, weight in weights:
            if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
                return f"{path}.{name}"
    return None

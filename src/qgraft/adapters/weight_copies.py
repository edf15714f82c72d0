"""Copies of the base's weights that adapter files hold beside what was trained: are they of this base?

PEFT puts them beside LoRAs on the embedding or the output layer, and beside others where it is asked to.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.formats import PackedTensor, dequantize, take_rows

_COMPARED_ROWS = 256  # of a copy of a layer with all of its rows, of which there may be 262,144
# How far, relative to the base's weight, a copy may be from it: bfloat16 rounds by 0.004, two bits by 0.3.
_FLOATS_APART, _PACKED_APART = 0.01, 0.5


def copy_problem(path: str, layer: nn.Module, copy: Tensor) -> str | None:
    """What tells a copy of the weight [out, in] of the base's layer from it; None where it is the same, but for rounding."""
    weight, bits = _weight_of(layer)
    if list(copy.shape) != list(weight.shape) or not copy.is_floating_point():
        got, expected = f"{copy.dtype} {list(copy.shape)}", list(weight.shape)
        return f"{path}: got a copy of the base's weight {got}, expected {expected}: was its vocabulary extended?"
    index = torch.linspace(0, len(copy) - 1, min(len(copy), _COMPARED_ROWS)).long()
    ours = (
        dequantize(take_rows(weight, index), torch.float32)
        if isinstance(weight, PackedTensor)
        else weight[index].float()
    )
    apart = float((copy[index].float() - ours.cpu()).norm() / ours.norm().clamp(min=1e-30))
    if apart <= max(_FLOATS_APART, min(_PACKED_APART, 2.0 ** (2 - bits))):  # rounding to n bits moves by about 2^-n
        return None
    return f"{path}: the copy of the base's weight is another than this base's (relative difference {apart:.2g})"


def _weight_of(layer: Any) -> tuple[PackedTensor | Tensor, float]:
    """(the weight of the base's layer, its bits)."""
    if not hasattr(layer, "packed_weight"):
        return layer.weight.detach(), 16.0
    packed: PackedTensor = layer.packed_weight.get()
    return packed, 8.0 * packed.nbytes / math.prod(packed.shape)

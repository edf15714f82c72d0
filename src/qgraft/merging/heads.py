"""Merging an adapter of a classifier: its head becomes the base's, its deltas go into the weights without a calibration.

A calibrated merge goes by the logits of next tokens, which a classifier does not have; layers that hold floats need none,
as the delta is added and rounded to their 16 or 32 bits, and a folder holds no 4-bit blocks anyway. So method auto is
nearest where all merged layers are, or become (to=), floats, and is refused elsewhere.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from qgraft.adapters.base import find_adapter
from qgraft.adapters.holder import set_module
from qgraft.adapters.whole import WholeHolder, whole_modules
from qgraft.errors import DataError, UnsupportedError, option
from qgraft.formats import PackedTensor
from qgraft.merging.layer import CHAINS
from qgraft.model_parts import CAUSAL, task_of

FLOATS = ("f32", "f16", "bf16")


def settle_method(model: nn.Module, method: str, starts: Mapping[str, PackedTensor]) -> str:
    """The method that `method` stands for with this model and these layers, in the formats of their merged weights.

    Raises UnsupportedError for a classifier with a method that needs a calibration.
    """
    if task_of(model) == CAUSAL or method not in CHAINS:
        return method
    packed = sorted({start.format for start in starts.values()} - {*FLOATS})
    if method != "auto" or packed:
        raise UnsupportedError(
            f"merge: method {method} goes by next tokens, and the model is a classifier"
            + (f" with layers in {', '.join(packed)}" if packed else ""),
            hint=f"{option('to', 'f16')} adds the deltas to floats and loses nothing but their rounding; "
            f"{option('method', 'nearest')} keeps the formats, and little of the adapter in 4 bits",
        )
    return "nearest"


def no_classifier_rows() -> None:
    """What is found of rows for a classifier: none."""
    raise DataError("the model is a classifier", hint="`qgraft eval` measures the merged folder")


@contextmanager
def heads_merged(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Module]]:
    """Give the base the heads of these adapters; yields its own. Where the block fails it gets them back."""
    own = {}
    for name in names:
        for path, part in whole_modules(find_adapter(model, name)).items():
            holder: Any = model.get_submodule(path)
            own[path] = holder.base
            dtype = next(holder.base.parameters()).dtype
            holder.base = copy.deepcopy(part.module).to(dtype).requires_grad_(False).train(holder.training)
    kept = False
    try:
        yield own
        kept = True
    finally:
        if not kept:
            put_heads(model, own)


def put_heads(model: nn.Module, heads: Mapping[str, nn.Module]) -> None:
    """Put modules of the base at these paths, within what adapters have there."""
    for path, module in heads.items():
        there: Any = model.get_submodule(path)
        if isinstance(there, WholeHolder):
            there.base = module
        else:
            set_module(model, path, module)

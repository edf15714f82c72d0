"""Merging an adapter of a classifier: its head becomes the base's, as it is; its deltas go into the packed weights.

Layers that hold floats, or become floats (to=), need no calibration: the delta is added and rounded to their 16 or 32 bits,
so method auto is nearest there. Others are solved on labelled rows and compared by the logits of the labels (outputs.py). All
that is compared has the head of the adapter: it is kept whole, and what a drawn head says of the base's states is no measure
of what the layers lost.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qgraft.adapters.base import find_adapter
from qgraft.adapters.holder import set_module
from qgraft.adapters.whole import WholeHolder, whole_modules
from qgraft.data.label_schemes import NUMBER
from qgraft.errors import DataError, UnsupportedError, option
from qgraft.formats import PackedTensor
from qgraft.merging.layer import CHAINS
from qgraft.passes.labels import classifier_of

FLOATS = ("f32", "f16", "bf16")


def settle_method(model: PreTrainedModel, method: str, starts: Mapping[str, PackedTensor]) -> str:
    """The method that `method` stands for with this model and these layers, in the formats of their merged weights.

    Raises UnsupportedError for a model of numbers with a method that goes by what the model says.
    """
    classifier = classifier_of(model)
    if classifier is None or method not in CHAINS:
        return method
    packed = sorted({start.format for start in starts.values()} - {*FLOATS})
    if method == "auto" and not packed:
        return "nearest"
    if classifier.problem == NUMBER:
        raise UnsupportedError(
            f"merge: method {method} goes by how likely labels are, and the model says numbers ({NUMBER})"
            + (f", with layers in {', '.join(packed)}" if packed else ""),
            hint=f"{option('to', 'f16')} adds the deltas to floats and loses nothing but their rounding; "
            f"{option('method', 'nearest')} keeps the formats, and little of the adapter in 4 bits",
        )
    return method


def is_comparable(model: PreTrainedModel) -> bool:
    """Whether what the model says can be measured by a merge: tokens and labels, not numbers."""
    classifier = classifier_of(model)
    return classifier is None or classifier.problem != NUMBER


def no_number_rows() -> None:
    """What is found of rows for a model of numbers: none."""
    raise DataError("the model says numbers", hint="`qgraft eval` measures the merged folder")


def _give_heads(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Give the base the heads of these adapters; returns its own."""
    own = {}
    for name in names:
        for path, part in whole_modules(find_adapter(model, name)).items():
            holder: Any = model.get_submodule(path)
            own[path] = holder.base
            dtype = next(holder.base.parameters()).dtype
            holder.base = copy.deepcopy(part.module).to(dtype).requires_grad_(False).train(holder.training)
    return own


@contextmanager
def heads_merged(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Module]]:
    """Give the base the heads of these adapters; yields its own. Where the block fails it gets them back."""
    own, kept = _give_heads(model, names), False
    try:
        yield own
        kept = True
    finally:
        if not kept:
            put_heads(model, own)


@contextmanager
def heads_lent(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within the block the base, and so what is merged into it, has the heads of these adapters."""
    own = _give_heads(model, names)
    try:
        yield
    finally:
        put_heads(model, own)


def put_heads(model: nn.Module, heads: Mapping[str, nn.Module]) -> None:
    """Put modules of the base at these paths, within what adapters have there."""
    for path, module in heads.items():
        there: Any = model.get_submodule(path)
        if isinstance(there, WholeHolder):
            there.base = module
        else:
            set_module(model, path, module)

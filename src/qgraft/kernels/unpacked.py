"""Copies of packed weights in half precision, kept on a GPU that has room for them.

A product of many rows unpacks its weight each time: 5 % of a step of 8192 tokens of a 7B's shape, half of a pass of 8. A copy
takes 2 bytes a weight, and is the same bits. It is found by where the packed bytes lie, for as long as they are what
they were: weights that are exchanged or written to are unpacked again.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qgraft.formats import PackedTensor, dequantize

_STORED = ("f32", "f16", "bf16")
_kept: dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]] = {}  # (bytes, how often written to, copy)
_filling = threading.Lock()


@contextmanager
def kept_unpacked(weights: Iterable[PackedTensor], dtype: torch.dtype, room: int) -> Iterator[int]:
    """Within the block the first of the weights, as many as `room` bytes hold, are there in `dtype`; yields how many.

    Float formats need no copies, and tensors of inference mode get none: of these nobody could tell whether they changed.
    """
    own = []
    try:
        with _filling:
            for packed in weights:
                size, key = packed.shape[0] * packed.shape[1] * dtype.itemsize, _key(packed, dtype)
                part = packed.parts[0]
                if size > room or packed.format in _STORED or part.is_inference() or key in _kept:
                    continue
                _kept[key] = part, part._version, dequantize(packed, dtype)
                own.append(key)
                room -= size
        yield len(own)
    finally:
        for key in own:
            _kept.pop(key, None)


def unpacked(packed: PackedTensor, dtype: torch.dtype) -> Tensor | None:
    """The copy [out, in] of a weight; None where none is kept. Not to be written to."""
    if not _kept:
        return None
    known = _kept.get(_key(packed, dtype))
    if known is None or known[0]._version != known[1] or known[2].shape != packed.shape:
        return None
    return known[2]


def _key(packed: PackedTensor, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    return packed.parts[0].data_ptr(), dtype

"""Copies of packed weights in half precision, kept on a GPU that has room for them.

A product of many rows unpacks its weight each time: of a 7B's shape and 8192 tokens 5 % of a step, of a pass of 8 tokens half.
A copy takes 2 bytes a weight, and is the same bits. It is found by where the packed bytes lie, for as long as they are what
they were: weights that are exchanged or written to are unpacked again.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qgraft.formats import PackedTensor, dequantize

_kept: dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]] = {}  # (bytes, how often written to, copy)
_filling = threading.Lock()


@contextmanager
def kept_unpacked(weights: Iterable[PackedTensor], dtype: torch.dtype, room: int) -> Iterator[int]:
    """Within the block the first of the weights, as many as `room` bytes hold, are there in `dtype`; yields how many.

    A weight that is stored in `dtype` needs no copy, one that is kept already no other.
    """
    own = []
    try:
        with _filling:
            for packed in weights:
                size, key = packed.shape[0] * packed.shape[1] * dtype.itemsize, _key(packed, dtype)
                if size > room or unpacked(packed, dtype) is not None or packed.format in _STORED:
                    continue
                part = packed.parts[0]
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


_STORED = ("f32", "f16", "bf16")


def _key(packed: PackedTensor, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    return packed.parts[0].data_ptr(), dtype

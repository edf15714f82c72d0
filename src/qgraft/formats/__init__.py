"""Formats: what the bits of a stored weight matrix mean.

A format is a name and pure functions on tensors, on any device (packed.py draws the line between the two families):

    dequantize(packed, dtype) -> [out, in]      quantize(w_OI) -> PackedTensor (None: qgraft only reads the format)

`FORMATS` is the whole list; nothing registers itself. To add a format:

    1. Write its `decode_*` and `encode_*` in a file of its family (ggml.py, kquants.py, rowwise.py; a new family gets
       its own file), with the bit layout drawn in the docstring.
    2. Add one line to `FORMATS` here, and for a tensor type of GGUF its id to `GGML_TYPES`.
    3. Add a test that compares it bit for bit with the original implementation, or with bytes made by it.
"""

from typing import Final

import torch
from torch import Tensor

from qgraft.errors import UnsupportedError, near_match
from qgraft.formats import ggml, kquants
from qgraft.formats.ggml import block_format
from qgraft.formats.packed import Format, PackedTensor
from qgraft.formats.rowwise import rowwise_format

__all__ = ["FORMATS", "GGML_TYPES", "Format", "PackedTensor", "dequantize", "get_format", "quantize"]

_ALL = (
    rowwise_format("chatglm-int4", bits=4),
    rowwise_format("chatglm-int8", bits=8),
    # name, weights in a block, bytes of a block, decode, encode
    block_format("f32", 1, 4, ggml.decode_f32, ggml.encode_f32),
    block_format("f16", 1, 2, ggml.decode_f16, ggml.encode_f16),
    block_format("bf16", 1, 2, ggml.decode_bf16, ggml.encode_bf16),
    block_format("q4_0", 32, 18, ggml.decode_q4_0, ggml.encode_q4_0),
    block_format("q4_1", 32, 20, ggml.decode_q4_1, ggml.encode_q4_1),
    block_format("q5_0", 32, 22, ggml.decode_q5_0, ggml.encode_q5_0),
    block_format("q5_1", 32, 24, ggml.decode_q5_1, ggml.encode_q5_1),
    block_format("q8_0", 32, 34, ggml.decode_q8_0, ggml.encode_q8_0),
    block_format("q2_k", 256, 84, kquants.decode_q2_k),
    block_format("q3_k", 256, 110, kquants.decode_q3_k),
    block_format("q4_k", 256, 144, kquants.decode_q4_k),
    block_format("q5_k", 256, 176, kquants.decode_q5_k),
    block_format("q6_k", 256, 210, kquants.decode_q6_k),
)
FORMATS: Final[dict[str, Format]] = {each.name: each for each in _ALL}

GGML_TYPES: Final[dict[int, str]] = {  # tensor type id in a GGUF file (enum ggml_type in ggml.h) -> key of FORMATS
    0: "f32",
    1: "f16",
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    10: "q2_k",
    11: "q3_k",
    12: "q4_k",
    13: "q5_k",
    14: "q6_k",
    30: "bf16",
}


def get_format(name: str) -> Format:
    """The format called `name` (lower case); UnsupportedError, with the closest names, when there is none."""
    if name in FORMATS:
        return FORMATS[name]
    message = f"unknown format: got {name!r}, expected one of {', '.join(sorted(FORMATS))}"
    raise UnsupportedError(message, hint=near_match(name.lower(), FORMATS))


def dequantize(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """The weight that `packed` stands for, [out, in] of `dtype`, in memory of its own."""
    return get_format(packed.format).dequantize(packed, dtype)


def quantize(w_OI: Tensor, format: str) -> PackedTensor:
    """Pack `w_OI` [out, in] (floating point) in `format`, rounding as the original implementation does.

    UnsupportedError: unknown or read-only format, NaN or infinite weights, a width the format has no blocks for.
    """
    chosen = get_format(format)
    if chosen.quantize is None:
        writable = ", ".join(sorted(name for name, each in FORMATS.items() if each.quantize is not None))
        raise UnsupportedError(f"{format}: qgraft reads this format but cannot write it", hint=f"write {writable}")
    if bad := w_OI.numel() - int(w_OI.isfinite().sum()):
        raise UnsupportedError(
            f"{format}: got {bad} of {w_OI.numel()} weights NaN or infinite, expected all of them finite",
            hint="the weights were broken before: look at the run or the file that they come from",
        )
    return chosen.quantize(w_OI)

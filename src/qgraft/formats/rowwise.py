"""ChatGLM's row-wise formats: signed integers and one scale for each output row.

    chatglm-int8   data int8 [out, in]        one weight a byte, -127..127
    chatglm-int4   data int8 [out, in // 2]   two weights a byte, two's complement, -7..7 (-8 is read, never written)

                     byte 0     byte 1     byte 2
                   [ 0  | 1  ][ 2  | 3  ][ 4  | 5  ] ...     high nibble | low nibble = even column | odd column

    weight[o, i] = q[o, i] * scale[o]
    scale[o]     = max|w[o]| / 127 (int8) or / 7 (int4),   q = w / scale, rounded half to even

There is no zero point, no group and no outlier column. Scale and quotient are computed in the dtype of `w`, and the
scale is kept in it: the released checkpoints were made from float16, so their float16 scale is the divisor. bfloat16
has no place in these checkpoints: there both are computed in float32, from the scale already rounded to float16.

Two cases the original leaves open. A scale of 0 (row of zeros, or of numbers so small that the scale underflows) would
divide by zero: here the row keeps scale 0 and codes 0, which dequantize to exact zeros. A subnormal float16 scale can
be a third too small, and the original's codes then wrap around to the other sign: here they stop at 127 or 7.

Source: ChatGLM-6B and ChatGLM2-6B, quantization.py and its C and CUDA kernels (`extract_int4_weight_to_half`, ...).
Exactness: bit for bit equal to the original in both directions: quantizing float16 and float32, dequantizing to float32
(the CPU kernel) and to float16 (the CUDA kernel: one rounding of the product of two float16).

Not chosen: float32 scales throughout, which round trips better but is not what the files hold.
"""

from functools import partial

import torch
from torch import Tensor

from qgraft.errors import UnsupportedError
from qgraft.formats.grid import Grid, combine, require_range
from qgraft.formats.packed import Format, PackedTensor, Part

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def rowwise_format(name: str, bits: int) -> Format:
    """The ChatGLM format `name` of 4 or 8 bits."""
    dequantize, quantize = partial(_dequantize, bits), partial(_quantize, name, bits)
    unpack, pack = partial(_unpack, bits), partial(_pack, name, bits)
    data = Part("data", (torch.int8,), lambda rows, columns: (rows, columns * bits // 8))
    scale = Part("scale", SCALE_DTYPES, lambda rows, columns: (rows,))
    return Format(name, 8 // bits, (data, scale), dequantize, quantize, unpack, pack)


def unpack_int4(data_OB: Tensor) -> Tensor:
    """[out, in // 2] int8 -> [out, in] int8 in -8..7, the high nibble first."""
    return torch.stack([data_OB >> 4, (data_OB << 4) >> 4], dim=-1).flatten(1)  # shifts of int8 keep the sign


def pack_int4(q_OI: Tensor) -> Tensor:
    """[out, in] int8 in -8..7, `in` even -> [out, in // 2] int8: the inverse of `unpack_int4`."""
    return (q_OI[:, 0::2] << 4) | (q_OI[:, 1::2] & 15)


def _unpack(bits: int, packed: PackedTensor) -> Grid:
    """Packed -> grid of one group a row; its codes share no memory with `packed`."""
    data, scale = packed.parts
    largest, d_O1 = _largest(bits), scale.to(torch.float32, copy=True)[:, None]
    codes_OI = data.clone() if bits == 8 else unpack_int4(data)
    return Grid(codes_OI, d_O1, low=-largest, high=largest, real_dtype=scale.dtype)


def _pack(name: str, bits: int, grid: Grid) -> PackedTensor:
    """The inverse of `_unpack`; UnsupportedError for an odd `in` at 4 bits."""
    _require_whole_bytes(name, bits, grid.codes.shape[1])
    grid.require(name, groups=1)
    require_range(name, "codes", grid.codes, -_largest(bits) - 1, _largest(bits))
    return _store(name, bits, grid.codes, grid.d[:, 0].to(grid.real_dtype))


def _dequantize(bits: int, packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """Packed -> [out, in] `dtype`; float16 multiplies two float16, every other dtype is cast from float32."""
    data, scale = packed.parts
    steps_O1 = scale[:, None].to(torch.float16 if dtype == torch.float16 else torch.float32)
    return combine(data if bits == 8 else unpack_int4(data), steps_O1, None).to(dtype)


def _quantize(name: str, bits: int, w_OI: Tensor) -> PackedTensor:
    """[out, in] floating point -> packed, scale in the dtype of `w_OI` (bfloat16: float16, float64: float32).

    UnsupportedError: an odd `in` at 4 bits, or a bfloat16 row too large for a float16 scale.
    """
    w_OI = w_OI.detach().float() if w_OI.dtype == torch.float64 else w_OI.detach()
    _require_whole_bytes(name, bits, w_OI.shape[1])
    largest = _largest(bits)
    scale_O = _row_scales(name, w_OI, largest)
    w_OI = w_OI.float() if w_OI.dtype == torch.bfloat16 else w_OI
    divisor_O1 = torch.where(scale_O == 0, torch.inf, scale_O)[:, None].to(w_OI.dtype)  # w / inf = 0
    return _store(name, bits, (w_OI / divisor_O1).round_().clamp_(-largest, largest).to(torch.int8), scale_O)


def _store(name: str, bits: int, q_OI: Tensor, scale_O: Tensor) -> PackedTensor:
    rows, width = q_OI.shape
    return PackedTensor(name, (rows, width), (q_OI if bits == 8 else pack_int4(q_OI), scale_O))


def _largest(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _require_whole_bytes(name: str, bits: int, width: int) -> None:
    if width % (8 // bits):
        raise UnsupportedError(
            f"{name}: got in_features = {width}, expected an even number (two weights share a byte)",
            hint="chatglm-int8 takes any width",
        )


def _row_scales(name: str, w_OI: Tensor, largest: int) -> Tensor:
    """max|w| / largest of each row, [out], in the dtype the scale is stored in."""
    if w_OI.dtype != torch.bfloat16:
        peak_O = w_OI.abs().amax(dim=1)
        return peak_O / torch.full_like(peak_O, largest)  # a tensor: CUDA multiplies by the reciprocal of a number
    peak_O = w_OI.float().abs().amax(dim=1)
    scale_O = (peak_O / torch.full_like(peak_O, largest)).to(torch.float16)
    if (too_large := int(scale_O.isinf().sum())) and peak_O.isfinite().all():
        raise UnsupportedError(
            f"{name}: got {too_large} rows whose scale does not fit in float16, expected max|w| / {largest} <= 65504",
            hint="give float32 weights: their scales stay float32",
        )
    return scale_O

"""GGML block formats: what the bytes of a tensor in a GGUF file mean.

A row of `in_features` weights is cut into blocks of neighbouring weights; each block carries its own scales, and
blocks and rows follow each other without gaps. Everything is little endian; `d` and `m` are float16, `q` are codes.

    name   weights  bytes  layout (byte offsets)                          weight j =
    q4_0      32     18    0 d | 2 qs[16]                                 d * (q[j] - 8)
    q4_1      32     20    0 d | 2 m | 4 qs[16]                           d * q[j] + m
    q5_0      32     22    0 d | 2 qh[4] | 6 qs[16]                       d * (q[j] - 16)
    q5_1      32     24    0 d | 2 m | 4 qh[4] | 8 qs[16]                 d * q[j] + m
    q8_0      32     34    0 d | 2 qs[32] int8                            q[j] * d
    f32 f16 bf16   1 weight of 4, 2, 2 bytes, no scales                   the number itself

    qs, 4 bits     byte j holds weight j in its LOW nibble and weight j + 16 in its HIGH nibble (not 2j and 2j + 1):

                       byte 0     byte 1         byte 15
                     [ 16 |  0 ][ 17 |  1 ] ... [ 31 | 15 ]      each byte written high nibble | low nibble

    qh, 5th bit    bit j % 8 of byte j // 8 is bit 4 of the code of weight j

The K-quants (blocks of 256 with quantized scales) are in kquants.py. All these layouts, theirs too, are one pattern:
a run of `group` bytes holds `8 / bits` runs of `group` codes, the lowest bits first. `read_fields` reads that pattern
and `write_fields` writes it, so that a format is the list of its fields and its formula.

Quantizing, x the 32 weights of a block, all of it in float32, d and m rounded to float16 only to be stored:

    q4_0, q5_0   d = (the x furthest from 0, with its sign; the first of several) / -8 or -16
                 q = trunc(x / d + 8.5 or 16.5), at most 15 or 31
    q4_1, q5_1   m = min(x), d = (max(x) - m) / 15 or 31, q = trunc((x - m) / d + 0.5)
    q8_0         d = max|x| / 127, q = x / d rounded half away from zero

where `/ d` is a product with the rounded reciprocal, 0 for d = 0. Codes that come out NaN or infinite (a block so
small that 1 / d overflows, or so wide that max - min does) are written as 0. Blocks whose d or m is beyond 65504 get
an infinite one, as in the C code.

Source: ggml-common.h and ggml-quants.c of llama.cpp (`block_q4_0`, `quantize_row_q4_0_ref`, ...) and `gguf.quants`
of the gguf package, 0.19. Exactness: both directions agree with `gguf.quants` bit for bit, except that NaN stays NaN
without its payload, and that the sign of a zero minimum is the one of the first zero of the block, as in the C code
(numpy's depends on its vector width); neither changes a dequantized value. Products d * q are exact in float32, so a
kernel that fuses `d * q + m` gives the same bits. The C code may quantize one code apart where its compiler fuses.

Not chosen: dividing by `d` (one rounding less, other bits), and dividing by a Python number, which CUDA turns into a
product with its reciprocal (other bits than the CPU).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qgraft.errors import UnsupportedError
from qgraft.formats.packed import Format, PackedTensor

# Shapes: N blocks (all rows, one after the other), a letter or number for what one block has.
Decode = Callable[[Tensor], Tensor]  # [N, block_bytes] uint8 -> [N, block_size] float32
Encode = Callable[[Tensor], Tensor]  # [N, block_size] float32 -> [N, block_bytes] uint8


def block_format(name: str, block_size: int, block_bytes: int, decode: Decode, encode: Encode | None = None) -> Format:
    """The ggml format `name`, made of the functions that decode and encode a stack of its blocks."""
    dequantize = partial(_dequantize, block_bytes, decode)
    quantize = None if encode is None else partial(_quantize, name, block_size, encode)
    return Format(name, "ggml", block_size, block_bytes, dequantize, quantize)


def _dequantize(block_bytes: int, decode: Decode, packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """[out, row_bytes] uint8 -> [out, in] `dtype`, computed in float32 and rounded once at the end."""
    return decode(packed.data.reshape(-1, block_bytes)).to(dtype).reshape(packed.shape)


def _quantize(name: str, block_size: int, encode: Encode, w_OI: Tensor) -> PackedTensor:
    """[out, in] floating point -> packed; UnsupportedError when `in` is not a multiple of `block_size`."""
    out_features, in_features = w_OI.shape
    if in_features % block_size:
        raise UnsupportedError(
            f"{name}: got in_features = {in_features}, expected a multiple of the block size {block_size}",
            hint="keep this tensor in f16 or bf16, which take any width",
        )
    blocks = encode(w_OI.detach().to(torch.float32).reshape(-1, block_size))  # [N, block_bytes] uint8
    row_bytes = in_features // block_size * blocks.shape[1]
    return PackedTensor(name, (out_features, in_features), blocks.reshape(out_features, row_bytes))


# ---------------------------------------------------------------- fields of a block


def read_float(raw_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, k * itemsize] uint8 holding numbers of `dtype` -> [N, k] float32; never shares memory with its input."""
    aligned = raw_NB.storage_offset() % dtype.itemsize == 0 and raw_NB.is_contiguous()
    raw_NB = raw_NB if aligned else raw_NB.clone(memory_format=torch.contiguous_format)
    return raw_NB.view(dtype).to(torch.float32, copy=True)


def read_half(raw_N2: Tensor) -> Tensor:
    """[N, 2] uint8, one float16 each -> [N, 1] float32."""
    return read_float(raw_N2, torch.float16)


def read_fields(raw_NB: Tensor, group: int, bits: int) -> Tensor:
    """Codes of `bits` bits from runs of `group` bytes: [N, B] uint8 -> [N, B * 8 / bits] uint8.

    A run's lowest bits give its first `group` codes, the next bits the next `group` codes, and so on.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw_NB.device).view(1, 1, -1, 1)
    runs = raw_NB.reshape(len(raw_NB), raw_NB.shape[1] // group, 1, group)
    return (runs >> shifts).bitwise_and_((1 << bits) - 1).flatten(1)


def write_fields(codes_NQ: Tensor, group: int, bits: int) -> Tensor:
    """The inverse of `read_fields`: [N, Q] uint8 codes below 2**bits -> [N, Q * bits / 8] uint8."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes_NQ.device).view(1, 1, -1, 1)
    runs = codes_NQ.reshape(len(codes_NQ), codes_NQ.shape[1] // (group * 8 // bits), 8 // bits, group)
    return (runs << shifts).sum(dim=2, dtype=torch.uint8).flatten(1)


def _half_bytes(values_N1: Tensor) -> Tensor:
    """[N, 1] float32 -> [N, 2] uint8, the bytes of the nearest float16."""
    return values_N1.to(torch.float16).view(torch.uint8)


def _read_codes5(high_N4: Tensor, low_N16: Tensor) -> Tensor:
    """[N, 4] and [N, 16] uint8 -> [N, 32] uint8 codes 0..31."""
    return read_fields(low_N16, 16, 4) | (read_fields(high_N4, 1, 1) << 4)


def _write_codes5(codes_N32: Tensor) -> Tensor:
    """[N, 32] uint8 codes 0..31 -> [N, 4 + 16] uint8: the fifth bits, then the nibbles."""
    return torch.cat([write_fields(codes_N32 >> 4, 1, 1), write_fields(codes_N32 & 15, 16, 4)], dim=1)


# ---------------------------------------------------------------- arithmetic shared by the encoders


def _divide(values_N1: Tensor, divisor: int) -> Tensor:
    """values / divisor with one rounding on every device (see "Not chosen" above)."""
    return values_N1 / torch.full_like(values_N1, divisor)


def _reciprocal(d_N1: Tensor) -> Tensor:
    """1 / d, and 0 for d = 0."""
    return torch.where(d_N1 == 0, 0.0, torch.ones_like(d_N1) / d_N1)


def _to_codes(values_NQ: Tensor, largest: int) -> Tensor:
    """Float32 >= 0 -> uint8, truncated, at most `largest`; NaN and infinities give 0."""
    return values_NQ.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp_(0, largest).to(torch.uint8)


def _fit_signed(x_N32: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale d [N, 1] and codes [N, 32] of q4_0 (`levels` 16) and q5_0 (32): x = d * (q - levels / 2)."""
    furthest = x_N32.gather(1, x_N32.abs().argmax(dim=1, keepdim=True))  # [N, 1], argmax gives the first of equals
    d = _divide(furthest, -levels // 2)
    return d, _to_codes((x_N32 * _reciprocal(d)).add_(levels // 2 + 0.5), levels - 1)


def _fit_affine(x_N32: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale d [N, 1], minimum m [N, 1] and codes [N, 32] of q4_1 (`levels` 16) and q5_1 (32): x = d * q + m."""
    m = x_N32.min(dim=1, keepdim=True).values  # min and max along a dim return the first of equals: sign of zero
    d = _divide(x_N32.max(dim=1, keepdim=True).values - m, levels - 1)
    return d, m, _to_codes(((x_N32 - m) * _reciprocal(d)).add_(0.5), levels - 1)


# ---------------------------------------------------------------- the formats


def decode_q4_0(blocks: Tensor) -> Tensor:
    """[N, 18] uint8 -> [N, 32] float32."""
    return read_fields(blocks[:, 2:], 16, 4).float().sub_(8).mul_(read_half(blocks[:, :2]))


def encode_q4_0(x_N32: Tensor) -> Tensor:
    """[N, 32] float32 -> [N, 18] uint8."""
    d, codes = _fit_signed(x_N32, levels=16)
    return torch.cat([_half_bytes(d), write_fields(codes, 16, 4)], dim=1)


def decode_q4_1(blocks: Tensor) -> Tensor:
    """[N, 20] uint8 -> [N, 32] float32."""
    d, m = read_half(blocks[:, :2]), read_half(blocks[:, 2:4])
    return read_fields(blocks[:, 4:], 16, 4).float().mul_(d).add_(m)


def encode_q4_1(x_N32: Tensor) -> Tensor:
    """[N, 32] float32 -> [N, 20] uint8."""
    d, m, codes = _fit_affine(x_N32, levels=16)
    return torch.cat([_half_bytes(d), _half_bytes(m), write_fields(codes, 16, 4)], dim=1)


def decode_q5_0(blocks: Tensor) -> Tensor:
    """[N, 22] uint8 -> [N, 32] float32."""
    return _read_codes5(blocks[:, 2:6], blocks[:, 6:]).float().sub_(16).mul_(read_half(blocks[:, :2]))


def encode_q5_0(x_N32: Tensor) -> Tensor:
    """[N, 32] float32 -> [N, 22] uint8."""
    d, codes = _fit_signed(x_N32, levels=32)
    return torch.cat([_half_bytes(d), _write_codes5(codes)], dim=1)


def decode_q5_1(blocks: Tensor) -> Tensor:
    """[N, 24] uint8 -> [N, 32] float32."""
    d, m = read_half(blocks[:, :2]), read_half(blocks[:, 2:4])
    return _read_codes5(blocks[:, 4:8], blocks[:, 8:]).float().mul_(d).add_(m)


def encode_q5_1(x_N32: Tensor) -> Tensor:
    """[N, 32] float32 -> [N, 24] uint8."""
    d, m, codes = _fit_affine(x_N32, levels=32)
    return torch.cat([_half_bytes(d), _half_bytes(m), _write_codes5(codes)], dim=1)


def decode_q8_0(blocks: Tensor) -> Tensor:
    """[N, 34] uint8 -> [N, 32] float32."""
    return blocks[:, 2:].view(torch.int8).float().mul_(read_half(blocks[:, :2]))


def encode_q8_0(x_N32: Tensor) -> Tensor:
    """[N, 32] float32 -> [N, 34] uint8."""
    d = _divide(x_N32.abs().amax(dim=1, keepdim=True), 127)
    scaled = (x_N32 * _reciprocal(d)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    size, whole = scaled.abs(), scaled.abs().floor()
    codes = scaled.sign() * (whole + (2 * (size - whole)).floor())  # half away from zero; torch.round goes to even
    return torch.cat([_half_bytes(d), codes.to(torch.int8).view(torch.uint8)], dim=1)


def decode_f32(blocks: Tensor) -> Tensor:
    """[N, 4] uint8 -> [N, 1] float32, a copy."""
    return read_float(blocks, torch.float32)


def encode_f32(x_N1: Tensor) -> Tensor:
    """[N, 1] float32 -> [N, 4] uint8, a copy."""
    return x_N1.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def decode_f16(blocks: Tensor) -> Tensor:
    """[N, 2] uint8 -> [N, 1] float32."""
    return read_half(blocks)


def encode_f16(x_N1: Tensor) -> Tensor:
    """[N, 1] float32 -> [N, 2] uint8; above 65504 gives infinity."""
    return _half_bytes(x_N1)


def decode_bf16(blocks: Tensor) -> Tensor:
    """[N, 2] uint8 -> [N, 1] float32."""
    return read_float(blocks, torch.bfloat16)


def encode_bf16(x_N1: Tensor) -> Tensor:
    """[N, 1] float32 -> [N, 2] uint8, rounded half to even."""
    return x_N1.to(torch.bfloat16).view(torch.uint8)

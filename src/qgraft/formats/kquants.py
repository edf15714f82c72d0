"""GGML K-quants, which qgraft reads only: blocks of 256 weights whose scales are themselves quantized.

    name  bytes   layout (byte offsets)                                   weight j, s = j // 16 (q4_k, q5_k: j // 32)
    q2_k    84    0 scales[16] | 16 qs[64] | 80 d | 82 dmin               (d * sc[s]) * q[j] - (dmin * mn[s])
    q3_k   110    0 hmask[32] | 32 qs[64] | 96 scales[12] | 108 d         (d * sc[s]) * q[j]
    q4_k   144    0 d | 2 dmin | 4 scales[12] | 16 qs[128]                (d * sc[s]) * q[j] - (dmin * mn[s])
    q5_k   176    0 d | 2 dmin | 4 scales[12] | 16 qh[32] | 48 qs[128]    (d * sc[s]) * q[j] - (dmin * mn[s])
    q6_k   210    0 ql[128] | 128 qh[64] | 192 scales[16] int8 | 208 d    (d * sc[s]) * (q[j] - 32)

Which bits are which weight, as `read_fields(bytes, group, bits)` of ggml.py reads them:

    2-bit codes in runs of 32 bytes   byte i of a run: bits 0-1 weight i, 2-3 weight i + 32, 4-5 i + 64, 6-7 i + 96
                                      (qs of q2_k and q3_k, qh of q6_k)
    nibbles in runs of 32 or 64       byte i of a run: low nibble weight i, high nibble weight i + 32 (q4_k, q5_k)
                                      or i + 64 (ql of q6_k)
    1-bit fields in one run of 32     byte i: bit k belongs to weight i + 32 k (hmask of q3_k, qh of q5_k)

    q2_k  scales   byte s: low nibble sc[s], high nibble mn[s]
    q3_k  code     q = (2 bits) - 4, or (2 bits) - 0 where the bit of hmask is 1: the mask is inverted
    q3_k  scales   6 bits less 32; low 4 bits: nibbles of bytes 0-7 (low nibbles s = 0..7, high s = 8..15);
                   high 2 bits: bytes 8-11, bits 0-1 s = 0..3, bits 2-3 s = 4..7, 4-5 s = 8..11, 6-7 s = 12..15
    q4_k, q5_k     6-bit sc and mn of 8 runs in 12 bytes; s = 0..3: sc is the low 6 bits of byte s, mn of byte s + 4;
          scales   s = 4..7: low 4 bits from byte s + 4 (low nibble sc, high nibble mn),
                   high 2 bits from the top bits of byte s - 4 (sc) and of byte s (mn)

Source: ggml-common.h and `dequantize_row_q*_K` in ggml-quants.c of llama.cpp, `gguf.quants` of the gguf package, 0.19.
Exactness: bit for bit equal to `gguf.quants` in float32 (NaN stays NaN without its payload).

Not chosen: writing them. Their scales are searched for, the result depends on the version of that search, and the
gguf package cannot write them either.
"""

import torch
from torch import Tensor

from qgraft.formats.ggml import read_fields, read_half

# Shapes: N blocks of S runs that share a scale, W weights in a run; S * W = 256.


def decode_q2_k(blocks: Tensor) -> Tensor:
    """[N, 84] uint8 -> [N, 256] float32."""
    scales_NS = blocks[:, :16]
    dl = read_half(blocks[:, 80:82]) * (scales_NS & 15).float()
    ml = read_half(blocks[:, 82:84]) * (scales_NS >> 4).float()
    return _scale_runs(read_fields(blocks[:, 16:80], 32, 2), dl, ml)


def decode_q3_k(blocks: Tensor) -> Tensor:
    """[N, 110] uint8 -> [N, 256] float32."""
    low = read_fields(blocks[:, 32:96], 32, 2)
    high = read_fields(blocks[:, :32], 32, 1)  # 1 where nothing is subtracted
    scale_low, scale_high = read_fields(blocks[:, 96:104], 8, 4), read_fields(blocks[:, 104:108], 4, 2)
    scales_NS = (scale_low | (scale_high << 4)).float() - 32
    codes = (low | (high << 2)).float() - 4
    return _scale_runs(codes, read_half(blocks[:, 108:110]) * scales_NS)


def decode_q4_k(blocks: Tensor) -> Tensor:
    """[N, 144] uint8 -> [N, 256] float32."""
    return _scale_runs(read_fields(blocks[:, 16:], 32, 4), *_read_scales_mins(blocks))


def decode_q5_k(blocks: Tensor) -> Tensor:
    """[N, 176] uint8 -> [N, 256] float32."""
    codes = read_fields(blocks[:, 48:], 32, 4) | (read_fields(blocks[:, 16:48], 32, 1) << 4)
    return _scale_runs(codes, *_read_scales_mins(blocks))


def decode_q6_k(blocks: Tensor) -> Tensor:
    """[N, 210] uint8 -> [N, 256] float32."""
    codes = read_fields(blocks[:, :128], 64, 4) | (read_fields(blocks[:, 128:192], 32, 2) << 4)
    scales_NS = blocks[:, 192:208].view(torch.int8).float()
    return _scale_runs(codes.float() - 32, read_half(blocks[:, 208:210]) * scales_NS)


def _scale_runs(codes_NQ: Tensor, dl_NS: Tensor, ml_NS: Tensor | None = None) -> Tensor:
    """[N, 256] codes -> [N, 256] float32: run s times dl[s], less ml[s]; product and sum each rounded."""
    weights_NSW = codes_NQ.float().view(*dl_NS.shape, 256 // dl_NS.shape[1]) * dl_NS[:, :, None]
    return (weights_NSW if ml_NS is None else weights_NSW.sub_(ml_NS[:, :, None])).flatten(1)


def _read_scales_mins(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes 0-15 of q4_k and q5_k blocks -> d * sc and dmin * mn, both [N, 8] float32."""
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]  # [N, 4] uint8 each
    sc = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], dim=1)
    mn = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], dim=1)
    return read_half(blocks[:, :2]) * sc.float(), read_half(blocks[:, 2:4]) * mn.float()

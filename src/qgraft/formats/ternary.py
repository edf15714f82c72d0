"""GGML formats of ternary weights, -d, 0 and d: blocks of 256; read, not quantized to.

    name   bytes  layout (byte offsets)                       weight j =
    tq1_0     54    0 qs[48] | 48 qh[4] | 52 d                d * (t[j] - 1)
    tq2_0     66    0 qs[64] | 64 d                           d * (q[j] - 1)

    tq1_0   five digits of base 3 in a byte, b = ceil(256 / 243 * (81 t0 + 27 t1 + 9 t2 + 3 t3 + t4)): digit k is the upper
            byte of 3 * (b * 3^k mod 256). Bytes 0-31 hold digit k of weights 32 k to 32 k + 31, bytes 32-47 of 160 + 16 k
            to 175 + 16 k; those of qh four digits, of weights 240 + 4 k to 243 + 4 k.
    tq2_0   2 bits, in runs of 32 bytes as q2_k (kquants.py); the code 3, which no writer makes, is 2 d

Source: ggml-common.h and `dequantize_row_tq*` in ggml-quants.c of llama.cpp. Exactness: bit for bit as `gguf.quants`.

Not chosen: quantizing to them. A model that was not trained to be ternary is not one afterwards.
"""

import torch
from torch import Tensor

from qgraft.formats.blocks import Bits, Layout, read_half
from qgraft.formats.grid import Grid

TQ2_0 = Layout(256, 66, d=64, low=Bits(0, 64, 32, 2), codes=(-1, 1), zero=1)


class Base3:
    """tq1_0, which stands where others have a `Layout`."""

    weights, bytes = 256, 54

    def read(self, blocks: Tensor) -> Grid:
        """[N, 54] uint8 -> grid of N rows, a block each."""
        runs = _digits(blocks[:, :32], 5), _digits(blocks[:, 32:48], 5), _digits(blocks[:, 48:52], 4)
        return Grid(torch.cat(runs, dim=1), read_half(blocks[:, 52:]), low=-1, high=1)


def _digits(raw_NB: Tensor, count: int) -> Tensor:
    """[N, B] uint8 -> [N, count * B] int8, -1 to 1: the first digit of all bytes, then the next."""
    powers = 3 ** torch.arange(count, dtype=torch.uint8, device=raw_NB.device)
    shifted = raw_NB[:, None, :] * powers[:, None]  # mod 256
    return ((shifted.to(torch.int16) * 3 >> 8) - 1).to(torch.int8).flatten(1)

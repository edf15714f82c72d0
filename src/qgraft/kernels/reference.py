"""The reference kernels: plain torch for every format on every device. Slow to read the bits, impossible to misread.

Each function states one op of the table in a line; faster kernels are compared with these on values and gradients.
Names: x_BI input, w_OI weight, g_BO gradient of the output; `...` leading dimensions of x are kept.
"""

import torch
from torch import Tensor

from qgraft.formats import PackedTensor
from qgraft.formats import dequantize as format_dequantize


def dequantize(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """w_OI in `dtype`."""
    return format_dequantize(packed, dtype)


def linear(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T, computed in the dtype of x: [..., in] -> [..., out]."""
    return x @ format_dequantize(packed, x.dtype).T


def linear_grad_input(grad: Tensor, packed: PackedTensor) -> Tensor:
    """dL/dx = g W, computed in the dtype of g: [..., out] -> [..., in]."""
    return grad @ format_dequantize(packed, grad.dtype)


def linear_bf16(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T with x and W rounded to bfloat16, their products summed in float32."""
    return x.bfloat16().float() @ format_dequantize(packed, torch.bfloat16).float().T


def linear_grad_input_bf16(grad: Tensor, packed: PackedTensor) -> Tensor:
    """dL/dx = g W with g and W rounded to bfloat16, their products summed in float32."""
    return grad.bfloat16().float() @ format_dequantize(packed, torch.bfloat16).float()


def linear_int8(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T with x rounded to 8 bits in groups of 32 columns, summed in float64 and given as float32.

    step = max |x| / 127 over a group and code = round(x * (127 / max |x|)); a group below 2^-100 counts as zero, one
    with a NaN or an infinity makes its token NaN. The weights are not rounded: their codes times these codes are what
    the native kernel sums as integers.
    """
    x_BI = x.reshape(-1, x.shape[-1]).to(torch.float32)
    x_BG = torch.nn.functional.pad(x_BI, (0, -x.shape[-1] % 32)).unflatten(1, (-1, 32))
    largest_BG = x_BG.abs().amax(dim=-1, keepdim=True)
    largest_BG = largest_BG.masked_fill(largest_BG < 2.0**-100, 0.0)
    inverse_BG = torch.full_like(largest_BG, 127.0) / largest_BG  # 127.0 / t would be rounded twice: 1 / t, times 127
    code_BG = (x_BG * inverse_BG).round().masked_fill(largest_BG == 0.0, 0.0)
    rounded_BI = (code_BG.double() * (largest_BG / 127.0).double()).flatten(1)[:, : x.shape[-1]]
    y = rounded_BI.reshape(x.shape) @ format_dequantize(packed, torch.float64).T
    return y.to(torch.float32)  # a copy, and no view, which could not be changed in place

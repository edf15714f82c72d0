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

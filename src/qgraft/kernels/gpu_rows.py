"""Norms, gated products, rotations and the loss of logits on a GPU, by the Triton kernels of triton_rows.py.

In plain torch these are three to forty operations each, every one a launch and a pass over memory: 400 ms of a step of 8192
tokens of a model of 7 billion weights, beside 450 ms of products (computed from bytes and rates of an H100). What they do
not take goes to the reference.
"""

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qgraft.kernels import reference
from qgraft.kernels.cuda_graphs import power_of_two
from qgraft.kernels.triton_ops import DTYPES, interpreted, launch

if TYPE_CHECKING:
    from qgraft.kernels.pointwise import Activation

WIDEST = 32768  # numbers of a row that one program holds
_NUMBERS = {"silu": 0, "gelu-tanh": 1, "gelu": 2}  # ACT in triton_rows.py


def norm(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As reference.norm."""
    return reference.norm(x, weight_H, eps) if x.shape[-1] > WIDEST else _norm(x, weight_H, eps, None)


def normalized(x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """As reference.normalized."""
    return reference.normalized(x, weight_H, r) if x.shape[-1] > WIDEST else _norm(x, weight_H, 0.0, r)[0]


def _norm(x: Tensor, weight_H: Tensor, eps: float, r: Tensor | None) -> tuple[Tensor, Tensor]:
    x, width, known = x.contiguous(), x.shape[-1], r is not None
    y = torch.empty_like(x)
    r = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if r is None else r.contiguous()
    block, warps = _row(width)
    if r.numel():
        constants = {"KNOWN": known, "BLOCK": block, "EXACT": interpreted()}
        launch(_rows().norm_kernel, (r.numel(), 1, 1), (x, weight_H.contiguous(), y, r, width, eps), constants, warps)
    return y, r


def norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """As reference.norm_backward."""
    if x.shape[-1] > WIDEST:
        return reference.norm_backward(grad, x, weight_H, r)
    grad, x, width = grad.contiguous(), x.contiguous(), x.shape[-1]
    gx = torch.empty_like(x)
    block, warps = _row(width)
    if r.numel():
        arguments = (grad, x, weight_H.contiguous(), r.contiguous(), gx, width)
        constants = {"BLOCK": block, "EXACT": interpreted()}
        launch(_rows().norm_backward_kernel, (r.numel(), 1, 1), arguments, constants, warps)
    return gx


def gated(
    act: "Activation", gate: Tensor, up: Tensor, rounded: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> Tensor:
    """As reference.gated; it writes no rounded copies."""
    if rounded is not None:
        return reference.gated(act, gate, up, rounded, dtype)
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate, dtype=dtype)
    if h.numel():
        constants = {"ACT": _NUMBERS[act.name], "BLOCK": _flat(), "EXACT": interpreted()}
        launch(_rows().gated_kernel, _programs(h), (gate, up, h, h.numel()), constants, 4)
    return h


def gated_backward(act: "Activation", grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As reference.gated_backward."""
    if grad.dtype not in DTYPES:
        return reference.gated_backward(act, grad, gate, up)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    g_gate, g_up = torch.empty_like(grad), torch.empty_like(grad)
    if grad.numel():
        constants = {"ACT": _NUMBERS[act.name], "BLOCK": _flat(), "EXACT": interpreted()}
        arguments = (grad, gate, up, g_gate, g_up, grad.numel())
        launch(_rows().gated_backward_kernel, _programs(grad), arguments, constants, 4)
    return g_gate, g_up


def rotate(q_1HTD: Tensor, k_1GTD: Tensor, cos_1TR: Tensor, sin_1TR: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """As reference.rotate; q and k are views [1, H, T, D] of contiguous [1, T, H, D]."""
    return _rotated(q_1HTD, cos_1TR, sin_1TR, backward), _rotated(k_1GTD, cos_1TR, sin_1TR, backward)


def _rotated(x_1HTD: Tensor, cos_1TR: Tensor, sin_1TR: Tensor, backward: bool) -> Tensor:
    """x rotated, or a gradient back, as a view [1, H, T, D] of contiguous [1, T, H, D]."""
    x = x_1HTD if x_1HTD.stride(3) == 1 else x_1HTD.contiguous()
    _, heads, tokens, channels = x.shape
    width = cos_1TR.shape[-1]
    y = x.new_empty((1, tokens, heads, channels))
    block, rest = min(power_of_two(heads), 16), channels - width
    if y.numel():
        arguments = (
            x, y, cos_1TR.contiguous(), sin_1TR.contiguous(), x.stride(1), x.stride(2), heads, channels, width,
        )  # fmt: skip
        constants = {"BACKWARD": backward, "BH": block, "HALF": power_of_two(max(1, width // 2)),
                     "REST": power_of_two(rest) if rest else 0, "EXACT": interpreted()}  # fmt: skip
        launch(_rows().rotate_kernel, (tokens, -(-heads // block), 1), arguments, constants, 4)
    return y.transpose(1, 2)


def loss_to_gradient(logits_CV: Tensor, targets_C: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy [C] float32 of each row of logits, which are overwritten with its gradient in their own dtype."""
    losses_C = logits_CV.new_empty(len(logits_CV), dtype=torch.float32)
    if len(logits_CV):
        arguments = (logits_CV, targets_C, losses_C, logits_CV.shape[1], logits_CV.stride(0), float(smoothing))
        constants = {"BLOCK": 4096, "EXACT": interpreted()}
        launch(_rows().loss_kernel, (len(logits_CV), 1, 1), arguments, constants, 8)
    return losses_C


def _row(width: int) -> tuple[int, int]:
    """(numbers that a program holds, its warps)."""
    block = power_of_two(width)
    return block, 8 if block > 2048 else 4 if block > 256 else 1


def _flat() -> int:
    return 65536 if interpreted() else 1024


def _programs(tensor: Tensor) -> tuple[int, int, int]:
    return -(-tensor.numel() // _flat()), 1, 1


@cache
def _rows() -> ModuleType:
    from qgraft.kernels import triton_rows

    return triton_rows

"""Norms, gated products, rotations and the loss of logits on a GPU, by the Triton kernels of triton_rows.py.

In plain torch these are three to forty operations each, every one a launch and a pass over memory: 400 ms of a step of 8192
tokens of a model of 7 billion weights, beside 450 ms of products (computed from bytes and rates of an H100). `serves` says
whether these run; pointwise.py and passes/loss.py hold the plain torch for everything else.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from qgraft.kernels import triton_ops
from qgraft.kernels.choice import choose
from qgraft.kernels.triton_ops import interpreted, launch

WIDEST = 32768  # numbers of a row that one program holds


def serves(*tensors: Tensor) -> bool:
    """Whether Triton computes with these: on a GPU that it serves, in a dtype that it knows."""
    first = tensors[0]
    if not first.is_cuda and not interpreted():
        return False
    alike = all(t.dtype in triton_ops.DTYPES and t.device == first.device for t in tensors)
    return alike and choose("linear", "q4_1", first.device.type).kernel == "triton"


def norm(x: Tensor, weight_H: Tensor, eps: float, r: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(y, r) of pointwise.norm; of pointwise.normalized where r is given."""
    x, width, known = x.contiguous(), x.shape[-1], r is not None
    y = torch.empty_like(x)
    r = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if r is None else r.contiguous()
    block, warps = _row(width)
    if r.numel():
        constants = {"KNOWN": known, "BLOCK": block, "EXACT": interpreted()}
        launch(_rows().norm_kernel, (r.numel(), 1, 1), (x, weight_H.contiguous(), y, r, width, eps), constants, warps)
    return y, r


def norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """gx of pointwise.norm_backward, in the dtype of x."""
    grad, x, width = grad.contiguous(), x.contiguous(), x.shape[-1]
    gx = torch.empty_like(x)
    block, warps = _row(width)
    if r.numel():
        arguments = (grad, x, weight_H.contiguous(), r.contiguous(), gx, width)
        constants = {"BLOCK": block, "EXACT": interpreted()}
        launch(_rows().norm_backward_kernel, (r.numel(), 1, 1), arguments, constants, warps)
    return gx


def gated(number: int, gate: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """h of pointwise.gated in `dtype`; `number` is the activation's."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate, dtype=dtype)
    if h.numel():
        constants = {"ACT": number, "BLOCK": _flat(), "EXACT": interpreted()}
        launch(_rows().gated_kernel, _programs(h), (gate, up, h, h.numel()), constants, 4)
    return h


def gated_backward(number: int, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of pointwise.gated_backward in the dtype of dL/dh."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    g_gate, g_up = torch.empty_like(grad), torch.empty_like(grad)
    if grad.numel():
        constants = {"ACT": number, "BLOCK": _flat(), "EXACT": interpreted()}
        arguments = (grad, gate, up, g_gate, g_up, grad.numel())
        launch(_rows().gated_backward_kernel, _programs(grad), arguments, constants, 4)
    return g_gate, g_up


def rotate(x_1HTD: Tensor, cos_1TR: Tensor, sin_1TR: Tensor, backward: bool) -> Tensor:
    """x rotated, or a gradient back, as a view [1, H, T, D] of contiguous [1, T, H, D]."""
    x = x_1HTD if x_1HTD.stride(3) == 1 else x_1HTD.contiguous()
    _, heads, tokens, channels = x.shape
    width = cos_1TR.shape[-1]
    y = x.new_empty((1, tokens, heads, channels))
    block, rest = min(_power(heads), 16), channels - width
    if y.numel():
        arguments = (
            x, y, cos_1TR.contiguous(), sin_1TR.contiguous(), x.stride(1), x.stride(2), heads, channels, width,
        )  # fmt: skip
        constants = {"BACKWARD": backward, "BH": block, "HALF": _power(max(1, width // 2)),
                     "REST": _power(rest) if rest else 0, "EXACT": interpreted()}  # fmt: skip
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
    block = _power(width)
    return block, 8 if block > 2048 else 4 if block > 256 else 1


def _flat() -> int:
    return 65536 if interpreted() else 1024


def _programs(tensor: Tensor) -> tuple[int, int, int]:
    return -(-tensor.numel() // _flat()), 1, 1


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def _rows() -> ModuleType:
    from qgraft.kernels import triton_rows

    return triton_rows

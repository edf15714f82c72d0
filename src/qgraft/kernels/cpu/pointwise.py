"""Norms, gated products and rotations by pointwise.c: float32 on a CPU, one pass over memory each."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qgraft.kernels import reference
from qgraft.kernels.cpu.library import loaded

if TYPE_CHECKING:
    from qgraft.kernels.pointwise import Activation


def norm(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As reference.norm."""
    x, weight_H, width = x.contiguous(), weight_H.contiguous(), x.shape[-1]
    y, r = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))
    loaded().qgraft_norm(
        x.data_ptr(), weight_H.data_ptr(), eps, r.numel(), width, y.data_ptr(), r.data_ptr(), torch.get_num_threads()
    )
    return y, r


def normalized(x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """As reference.normalized."""
    x, weight_H = x.contiguous(), weight_H.contiguous()
    y = torch.empty_like(x)
    loaded().qgraft_normalized(
        x.data_ptr(), weight_H.data_ptr(), r.data_ptr(), r.numel(), x.shape[-1], y.data_ptr(), torch.get_num_threads()
    )
    return y


def norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """As reference.norm_backward."""
    grad, x, weight_H = grad.contiguous(), x.contiguous(), weight_H.contiguous()
    gx = torch.empty_like(x)
    loaded().qgraft_norm_backward(
        grad.data_ptr(), x.data_ptr(), weight_H.data_ptr(), r.data_ptr(), r.numel(), x.shape[-1], gx.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return gx


def gated(
    act: "Activation", gate: Tensor, up: Tensor, rounded: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> Tensor:
    """As reference.gated; it computes in float32, and has silu and gelu with tanh alone."""
    if act.number is None:
        return reference.gated(act, gate, up, rounded, dtype)
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate, dtype=torch.float32)
    loaded().qgraft_gated(
        act.number, gate.data_ptr(), up.data_ptr(), gate.dtype == torch.bfloat16, h.numel(), h.data_ptr(),
        rounded and rounded[0].data_ptr(), rounded and rounded[1].data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return h.to(dtype)


def gated_backward(act: "Activation", grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As reference.gated_backward, for a float32 gradient."""
    if act.number is None or grad.dtype != torch.float32:
        return reference.gated_backward(act, grad, gate, up)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    g_gate, g_up = torch.empty_like(grad), torch.empty_like(grad)
    loaded().qgraft_gated_backward(
        act.number, grad.data_ptr(), gate.data_ptr(), up.data_ptr(), gate.dtype == torch.bfloat16, grad.numel(),
        g_gate.data_ptr(), g_up.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return g_gate, g_up


def rotate(q_1HTD: Tensor, k_1GTD: Tensor, cos_1TR: Tensor, sin_1TR: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """As reference.rotate; q and k are views [1, H, T, D] of contiguous [1, T, H, D]."""
    (_, heads, tokens, channels), groups, width = q_1HTD.shape, k_1GTD.shape[1], cos_1TR.shape[-1]
    q = q_1HTD if q_1HTD.stride(3) == 1 else q_1HTD.contiguous()
    k = k_1GTD if k_1GTD.stride(3) == 1 else k_1GTD.contiguous()
    cos, sin = cos_1TR.contiguous(), sin_1TR.contiguous()
    q_out, k_out = q.new_empty((1, tokens, heads, channels)), q.new_empty((1, tokens, groups, channels))
    _, q_head, q_token, _ = q.stride()
    _, k_head, k_token, _ = k.stride()
    loaded().qgraft_rotate(
        backward, q.data_ptr(), q_head, q_token, heads, k.data_ptr(), k_head, k_token, groups, cos.data_ptr(),
        sin.data_ptr(), width, tokens, channels, q_out.data_ptr(), k_out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)

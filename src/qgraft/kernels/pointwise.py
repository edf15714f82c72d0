"""What a training step computes beside products: norms, gated products, rotations, forward and backward.

    norm       y = w x r,  r = 1 / sqrt(mean(x²) + eps)      gx = r (g w - x r² mean(g w x))
    gated      h = act(gate) up                              ggate = g up act'(gate),  gup = g act(gate)
    rotation   y1 = x1 c1 - x2 s1                            gx1 = g1 c1 + g2 s2
               y2 = x2 c2 + x1 s2                            gx2 = g2 c2 - g1 s1

Sources: Zhang & Sennrich 2019 (arXiv:1910.07467) for the norm, Shazeer 2020 (arXiv:2002.05202) for the gated product. A
rotation turns each pair of channels (j, j + half) by an angle that grows with the position (Su et al. 2021,
arXiv:2104.09864); cos and sin may differ between the halves and carry a factor (YaRN), so its gradient is written for
any of them.

Each is one call of pointwise.c where tensors are float32 on a CPU, one Triton kernel on a GPU that has it (gpu_rows.py), and
the plain torch beside it elsewhere: in torch
these are three to forty operations each, and with a few hundred tokens in a pass each costs more than its arithmetic.
A row's result is the same bits whatever other rows there are.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qgraft.kernels import gpu_rows
from qgraft.kernels.choice import in_c
from qgraft.kernels.cpu.library import loaded


@dataclass(frozen=True)
class Activation:
    """One that gates: its name, what torch's gelu is told, and its number in level.h; None where it has none."""

    name: str
    approximate: str = "none"
    number: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """act(x)."""
        return F.silu(x) if self.name == "silu" else F.gelu(x, approximate=self.approximate)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """dL/dx of dL/dact(x)."""
        aten = torch.ops.aten
        if self.name == "silu":
            return aten.silu_backward(grad, x)
        return aten.gelu_backward(grad, x, approximate=self.approximate)


ACTIVATIONS = (Activation("silu", number=0), Activation("gelu-tanh", "tanh", number=1), Activation("gelu"))


def norm(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., H] -> y [..., H] in the dtype of x, rounded once, and r [..., 1] in float32 at least."""
    if _norm_on_gpu(x, weight_H):
        return gpu_rows.norm(x, weight_H, eps)
    if not _norm_in_c(x, weight_H):
        wide = _wide(x.dtype)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
        r = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        return normalized(x, weight_H, r), r
    x, weight_H, width = x.contiguous(), weight_H.contiguous(), x.shape[-1]
    y, r = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))
    loaded().qgraft_norm(
        x.data_ptr(), weight_H.data_ptr(), eps, r.numel(), width, y.data_ptr(), r.data_ptr(), torch.get_num_threads()
    )
    return y, r


def normalized(x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """y of `norm` again, bit for bit."""
    if _norm_on_gpu(x, weight_H, r):
        return gpu_rows.norm(x, weight_H, 0.0, r)[0]
    if not _norm_in_c(x, weight_H, r):
        return (x * r).mul_(weight_H).to(x.dtype)
    x, weight_H = x.contiguous(), weight_H.contiguous()
    y = torch.empty_like(x)
    loaded().qgraft_normalized(
        x.data_ptr(), weight_H.data_ptr(), r.data_ptr(), r.numel(), x.shape[-1], y.data_ptr(), torch.get_num_threads()
    )
    return y


def norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """dL/dy -> dL/dx."""
    if _norm_on_gpu(x, weight_H, r, grad):
        return gpu_rows.norm_backward(grad, x, weight_H, r)
    if not _norm_in_c(x, weight_H, r, grad):
        gw, x_wide = grad.to(r.dtype) * weight_H, x.to(r.dtype)
        mean = (gw * x_wide).mean(dim=-1, keepdim=True)
        return gw.mul_(r).addcmul_(x_wide, mean * r**3, value=-1).to(x.dtype)
    grad, x, weight_H = grad.contiguous(), x.contiguous(), weight_H.contiguous()
    gx = torch.empty_like(x)
    loaded().qgraft_norm_backward(
        grad.data_ptr(), x.data_ptr(), weight_H.data_ptr(), r.data_ptr(), r.numel(), x.shape[-1], gx.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return gx


def gated(
    act: Activation,
    gate: Tensor,
    up: Tensor,
    rounded: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """h = act(gate) up, computed in float32 at least and rounded once: gate, up [..., H] in one dtype -> h [..., H].

    Args:
        rounded: where gate and up are written too, contiguous tensors of their shape in bfloat16.
        dtype: of h; None for that of gate. Copies rounded to bfloat16 give a float32 h where the layer computes in float32.
    """
    dtype = dtype or gate.dtype
    if rounded is None and gate.shape == up.shape and gpu_rows.serves(gate, up):
        return gpu_rows.gated(ACTIVATIONS.index(act), gate, up, dtype)
    if not _gated_in_c(act, gate, up):
        for source, copy in zip((gate, up), rounded or (), strict=False):
            copy.copy_(source)
        return act(gate.to(_wide(gate.dtype))).mul_(up).to(dtype)
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate, dtype=torch.float32)
    loaded().qgraft_gated(
        act.number, gate.data_ptr(), up.data_ptr(), gate.dtype == torch.bfloat16, h.numel(), h.data_ptr(),
        rounded and rounded[0].data_ptr(), rounded and rounded[1].data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return h.to(dtype)


def gated_backward(act: Activation, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dh -> dL/dgate, dL/dup in the dtype of dL/dh; gate and up may be rounded copies."""
    if grad.shape == gate.shape == up.shape and gpu_rows.serves(grad, gate, up):
        return gpu_rows.gated_backward(ACTIVATIONS.index(act), grad, gate, up)
    if not (_gated_in_c(act, gate, up) and grad.dtype == torch.float32):
        gate, up = gate.to(grad.dtype), up.to(grad.dtype)
        return act.backward(grad * up, gate), act(gate).mul_(grad)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    g_gate, g_up = torch.empty_like(grad), torch.empty_like(grad)
    loaded().qgraft_gated_backward(
        act.number, grad.data_ptr(), gate.data_ptr(), up.data_ptr(), gate.dtype == torch.bfloat16, grad.numel(),
        g_gate.data_ptr(), g_up.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return g_gate, g_up


def rotate(
    q_1HTD: Tensor, k_1GTD: Tensor, cos_1TR: Tensor, sin_1TR: Tensor, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotates the first R channels of q and k, or gradients back; the others are copied.

    Returns views [1, H, T, D] of contiguous [1, T, H, D], the layout in which a linear layer wrote q and the next one
    reads the attention's output.
    """
    (batch, heads, tokens, channels), groups, width = q_1HTD.shape, k_1GTD.shape[1], cos_1TR.shape[-1]
    fits = batch == 1 and cos_1TR.shape == sin_1TR.shape == (1, tokens, width) and width % 2 == 0 and width <= channels
    fits = fits and k_1GTD.shape[2:] == q_1HTD.shape[2:]
    if fits and gpu_rows.serves(q_1HTD, k_1GTD, cos_1TR, sin_1TR):
        q, k = (gpu_rows.rotate(x, cos_1TR, sin_1TR, backward) for x in (q_1HTD, k_1GTD))
        return q, k
    if not fits or not in_c(q_1HTD, k_1GTD, cos_1TR, sin_1TR):
        return _rotated(q_1HTD, cos_1TR, sin_1TR, backward), _rotated(k_1GTD, cos_1TR, sin_1TR, backward)
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


def _rotated(x_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, backward: bool) -> Tensor:
    half = cos_BTR.shape[-1] // 2
    cos1, cos2 = cos_BTR[:, None, :, :half], cos_BTR[:, None, :, half:]
    sin1, sin2 = sin_BTR[:, None, :, :half], sin_BTR[:, None, :, half:]
    x1, x2, rest = x_BHTD[..., :half], x_BHTD[..., half : 2 * half], x_BHTD[..., 2 * half :]
    if backward:
        return torch.cat((x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1, rest), dim=-1)
    return torch.cat((x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2, rest), dim=-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of numbers of this dtype are taken in."""
    return torch.promote_types(dtype, torch.float32)


def rotates(*tensors: Tensor) -> bool:
    """Whether `rotate` is one call for tensors of these devices and dtypes."""
    return in_c(*tensors) or gpu_rows.serves(*tensors)


def _norm_on_gpu(x: Tensor, weight_H: Tensor, *others: Tensor) -> bool:
    return weight_H.shape == x.shape[-1:] and x.shape[-1] <= gpu_rows.WIDEST and gpu_rows.serves(x, weight_H, *others)


def _norm_in_c(x: Tensor, weight_H: Tensor, *others: Tensor) -> bool:
    return weight_H.shape == x.shape[-1:] and in_c(x, weight_H, *others)


def _gated_in_c(act: Activation, gate: Tensor, up: Tensor) -> bool:
    if act.number is None or gate.dtype not in (torch.float32, torch.bfloat16):
        return False
    return gate.shape == up.shape and in_c(gate, up, dtype=gate.dtype)

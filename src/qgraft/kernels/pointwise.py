"""What a training step computes beside products: norms, gated products, rotations, forward and backward.

    norm       y = w x r,  r = 1 / sqrt(mean(x²) + eps)      gx = r (g w - x r² mean(g w x))
    gated      h = act(gate) up                              ggate = g up act'(gate),  gup = g act(gate)
    rotation   y1 = x1 c1 - x2 s1                            gx1 = g1 c1 + g2 s2
               y2 = x2 c2 + x1 s2                            gx2 = g2 c2 - g1 s1

Sources: Zhang & Sennrich 2019 (arXiv:1910.07467) for the norm, Shazeer 2020 (arXiv:2002.05202) for the gated product. A
rotation turns each pair of channels (j, j + half) by an angle that grows with the position (Su et al. 2021,
arXiv:2104.09864); cos and sin may differ between the halves and carry a factor (YaRN), so its gradient is written for
any of them.

Each is a row of the table: one call of pointwise.c, one Triton kernel, or plain torch (reference.py), where these are
three to forty operations each, and with a few hundred tokens in a pass each costs more than its arithmetic. A row's result
is the same bits whatever other rows there are.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qgraft.kernels import reference
from qgraft.kernels.choice import serving


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
    y, r = _norm(x, weight_H).norm(x, weight_H, eps)
    return y, r


def normalized(x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """y of `norm` again, bit for bit."""
    y: Tensor = _norm(x, weight_H, r).normalized(x, weight_H, r)
    return y


def norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """dL/dy -> dL/dx."""
    gx: Tensor = _norm(x, weight_H, r, grad).norm_backward(grad, x, weight_H, r)
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
    kernel = serving("gated", gate, up) if gate.shape == up.shape else reference
    h: Tensor = kernel.gated(act, gate, up, rounded, dtype or gate.dtype)
    return h


def gated_backward(act: Activation, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dh -> dL/dgate, dL/dup in the dtype of dL/dh; gate and up may be rounded copies."""
    alike = grad.shape == gate.shape == up.shape and grad.device == gate.device
    g_gate, g_up = (serving("gated", gate, up) if alike else reference).gated_backward(act, grad, gate, up)
    return g_gate, g_up


def rotate(
    q_1HTD: Tensor, k_1GTD: Tensor, cos_1TR: Tensor, sin_1TR: Tensor, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotates the first R channels of q and k, or gradients back; the others are copied.

    Kernels return views [1, H, T, D] of contiguous [1, T, H, D], the layout in which a linear layer wrote q and the next
    one reads the attention's output.
    """
    (batch, _, tokens, channels), width = q_1HTD.shape, cos_1TR.shape[-1]
    fits = batch == 1 and cos_1TR.shape == sin_1TR.shape == (1, tokens, width) and width % 2 == 0 and width <= channels
    fits = fits and k_1GTD.shape[2:] == q_1HTD.shape[2:]
    kernel = serving("rotate", q_1HTD, k_1GTD, cos_1TR, sin_1TR) if fits else reference
    q, k = kernel.rotate(q_1HTD, k_1GTD, cos_1TR, sin_1TR, backward)
    return q, k


def rotates(*tensors: Tensor) -> bool:
    """Whether `rotate` is one call for tensors of these devices and dtypes."""
    return serving("rotate", *tensors) is not reference


def _norm(x: Tensor, weight_H: Tensor, *others: Tensor) -> Any:
    return serving("norm", x, weight_H, *others) if weight_H.shape == x.shape[-1:] else reference

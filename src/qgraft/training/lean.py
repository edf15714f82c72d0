"""Norms and gated MLPs that keep little for the backward pass, in the place of transformers' own while training.

    RMSNorm      y = w · x / rms(x)            kept: x and 1 / rms(x), one number a token
    gated MLP    h = act(gate) · up            kept: gate and up, rounded to bfloat16 where products are

Written with ordinary operations, transformers' RMSNorm keeps three tensors as large as x, and a gated MLP two more than
gate and up; each passes over memory several times in both directions. The outputs y and h are inputs of linear layers,
which would save them for their adapters: they are marked as `recomputable` from what is kept, so those save nothing.
Together this halves the memory of a step's activations. In float32 nothing is approximated.

    dL/dx of the norm = r (g w  -  x r² mean(g w x)),  r = 1 / rms(x)
        (derivative of Zhang & Sennrich 2019, arXiv:1910.07467)

Which modules are what they seem is found out by trying: a norm or an MLP is replaced only if its own output is the
formula's. Others stay as they are. Not chosen: gradient checkpointing of whole layers, which computes the matrix
products a second time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qgraft.adapters.lora import recomputable
from qgraft.linear import product_dtype
from qgraft.training.loss import evaluating

Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]  # act(x), dL/dx of (dL/dy, x)

ACTIVATIONS: tuple[Activation, ...] = (
    (F.silu, torch.ops.aten.silu_backward),
    (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
    (F.gelu, torch.ops.aten.gelu_backward),
)


@contextmanager
def lean_modules(model: nn.Module) -> Iterator[int]:
    """Within the block such modules of `model` compute by the functions below; yields how many they are."""
    with evaluating(model):  # dropout would tell every module from its formula
        forwards = [(module, _lean_norm(module) or _lean_mlp(module)) for module in model.modules()]
    changed = [(module, forward) for module, forward in forwards if forward is not None]
    for module, forward in changed:
        module.forward = forward
    try:
        yield len(changed)
    finally:
        for module, _ in changed:
            del module.forward


class RmsNorm(torch.autograd.Function):
    """y = w · x · r with r = 1 / sqrt(mean(x²) + eps), for a frozen w [H]. x [..., H] -> (y [..., H], r [..., 1])."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See the class."""
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, r)
        ctx.mark_non_differentiable(r)
        return normalized(x, weight_H, r), r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """dL/dy -> dL/dx."""
        x, weight_H, r = ctx.saved_tensors
        gw = grad * weight_H
        mean = (gw * x).mean(dim=-1, keepdim=True)
        return gw.mul_(r).addcmul_(x, mean * r**3, value=-1), None, None


class GatedProduct(torch.autograd.Function):
    """h = act(gate) · up, all [..., H], saving `kept_gate` and `kept_up`, which are these or rounded copies of them."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, kept_gate: Tensor, kept_up: Tensor, activation: Activation
    ) -> Tensor:
        """See the class."""
        ctx.save_for_backward(kept_gate, kept_up)
        ctx.activation = activation
        return gated(activation[0], gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dh -> dL/dgate, dL/dup."""
        gate, up = (tensor.to(grad.dtype) for tensor in ctx.saved_tensors)
        act, act_backward = ctx.activation
        return act_backward(grad * up, gate), act(gate).mul_(grad), None, None, None


def normalized(x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """w · x · r."""
    return (x * r).mul_(weight_H)


def gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) · up, computed in float32 at least."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    return act(gate.to(dtype)).mul_(up)


def _lean_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The forward pass in place of that of an RMSNorm whose weight is frozen float32; None for all other modules."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own: Any = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(own, Tensor) or not isinstance(eps, float):
        return None
    if own.requires_grad or own.dtype != torch.float32 or own.dim() != 1:
        return None
    weight_H = next(
        (w for w in (own, own + 1) if _same(module, partial(_norm, w, eps), [own.shape])), None
    )  # Gemma: w + 1
    if weight_H is None:
        return None

    def forward(x: Tensor) -> Tensor:
        return _norm(weight_H, eps, x) if x.dtype == torch.float32 else type(module).forward(module, x)

    return forward


def _norm(weight_H: Tensor, eps: float, x: Tensor) -> Tensor:
    y, r = RmsNorm.apply(x, weight_H, eps)
    return recomputable(y, normalized, x, weight_H, r)


def _lean_mlp(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The forward pass in place of that of a gated MLP; None for all other modules."""
    act = getattr(module, "act_fn", None)
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return None
    found = next((a for a in ACTIVATIONS if act is not None and _same(act, a[0], [(256,)])), None)
    width = getattr(cast(Any, module).gate_proj, "in_features", None)
    if found is None or width is None:
        return None

    def forward(x: Tensor) -> Tensor:
        part: Any = module
        gate, up = part.gate_proj(x), part.up_proj(x)
        dtype = product_dtype(getattr(part.down_proj, "base", part.down_proj), gate)
        kept = gate.detach().to(dtype), up.detach().to(dtype)
        h = GatedProduct.apply(gate, up, *kept, found)
        return part.down_proj(recomputable(h, partial(gated, found[0]), *kept))

    return forward if _same(module, forward, [(2, width)]) else None


def _same(module: Callable[..., Any], forward: Callable[..., Any], shapes: list[Any]) -> bool:
    """Whether both give the same for a random input."""
    held = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to("cpu" if held is None else held.device) for shape in shapes]
    with torch.no_grad():
        try:
            expected, got = module(*inputs), forward(*inputs)
        except (TypeError, AttributeError):  # takes or holds other things than its name says
            return False
    return isinstance(expected, Tensor) and torch.allclose(expected, got, rtol=1e-5, atol=1e-6)

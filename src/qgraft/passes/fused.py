"""Norms, gated MLPs and rotations that keep little for the backward pass, in the place of transformers' own in training.

    RMSNorm      y = w · x / rms(x)            kept: x and 1 / rms(x), one number a token
    gated MLP    h = act(gate) · up            kept: gate and up, rounded to bfloat16 where products are
    rotation     (q, k) by cos and sin         kept: these, which all layers share

Formulas, and the C functions that compute each in one pass over memory on a CPU, are in kernels/pointwise.py. Written
with ordinary operations, transformers' RMSNorm keeps three tensors as large as x, and a gated MLP two more than gate and
up; each passes over memory several times in both directions. The outputs y and h are inputs of linear layers, which
would save them for their adapters: they are marked as `recomputable` from what is kept, so those save nothing.
Together this halves the memory of a step's activations. In float32 nothing is approximated.

Which modules have these formulas is known by the code of their forward pass (known_layers.py); others stay as they are.
What is put in is an instance's own `forward`: the class, and every other model and thread, keeps its own. An attention
layer's is the code of its class, with Rotation where that code names the function it rotates by.

Not chosen: gradient checkpointing of whole layers, which computes the matrix products a second time; transformers' own
hooks for replaced layers (`use_kernel_forwardfrom_hub`, `use_kernelized_func`), which do nothing unless another package,
`kernels`, is installed, and which some models have for a part of their layers only.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qgraft.adapters.recompute import recomputable
from qgraft.kernels import pointwise
from qgraft.kernels.pointwise import Activation, gated, normalized
from qgraft.linear import product_dtype
from qgraft.passes.known_layers import ROTATION, Norm, gate_of, norm_of, rotates_part


@contextmanager
def fused_modules(model: nn.Module) -> Iterator[int]:
    """Within the block norms and gated MLPs of `model` compute by the functions below; yields how many they are.

    So do the rotations of its attention layers. A module whose forward pass somebody else has replaced (accelerate's hooks
    do) is left as it is; where somebody does so within the block, it computes by its class's own once the block has ended.
    """
    block = _Block()
    changed = [(m, forward) for m in model.modules() if (forward := block.forward_of(m)) is not None]
    for module, forward in changed:
        module.forward = forward
    try:
        yield sum(getattr(_own(module), "is_fused", False) for module in model.modules())
    finally:
        block.ended = True
        for module, forward in changed:
            if _own(module) is forward:
                del module.forward


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Within the block modules compute by their classes' own forward passes, though a fused_modules block is around it."""
    put_in = [(module, _own(module)) for module in model.modules() if getattr(_own(module), "of_block", False)]
    for module, _ in put_in:
        del module.forward
    try:
        yield
    finally:
        for module, forward in put_in:
            module.forward = forward


def _own(module: nn.Module) -> Any:
    """What stands in the place of the forward pass of the module's class, if anything does."""
    return vars(module).get("forward")


class RmsNorm(torch.autograd.Function):
    """y = w · x · r with r = 1 / sqrt(mean(x²) + eps), for a frozen w [H]. x [..., H] -> (y [..., H], r [..., 1])."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See the class."""
        y, r = pointwise.norm(x, weight_H, eps)
        ctx.save_for_backward(x, weight_H, r)
        ctx.mark_non_differentiable(r)
        ctx.set_materialize_grads(False)  # no zeros in the place of dL/dr
        return y, r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        """dL/dy -> dL/dx."""
        if grad is None:
            return None, None, None
        return pointwise.norm_backward(grad, *ctx.saved_tensors), None, None


class GatedProduct(torch.autograd.Function):
    """h = act(gate) · up, all [..., H], saving `kept_gate` and `kept_up`: these, or room for rounded copies of them."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, kept_gate: Tensor, kept_up: Tensor, activation: Activation
    ) -> Tensor:
        """See the class."""
        h = gated(activation, gate, up, None if kept_gate.dtype == gate.dtype else (kept_gate, kept_up))
        ctx.save_for_backward(kept_gate, kept_up)
        ctx.activation = activation
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dh -> dL/dgate, dL/dup."""
        return *pointwise.gated_backward(ctx.activation, grad, *ctx.saved_tensors), None, None, None


class Rotation(torch.autograd.Function):
    """q [1, H, T, D], k [1, G, T, D] rotated by cos, sin [1, T, R]: R may be less than D."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        ctx.save_for_backward(cos, sin)
        return pointwise.rotate(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_q: Tensor, g_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """dL/dq, dL/dk of the rotated ones -> of those given."""
        cos, sin = ctx.saved_tensors
        return *pointwise.rotate(g_q, g_k, cos, sin, backward=True), None, None


class _Block:
    """One fused_modules block: the forward passes it puts in."""

    def __init__(self) -> None:
        self.ended = False
        self._rotating: dict[type, FunctionType | None] = {}  # the forward passes of classes of attention layers

    def forward_of(self, module: nn.Module) -> Callable[..., Any] | None:
        """The forward pass in place of a module's own; None for one that is not known, or has another already."""
        if _own(module) is not None:
            return None
        norm, activation = norm_of(module), gate_of(module)
        function: FunctionType | None
        if norm is not None and not norm.is_trained:
            function = self._norm(norm)
        elif activation is not None:
            function = self._gated(activation)
        else:
            function = self._attention(type(module))
        if function is None:
            return None
        function.of_block = True  # type: ignore[attr-defined]
        return MethodType(function, module)

    def _norm(self, norm: Norm) -> Any:
        """An input of another dtype than the weight's goes the module's own way: what comes out is the module's business."""
        weight_H, eps = norm.weight, norm.eps

        def forward(module: Any, x: Tensor) -> Tensor:
            if self.ended or x.dtype != norm.dtype or x.shape[-1] != len(weight_H):
                return type(module).forward(module, x)
            y, r = RmsNorm.apply(x, weight_H, eps)
            return recomputable(y, normalized, x, weight_H, r)

        forward.is_fused = True  # type: ignore[attr-defined]
        return forward

    def _gated(self, activation: Activation) -> Any:
        def forward(module: Any, x: Tensor) -> Tensor:
            if self.ended:
                return type(module).forward(module, x)
            gate, up = module.gate_proj(x), module.up_proj(x)
            dtype = product_dtype(getattr(module.down_proj, "base", module.down_proj), gate)
            if dtype == gate.dtype:
                kept = gate.detach(), up.detach()
            else:
                kept = gate.new_empty(gate.shape, dtype=dtype), gate.new_empty(gate.shape, dtype=dtype)
            h = GatedProduct.apply(gate, up, *kept, activation)
            h = recomputable(h, partial(gated, activation, dtype=h.dtype), *kept)
            del gate, up, kept  # what comes next may need their memory
            return module.down_proj(h)

        forward.is_fused = True  # type: ignore[attr-defined]
        return forward

    def _attention(self, kind: Any) -> FunctionType | None:
        """The forward pass of a class, with a fused rotation where it names one that is known; else None."""
        if kind not in self._rotating:
            own = _named_rotation(kind)
            part = rotates_part(own)
            rotation = None if part is None else self._rotation(own, part)
            self._rotating[kind] = rotation and _with_globals(kind.forward, {ROTATION: rotation})
        return self._rotating[kind]

    def _rotation(self, own: Any, part: bool) -> Callable[..., Any]:
        """Rotation in the place of `own`, which it calls for what no kernel computes."""

        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
            known = not self.ended and (part or cos.shape[-1] == q.shape[-1])
            if not known or args or kwargs or q.dim() != 4 or len(q) != 1 or not pointwise.rotates(q, k, cos, sin):
                return own(q, k, cos, sin, *args, **kwargs)
            return Rotation.apply(q, k, cos, sin)

        return rotate


def _named_rotation(kind: Any) -> Any:
    """The function that the code of a class's forward pass finds as its rotation; None where it names none."""
    forward = inspect.unwrap(kind.forward)
    names_it = isinstance(forward, FunctionType) and ROTATION in forward.__code__.co_names
    return forward.__globals__.get(ROTATION) if names_it else None


def _with_globals(function: FunctionType, names: dict[str, Any]) -> FunctionType | None:
    """A function, under its decorators, that finds these names among its globals; None for decorators of another kind."""
    inner, cells = getattr(function, "__wrapped__", None), function.__closure__
    own = function.__globals__ if inner is not None else {**function.__globals__, **names}
    if inner is not None:
        new = _with_globals(inner, names)
        holds = [cell.cell_contents is inner for cell in cells or ()]
        if new is None or sum(holds) != 1:
            return None
        cells = tuple(CellType(new) if held else cell for held, cell in zip(holds, cells or (), strict=True))
    copy = FunctionType(function.__code__, own, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__, copy.__doc__ = function.__kwdefaults__, function.__doc__
    copy.__dict__.update(function.__dict__ if inner is None else {**function.__dict__, "__wrapped__": new})
    return copy

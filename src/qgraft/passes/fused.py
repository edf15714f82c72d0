"""Norms, gated MLPs and rotations that keep little for the backward pass, in the place of transformers' own in training.

    RMSNorm      y = w · x / rms(x)            kept: x and 1 / rms(x), one number a token
    gated MLP    h = act(gate) · up            kept: gate and up, rounded to bfloat16 where products are
    rotation     (q, k) by cos and sin         kept: these, which all layers share

Formulas, and the C functions that compute each in one pass over memory on a CPU, are in kernels/pointwise.py. Written
with ordinary operations, transformers' RMSNorm keeps three tensors as large as x, and a gated MLP two more than gate and
up; each passes over memory several times in both directions. The outputs y and h are inputs of linear layers, which
would save them for their adapters: they are marked as `recomputable` from what is kept, so those save nothing.
Together this halves the memory of a step's activations. In float32 nothing is approximated.

Which modules are what they seem is found out by trying: a norm or an MLP is replaced only if its own output is the
formula's. Others stay as they are. So is the function that attention layers call to rotate, `apply_rotary_pos_emb`: it
stands in the Python module of their class, where it is replaced for the time.

Not chosen: gradient checkpointing of whole layers, which computes the matrix products a second time.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import unwrap
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qgraft.adapters.recompute import recomputable
from qgraft.kernels import pointwise
from qgraft.kernels.pointwise import ACTIVATIONS, Activation, gated, normalized
from qgraft.linear import product_dtype
from qgraft.passes.decoder import evaluating

ROTATION = "apply_rotary_pos_emb"  # what transformers calls it in every modeling_*.py that has one


@contextmanager
def lean_modules(model: nn.Module) -> Iterator[int]:
    """Within the block such modules of `model` compute by the functions below; yields how many they are.

    A module whose forward pass somebody else has replaced (accelerate's hooks do) is left as it is.
    """
    with evaluating(model):  # dropout would tell every module from its formula
        forwards = [(module, _lean_norm(module) or _lean_mlp(module)) for module in model.modules() if not _own(module)]
    changed = [(module, forward) for module, forward in forwards if forward is not None]
    for module, forward in changed:
        forward.is_lean = True  # type: ignore[attr-defined]
        module.forward = forward
    try:
        with _lean_rotations(model):
            yield sum(getattr(_own(module), "is_lean", False) for module in model.modules())
    finally:
        for module, forward in changed:
            if _own(module) is forward:
                del module.forward


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


def _lean_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The forward pass in place of that of an RMSNorm whose weight is frozen; None for all other modules.

    An input of another dtype than the weight's goes the module's own way: what dtype comes out is the module's business.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own: Any = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(own, Tensor) or not isinstance(eps, float):
        return None
    if own.requires_grad or not own.is_floating_point() or own.dtype == torch.float64 or own.dim() != 1:
        return None
    weight_H = next(
        (w for w in (own, own.float() + 1) if _same(module, partial(_norm, w, eps), [own.shape])), None
    )  # Gemma: w + 1
    if weight_H is None:
        return None

    def forward(x: Tensor) -> Tensor:
        known = x.dtype == own.dtype and x.shape[-1] == len(weight_H)
        return _norm(weight_H, eps, x) if known else type(module).forward(module, x)

    return forward


def _norm(weight_H: Tensor, eps: float, x: Tensor) -> Tensor:
    y, r = RmsNorm.apply(x, weight_H, eps)
    return recomputable(y, normalized, x, weight_H, r)


def _lean_mlp(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The forward pass in place of that of a gated MLP; None for all other modules."""
    act = getattr(module, "act_fn", None)
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return None
    found = next((a for a in ACTIVATIONS if act is not None and _same(act, a, [(256,)])), None)
    width = getattr(cast(Any, module).gate_proj, "in_features", None)
    if found is None or width is None:
        return None

    def forward(x: Tensor) -> Tensor:
        part: Any = module
        gate, up = part.gate_proj(x), part.up_proj(x)
        dtype = product_dtype(getattr(part.down_proj, "base", part.down_proj), gate)
        if dtype == gate.dtype:
            kept = gate.detach(), up.detach()
        else:
            kept = gate.new_empty(gate.shape, dtype=dtype), gate.new_empty(gate.shape, dtype=dtype)
        h = GatedProduct.apply(gate, up, *kept, found)
        return part.down_proj(recomputable(h, partial(gated, found, dtype=h.dtype), *kept))

    return forward if _same(module, forward, [(2, width)]) else None


@contextmanager
def _lean_rotations(model: nn.Module) -> Iterator[None]:
    """Within the block the functions that the model's attention layers rotate with are Rotation, where they compute it.

    Several such blocks may last at once, within each other or in different threads: the last one puts the functions back.
    """
    attentions = {type(module) for module in model.modules() if "Attention" in type(module).__name__}
    places = {id(names): names for names in (unwrap(kind.forward).__globals__ for kind in attentions)}
    used: list[int] = []
    try:
        with _REPLACING:
            for place, names in places.items():
                if place in _REPLACED or (callable(names.get(ROTATION)) and _replace_rotation(names)):
                    _REPLACED[place][1] += 1
                    used.append(place)
        yield
    finally:
        with _REPLACING:
            for place in used:
                _REPLACED[place][1] -= 1
                if not _REPLACED[place][1]:
                    places[place][ROTATION] = _REPLACED.pop(place)[0]


_REPLACED: dict[
    int, list[Any]
] = {}  # id of a Python module's names -> its own function, and how many blocks use Rotation
_REPLACING = threading.Lock()


def _replace_rotation(names: dict[str, Any]) -> bool:
    """Put Rotation in the place of the function, if it computes that."""
    own, found = names[ROTATION], _lean_rotation(names[ROTATION])
    if found is not None:
        names[ROTATION], _REPLACED[id(names)] = found, [own, 0]
    return found is not None


def _lean_rotation(own: Callable[..., Any]) -> Callable[..., Any] | None:
    """Rotation in the place of `own`, which it calls for what C does not compute; None where its results are others."""
    part, whole = (_rotates(own, width) for width in (4, 8))

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        known = part or cos.shape[-1] == q.shape[-1]
        if not known or args or kwargs or q.dim() != 4 or len(q) != 1 or not pointwise.rotates(q, k, cos, sin):
            return own(q, k, cos, sin, *args, **kwargs)
        return Rotation.apply(q, k, cos, sin)

    return rotate if whole else None


def _rotates(own: Callable[..., Any], width: int) -> bool:
    """Whether `own` rotates the first `width` of 8 channels, with any cos and sin."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 5, 8), (1, 2, 5, 8), (1, 5, width), (1, 5, width))
    q, k, cos, sin = (torch.randn(shape, generator=generator) for shape in shapes)
    with torch.no_grad():
        try:
            expected, got = own(q, k, cos, sin), pointwise.rotate(q, k, cos, sin)
        except (TypeError, AttributeError, RuntimeError, ValueError, IndexError):
            return False  # it takes other things than its name says
    if not isinstance(expected, tuple) or len(expected) != 2:
        return False
    return all(_near(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def _same(module: Callable[..., Any], forward: Callable[..., Any], shapes: list[Any]) -> bool:
    """Whether both give the same for a random input."""
    held = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to("cpu" if held is None else held.device) for shape in shapes]
    with torch.no_grad():
        try:
            expected, got = module(*inputs), forward(*inputs)
        except (TypeError, AttributeError, RuntimeError):  # takes or holds other things than its name says
            return False
    return isinstance(expected, Tensor) and _near(got, expected)


def _near(got: Tensor, expected: Tensor) -> bool:
    """Whether they are the same but for rounding, which in a sum is that of its largest part."""
    if got.shape != expected.shape:
        return False
    return torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

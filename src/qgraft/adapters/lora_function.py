"""A layer with its LoRAs (lora.py) as one autograd function, and the mask of its dropout.

It saves x, A, B and x A^T (r numbers a token): the dropout mask is drawn again from its seed, the base has no weight
gradient, and the input gradient is skipped where nothing below needs it. Written with ordinary modules, the same layer
keeps the masked x and an output-sized temporary, too. Where x itself is cheap to compute from what is kept anyway
(recompute.py), not even x is saved.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qgraft.adapters.recompute import Recompute
from qgraft.kernels.lora import lora_backward, lora_forward
from qgraft.kernels.summed_lora import casts_kept, kept_casts
from qgraft.kernels.terms import Term
from qgraft.linear import fused_gradient, fused_weight, grad_input


class LayerSegment(NamedTuple):
    """How one adapter takes part in a layer's pass: on which tokens, with which factor and which mask."""

    start: int
    stop: int
    scaling: float
    dropout: float
    seed: int


class LoraFunction(torch.autograd.Function):
    """y = base(x), and in the rows of each segment + s · (drop(x) A^T) B^T. Gradients for x and every A and B.

    It saves x, each A and B, and the narrow h = drop(x) A^T. The products are those of kernels/lora.py; where the base
    computes in bfloat16 (`QuantizedLinear.compute`), the deltas are products in float32 still: they are mostly smaller than
    half a step of a bfloat16 y, to which adding them would change nothing. A segment reads and writes its own rows only: NaN
    in one adapter stays in its own tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: nn.Module,
        segments: Sequence[LayerSegment],
        again: Recompute | None,
        *tensors: Tensor,
    ) -> Tensor:
        """x [..., in]; A [r, in], B [out, r] of each segment, then the tensors of `again` -> y [..., out], dtype of x."""
        weights, sources = tensors[: 2 * len(segments)], tensors[2 * len(segments) :]
        ctx.base, ctx.segments, ctx.again = base, segments, again and again.again
        if again and any(ctx.needs_input_grad):
            again.again.layers += 1
        ctx.compute, ctx.casts = getattr(base, "compute", "float32"), kept_casts()
        x_NI = x.reshape(-1, x.shape[-1]).contiguous()
        weight = fused_weight(base, x_NI)
        y_NO, hs = lora_forward(x_NI, base(x_NI) if weight is None else weight, _terms(segments, weights, x_NI))
        ctx.save_for_backward(*weights, *hs, *(sources if again else (x_NI,)))
        # in place and no view: some models add to what a layer gives them (Falcon), which autograd forbids for views
        return y_NO.resize_(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    @once_differentiable  # a second derivative is refused: it would have to keep what this function does not save
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """g [..., out] -> gradients of x and of every A and B."""
        count, saved = len(ctx.segments), ctx.saved_tensors  # which may be asked for once only
        weights, hs, sources = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        x = ctx.again.of(*sources) if ctx.again else sources[0]
        x_NI = x.reshape(-1, x.shape[-1])
        g_NO = grad.reshape(-1, grad.shape[-1]).to(x_NI.dtype).contiguous()
        terms = _terms(ctx.segments, weights, x_NI)
        base = None
        if ctx.needs_input_grad[0]:
            weight = fused_gradient(ctx.base, g_NO, ctx.compute)
            base = grad_input(ctx.base, g_NO, ctx.compute) if weight is None else weight
        with nullcontext() if ctx.casts is None else casts_kept(ctx.casts):
            gx_NI, grads = lora_backward(g_NO, base, terms, hs)
        if gx_NI is not None:
            for segment, term, own in zip(ctx.segments, terms, grads, strict=True):
                if not term.adds:
                    gx_SI = own.gh @ term.A.to(own.gh.dtype)
                    gx_NI[segment.start : segment.stop] += drop_by_seed(gx_SI, segment.dropout, segment.seed)
            gx_NI = gx_NI.view(*grad.shape[:-1], gx_NI.shape[-1])
        return gx_NI, None, None, None, *(g for own in grads for g in own[:2]), *(None for _ in sources if ctx.again)


def _terms(segments: Sequence[LayerSegment], weights: Sequence[Tensor], x_NI: Tensor) -> list[Term]:
    return [
        Term(s.start, s.stop, s.scaling, A, B, drop_by_seed(x_NI[s.start : s.stop], s.dropout, s.seed), not s.dropout)
        for s, A, B in zip(segments, weights[::2], weights[1::2], strict=True)
    ]


def drop_by_seed(x_SI: Tensor, dropout: float, seed: int) -> Tensor:
    """Inverted dropout with the mask that `seed` stands for; x itself when dropout is 0."""
    if not dropout:
        return x_SI
    generator = torch.Generator(x_SI.device).manual_seed(seed)
    keep_SI = torch.empty_like(x_SI).bernoulli_(1.0 - dropout, generator=generator)
    return x_SI * keep_SI.div_(1.0 - dropout)

"""One packed row whose tokens use different LoRAs: what several jobs need that train on one base at once.

    tokens        a0 a1 a2 a3 | b0 b1 b2 | c0 c1 ...       a padding-free batch is one row (training/batches.py)
    y             = base(x)                                once, for all tokens
    y[0:4]       += s_a · (x[0:4] A_a^T) B_a^T             each adapter over its own segment
    y[4:7]       += s_b · (x[4:7] A_b^T) B_b^T

The whole layer is one autograd function that saves x, every A and B, and the small x A^T; the input gradient g W is
computed once for all tokens. Products with the rank are written so that the rank is the number of rows of the result
(h^T = A x^T, [r, tokens]): with 8 columns instead of 8 rows, a product takes three times as long. A segment reads and
writes its own rows only: NaN in one adapter stays in its own tokens, and each adapter's gradients are those that it would
have alone.

Not chosen: all A stacked to one matrix, with the foreign products masked out. It takes fewer and larger products, but
n times the work of each, and 0 · NaN is NaN: one broken adapter would break all others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qgraft.adapters.lora import Lora, LoraLinear, Recipe, drop_by_seed
from qgraft.adapters.selection import selection_of
from qgraft.errors import UnsupportedError
from qgraft.linear import grad_input, product_dtype, to_autocast

NARROW = (
    16  # ranks up to which a float32 product of a segment takes less time than rounding to bfloat16 and multiplying
)


@dataclass(eq=False)
class Segment:
    """Tokens start:stop of a packed row, which one adapter serves.

    Attributes:
        generator: where the seeds of its dropout masks are drawn, in the order in which layers are first reached.
        seeds: those drawn so far; a layer that gradient checkpointing runs again must drop the same inputs.
    """

    adapter: str
    start: int
    stop: int
    generator: torch.Generator
    seeds: dict[nn.Module, int] = field(default_factory=dict)

    def seed(self, layer: nn.Module) -> int:
        """The seed of this segment's mask in a layer."""
        if layer not in self.seeds:
            self.seeds[layer] = int(torch.randint(2**62, (), generator=self.generator).item())
        return self.seeds[layer]


class _Term(NamedTuple):
    """What SegmentsFunction must know of one adapter beside its A and B."""

    start: int
    stop: int
    scaling: float
    dropout: float
    seed: int


@contextmanager
def serving_segments(model: nn.Module, segments: Sequence[Segment]) -> Iterator[None]:
    """Within the block every wrapped layer takes one row of tokens, each served by the adapter of its segment.

    The backward pass belongs into the block, too: gradient checkpointing runs layers again in it.
    """
    selection = selection_of(model)

    def serve(layer: LoraLinear, x: Tensor) -> Tensor:
        return _layer_with_segments(layer, x, segments)

    selection.serve = serve
    try:
        yield
    finally:
        selection.serve = None


def _layer_with_segments(layer: LoraLinear, x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """x [1, tokens, in] -> [1, tokens, out]."""
    if x.numel() != segments[-1].stop * x.shape[-1]:
        raise UnsupportedError(
            f"several jobs at once: a layer got an input {list(x.shape)}, expected {segments[-1].stop} tokens",
            hint="this architecture does not pass every token through every layer; train one adapter at a time",
        )
    recipe: Recipe | None = getattr(x, "qgraft_recipe", None)
    terms: list[_Term] = []
    weights: list[Tensor] = []
    for segment in segments:
        if segment.adapter in layer.loras:
            lora = cast(Lora, layer.loras[segment.adapter])
            dropout = lora.config.lora_dropout if layer.training else 0.0
            seed = segment.seed(layer) if dropout else 0
            terms.append(_Term(segment.start, segment.stop, lora.config.scaling, dropout, seed))
            weights += [lora.lora_A, lora.lora_B]
    if not terms:
        return layer.base(x)
    return SegmentsFunction.apply(
        to_autocast(x), layer.base, terms, recipe, *weights, *(recipe.tensors if recipe else ())
    )


class SegmentsFunction(torch.autograd.Function):
    """y = base(x), and each term's s · (drop(x) A^T) B^T in its rows. Gradients for x and every A and B; see LoraFunction."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: nn.Module, terms: Sequence[_Term], recipe: Recipe | None, *tensors: Tensor
    ) -> Tensor:
        """x [..., in]; A [r, in], B [out, r] of each term, then what the recipe of x needs -> y [..., out], dtype of x."""
        weights, sources = tensors[: 2 * len(terms)], tensors[2 * len(terms) :]
        dtype = ctx.dtype = product_dtype(base, x)
        ctx.base, ctx.terms, ctx.make = base, terms, recipe and recipe.make
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        y_NO = base(x_NI).to(x.dtype)
        inner_RS = []
        for term, A, B in zip(terms, weights[::2], weights[1::2], strict=True):
            inner = x.dtype if len(A) <= NARROW else dtype
            own_SI = (x.reshape(x_NI.shape) if inner == x.dtype else x_NI)[term.start : term.stop]
            h_RS = A.to(inner) @ drop_by_seed(own_SI, term.dropout, term.seed).T
            y_NO[term.start : term.stop].addmm_(h_RS.T.to(x.dtype), B.to(x.dtype).T, alpha=term.scaling)
            inner_RS.append(h_RS)
        ctx.save_for_backward(*weights, *inner_RS, *(sources if recipe else (x_NI,)))
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """g [..., out] -> gradients of x and of every A and B."""
        count, saved = len(ctx.terms), ctx.saved_tensors  # which may be asked for once only
        weights, inner_RS, sources = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        x = ctx.make(*sources) if ctx.make else sources[0]
        x_NI, g_NO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        gx_NI = grad_input(ctx.base, g_NO.to(ctx.dtype)).to(grad.dtype) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for term, A, B, h_RS in zip(ctx.terms, weights[::2], weights[1::2], inner_RS, strict=True):
            rows = slice(term.start, term.stop)
            g_SO, own_SI = g_NO[rows].to(h_RS.dtype), x_NI[rows].to(h_RS.dtype)
            gh_RS = (B.to(h_RS.dtype).T @ g_SO.T).mul_(term.scaling)
            grads.append((gh_RS @ drop_by_seed(own_SI, term.dropout, term.seed)).to(A.dtype))
            grads.append((h_RS @ g_SO).to(B.dtype).mul_(term.scaling).T)
            if gx_NI is not None and term.dropout:
                gx_NI[rows] += drop_by_seed((gh_RS.T @ A.to(h_RS.dtype)).to(grad.dtype), term.dropout, term.seed)
            elif gx_NI is not None:
                gx_NI[rows].addmm_(gh_RS.T.to(grad.dtype), A.to(grad.dtype))
        grad_x = None if gx_NI is None else gx_NI.view(*grad.shape[:-1], gx_NI.shape[-1])
        return grad_x, None, None, None, *grads, *(None for _ in ctx.needs_input_grad[4 + 2 * count :])

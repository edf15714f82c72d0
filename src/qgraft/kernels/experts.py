"""A projection of all experts of a mixture with its LoRAs: rows that are sorted by their experts, each with its own weight.

    forward    h = x A_e^T       y  = x W_e^T + s h B_e^T
    backward   gh = s g B_e      gx = g W_e + gh A_e         gA_e = gh^T x       gB_e = s g^T h

The functions here are the reference of the row `experts`, made of two other rows: `grouped` multiplies with the packed
weights of all experts in one call, `lora` adds the LoRAs of one expert after the other. They go by a list of the rows of each
expert, for which a GPU would have to be waited for; its own kernels (gpu_experts.py) read these bounds from its memory.

Shapes: E experts, R rows, T tokens, I and O the inputs and outputs of the projection, K the rank of a LoRA.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgraft.formats import PackedTensor
from qgraft.kernels.grouped import Group, grouped_linear
from qgraft.kernels.lora import lora_backward, lora_forward
from qgraft.kernels.terms import Term

Pair = tuple[Tensor, Tensor]


class Rows:
    """Whose the rows of a pass are: sorted by their experts, and within an expert by their tokens.

    Attributes:
        tokens: [R] int64, the token of each row.
        experts: [R] int64, ascending.
        bounds: [E + 1] int64: rows bounds[e] to bounds[e + 1] are those of expert e.
        total: how many tokens there are.
    """

    def __init__(self, tokens: Tensor, experts: Tensor, count: int, total: int) -> None:
        self.tokens, self.experts, self.total = tokens, experts, total
        self.bounds = torch.searchsorted(experts, torch.arange(count + 1, device=experts.device))

    @cached_property
    def groups(self) -> list[Group]:
        """(expert, start, stop) of each expert that has rows. A GPU is waited for."""
        pairs = enumerate(pairwise(self.bounds.tolist()))
        return [(expert, start, stop) for expert, (start, stop) in pairs if start < stop]


class Projection(NamedTuple):
    """The weights.

    Attributes:
        experts: how many.
        stacks: [E·O', I] each: the O' outputs of all experts.
        outputs: which of the O outputs each stack makes.
        compute: what products of float32 round (QuantizedLinear.compute).
    """

    experts: int
    stacks: tuple[PackedTensor, ...]
    outputs: tuple[slice, ...]
    compute: str = "float32"

    @property
    def width(self) -> int:
        """O."""
        return sum(stack.shape[0] for stack in self.stacks) // self.experts


class ExpertTerm(NamedTuple):
    """One LoRA, on the rows of the tokens start:stop.

    Attributes:
        A: [E, K, I] float32.
        B: [E, O, K] float32.
    """

    start: int
    stop: int
    scaling: float
    A: Tensor
    B: Tensor


def experts_forward(
    x_RI: Tensor, weights: Projection, rows: Rows, terms: Sequence[ExpertTerm]
) -> tuple[Tensor, list[Tensor]]:
    """x [R, I], contiguous -> (y [R, O], what the backward pass is given)."""
    parts = _grouped([x_RI] * len(weights.stacks), weights, rows, False)
    y_RO = parts[0] if len(parts) == 1 else x_RI.new_empty(len(x_RI), weights.width)
    for part, outputs in zip(parts, weights.outputs, strict=True) if len(parts) > 1 else ():
        y_RO[:, outputs] = part
    found = _of_experts(rows, terms, x_RI)
    return lora_forward(x_RI, y_RO, [term for _, _, term in found]) if found else (y_RO, [])


def experts_backward(
    g_RO: Tensor, weights: Projection, rows: Rows, terms: Sequence[ExpertTerm], hs: Sequence[Tensor], x_RI: Tensor,
    wanted: bool,
) -> tuple[Tensor | None, list[Pair]]:  # fmt: skip
    """g [R, O], contiguous -> (gx [R, I], or None where that is not wanted, the gradients of A and B of each term).

    Args:
        hs: as experts_forward gave them.
        x_RI: what it was given; of any shape where there are no terms.
    """
    gx_RI = None
    if wanted:
        gx_RI, *others = _grouped([g_RO[:, outputs] for outputs in weights.outputs], weights, rows, True)
        for other in others:
            gx_RI += other
    grads = [(torch.zeros_like(term.A), torch.zeros_like(term.B)) for term in terms]
    if found := _of_experts(rows, terms, x_RI):
        gx_RI, own = lora_backward(g_RO, gx_RI, [term for _, _, term in found], hs)
        for (number, expert, _), each in zip(found, own, strict=True):
            grads[number][0][expert] += each.A
            grads[number][1][expert] += each.B
    return gx_RI, grads


def _grouped(xs: list[Tensor], weights: Projection, rows: Rows, backward: bool) -> list[Tensor]:
    """The products with the stacks, those of one format in one call."""
    found: dict[int, Tensor] = {}
    for format in dict.fromkeys(stack.format for stack in weights.stacks):
        at = [number for number, stack in enumerate(weights.stacks) if stack.format == format]
        packed, own = [weights.stacks[number] for number in at], [xs[number] for number in at]
        ys = grouped_linear(own, packed, weights.experts, rows.groups, backward, weights.compute)
        found |= dict(zip(at, ys, strict=True))
    return [found[number] for number in range(len(weights.stacks))]


def _of_experts(rows: Rows, terms: Sequence[ExpertTerm], x_RI: Tensor) -> list[tuple[int, int, Term]]:
    """(number of the term, expert, its LoRA on the rows of its tokens) of those that have rows."""
    found: list[tuple[int, int, Term]] = []
    for expert, start, stop in rows.groups if terms else ():
        for number, term in enumerate(terms):
            first, last = start, stop
            if (term.start, term.stop) != (0, rows.total):
                ends: Any = torch.tensor([term.start, term.stop], device=rows.tokens.device)
                first, last = (start + torch.searchsorted(rows.tokens[start:stop], ends)).tolist()
            if first < last:
                own = Term(first, last, term.scaling, term.A[expert], term.B[expert], x_RI[first:last])
                found.append((number, expert, own))
    return found

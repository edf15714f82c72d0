"""Products of the experts of a mixture: rows that are sorted by their experts, each group with the weight of its own.

    y = x W_e^T, or gx = g W_e, for the rows start:stop of expert e

The weights of all experts are one packed tensor of `experts` times as many rows as one has. In C all experts are one call
(cpu/grouped.py); what is not served there goes an expert after the other by the rows of ops.py, which is the reference.

Shapes: R rows, E experts, I inputs, O outputs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qgraft.formats import PackedTensor
from qgraft.kernels.choice import choose
from qgraft.kernels.ops import (
    linear,
    linear_bf16,
    linear_grad_input,
    linear_grad_input_bf16,
    linear_grad_input_int8,
    linear_int8,
)

Op = Callable[[Tensor, PackedTensor], Tensor]
Group = tuple[int, int, int]  # expert, start, stop

_FORWARD: dict[str, Op] = {"float32": linear, "bf16": linear_bf16, "int8": linear_int8}
_BACKWARD: dict[str, Op] = {
    "float32": linear_grad_input,
    "bf16": linear_grad_input_bf16,
    "int8": linear_grad_input_int8,
}


class Product(NamedTuple):
    """Which product of ops.py: forward or backward, and what it rounds (QuantizedLinear.compute)."""

    backward: bool
    compute: str

    def of(self, x: Tensor, packed: PackedTensor) -> Tensor:
        """Of one matrix."""
        return (_BACKWARD if self.backward else _FORWARD)[self.compute](x, packed)


def grouped_linear(
    xs: Sequence[Tensor],
    stacks: Sequence[PackedTensor],
    experts: int,
    groups: Sequence[Group],
    backward: bool = False,
    compute: str = "float32",
) -> list[Tensor]:
    """The product of each of `xs` with the stack at its place, all in one call where there is a kernel.

    Args:
        xs: [R, I] each, or [R, O] where `backward`; of one dtype. Rows of no group have no meaning in the results.
        stacks: [E·O, I] each, of one format.
        groups: those with rows, in the order of their rows.
        compute: rounds only float32.

    Returns [R, O] each, or [R, I]. Raises ValueError for other widths.
    """
    for x, stack in zip(xs, stacks, strict=True):
        width = stack.shape[0] // experts if backward else stack.shape[1]
        if x.shape[1] != width:  # the C loops trust it
            raise ValueError(f"got rows {list(x.shape)}, expected [rows, {width}]")
    product = Product(backward, compute if xs[0].dtype == torch.float32 else "float32")
    module = choose("grouped", stacks[0].format, xs[0].device.type, xs[0].dtype).module
    found: list[Tensor] = module.grouped_linear([x.contiguous() for x in xs], stacks, experts, groups, product)
    return found

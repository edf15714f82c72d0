"""The products of all experts in one call of linear.c: a structure for each expert that has rows, and threads share them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from qgraft.formats import PackedTensor
from qgraft.kernels import reference
from qgraft.kernels.choice import choose
from qgraft.kernels.cpu.abi import FORMAT_IDS, ROUNDINGS, LinearCall
from qgraft.kernels.cpu.library import has_bf16
from qgraft.kernels.cpu.packed import call_linear, rounding_of, scratch_floats, stored

if TYPE_CHECKING:
    from qgraft.kernels.grouped import Group, Product


def grouped_linear(
    xs: Sequence[Tensor], stacks: Sequence[PackedTensor], experts: int, groups: Sequence["Group"], product: "Product"
) -> list[Tensor]:
    """As grouped.grouped_linear; bfloat16 that C does not multiply goes an expert after the other."""
    backward, compute = product
    if compute == "bf16" and not has_bf16():
        return reference.grouped_linear(xs, stacks, experts, groups, product)
    if compute == "int8":
        row = "linear_grad_input_int8" if backward else "linear_int8"
        compute = choose(row, stacks[0].format, "cpu").compute
    ys, calls, floats, kept = [], [], 0, []
    for x, stack in zip(xs, stacks, strict=True):
        rows, columns = stack.shape[0] // experts, stack.shape[1]
        y = x.new_empty(len(x), columns if backward else rows)
        data, scales = stored(stack)
        of_data, of_scales = data.nbytes // experts, rows * 4
        ys.append(y)
        kept.append((data, scales))
        for expert, start, stop in groups:
            rounding = rounding_of(compute, stop - start, backward)
            call = LinearCall(
                FORMAT_IDS[stack.format], rows, columns, stop - start, ROUNDINGS.index(rounding), 0,
                data.data_ptr() + expert * of_data, None if scales is None else scales.data_ptr() + expert * of_scales,
                None, x.data_ptr() + 4 * start * x.shape[1], y.data_ptr() + 4 * start * y.shape[1],
            )  # fmt: skip
            calls.append((call, floats))
            floats += scratch_floats(rounding, stop - start, x.shape[1])
    call_linear(calls, floats, backward)
    return ys

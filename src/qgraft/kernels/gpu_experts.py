"""The experts of a mixture on a GPU, without the CPU knowing which rows are whose (triton_experts.py).

    many rows    a stack is unpacked as triton_ops.py does it, and multiplied by one kernel for all experts
    few rows     one an expert on average at most, as in decoding: each reads the packed bytes of its own expert

What LoRAs add comes first and the product with W is added to it in one float32 sum, as in summed_lora.py. Nothing here waits
for the GPU, and a CUDA graph may hold all of it.

Not chosen: torch's grouped_mm. It is for bfloat16, and on most GPUs reads the bounds on the CPU. Shapes: see experts.py.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qgraft.formats import PackedTensor, slice_rows
from qgraft.kernels import triton_ops
from qgraft.kernels.cuda_graphs import power_of_two
from qgraft.kernels.experts import ExpertTerm, Pair, Projection, Rows
from qgraft.kernels.summed_lora import cast_kept, unpacked_weight

WORKSPACE = 1 << 29  # bytes that are unpacked at a time, of one expert at least


def experts_forward(
    x_RI: Tensor, weights: Projection, rows: Rows, terms: Sequence[ExpertTerm]
) -> tuple[Tensor, list[Tensor]]:
    """As experts.experts_forward."""
    y_RO, hs = _room(x_RI, weights.width, terms, rows), list[Tensor]()
    for number, term in enumerate(terms):
        A, B = cast_kept(term.A, x_RI.dtype), cast_kept(term.B, x_RI.dtype, term.scaling)
        h_RK = x_RI.new_empty(len(x_RI), A.shape[1])
        _product(x_RI, A, h_RK, rows, term)
        _product(h_RK, B, y_RO, rows, term, add=bool(number) or not _serves_all(term, rows))
        hs.append(h_RK)
    x_RI = _factor(x_RI, weights)
    for stack, outputs in zip(weights.stacks, weights.outputs, strict=True):
        _packed_product(x_RI, stack, weights.experts, y_RO[:, outputs], rows, False, bool(terms))
    return y_RO, hs


def experts_backward(
    g_RO: Tensor, weights: Projection, rows: Rows, terms: Sequence[ExpertTerm], hs: Sequence[Tensor], x_RI: Tensor,
    wanted: bool,
) -> tuple[Tensor | None, list[Pair]]:  # fmt: skip
    """As experts.experts_backward."""
    gx_RI = _room(g_RO, weights.stacks[0].shape[1], terms, rows) if wanted else None
    grads: list[Pair] = []
    for number, (term, h_RK) in enumerate(zip(terms, hs, strict=True)):
        A, B = cast_kept(term.A, g_RO.dtype), cast_kept(term.B, g_RO.dtype, term.scaling)
        gh_RK = g_RO.new_empty(h_RK.shape)
        _product(g_RO, B.mT, gh_RK, rows, term)
        if gx_RI is not None:
            _product(gh_RK, A.mT, gx_RI, rows, term, add=bool(number) or not _serves_all(term, rows))
        grads.append((_outer(gh_RK, x_RI, 1.0, rows, term), _outer(g_RO, h_RK, term.scaling, rows, term)))
    if gx_RI is not None:
        g_RO = _factor(g_RO, weights)
        for number, (stack, outputs) in enumerate(zip(weights.stacks, weights.outputs, strict=True)):
            _packed_product(g_RO[:, outputs], stack, weights.experts, gx_RI, rows, True, bool(terms or number))
    return gx_RI, grads


def _serves_all(term: ExpertTerm, rows: Rows) -> bool:
    return (term.start, term.stop) == (0, rows.total)


def _room(x: Tensor, width: int, terms: Sequence[ExpertTerm], rows: Rows) -> Tensor:
    """[R, width] for what is written first: by the first term, or zeros where that has not all rows."""
    some = bool(terms) and not _serves_all(terms[0], rows)
    return (x.new_zeros if some else x.new_empty)(len(x), width)


def _factor(x: Tensor, weights: Projection) -> Tensor:
    """What the packed weights are multiplied with, and unpacked in the dtype of."""
    return x.bfloat16() if weights.compute == "bf16" and x.dtype == torch.float32 else x


def _packed_product(
    x: Tensor, stack: PackedTensor, experts: int, y: Tensor, rows: Rows, backward: bool, add: bool
) -> None:
    """y = x W_e^T, or x W_e where `backward`, or y += ; x and y may be parts of wider matrices."""
    if not backward and stack.format in triton_ops.UNITS and 0 < len(x) <= experts:
        _few(x, stack, experts, y, rows, add)
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    out, width = stack.shape[0] // experts, stack.shape[1]
    some = max(1, WORKSPACE // (out * width * x.dtype.itemsize))
    for first in range(0, experts, some):
        last = min(first + some, experts)
        part = stack if last - first == experts else slice_rows(stack, first * out, last * out)
        w_EOI = unpacked_weight(part, x.dtype).view(last - first, out, width)
        _product(x, w_EOI.mT if backward else w_EOI, y, rows, add=add, bounds=rows.bounds[first : last + 1])


def _product(
    x: Tensor, w_ENK: Tensor, y: Tensor, rows: Rows, term: ExpertTerm | None = None, add: bool = False,
    bounds: Tensor | None = None,
) -> None:  # fmt: skip
    """y [R, N] = x [R, K] W_e^T, or y +=, in the rows of the term's tokens, or of these bounds, or in all."""
    (count, N, K), bounds = w_ENK.shape, rows.bounds if bounds is None else bounds
    some = term is not None and not _serves_all(term, rows)
    first, last = (term.start, term.stop) if term is not None else (0, 0)
    BM, BN, BK, warps = _tile(len(x) // count, N, K, x.dtype)
    arguments = (
        x, w_ENK, y, bounds, rows.tokens, first, last, count, N, K, x.stride(0), *w_ENK.stride(), *y.stride(),
    )  # fmt: skip
    constants = {"EP": power_of_two(max(2, count)), "BM": BM, "BN": BN, "BK": BK, "ADD": add, "SOME": some}
    _launch(_experts().grouped_kernel, (-(-N // BN), -(-len(x) // BM) + count, 1), arguments, constants, warps)


def _outer(a: Tensor, b: Tensor, scaling: float, rows: Rows, term: ExpertTerm) -> Tensor:
    """[E, M, N] float32: s a^T b of a [R, M] and b [R, N] over the rows of each expert that are of the term's tokens."""
    experts, M, N = len(rows.bounds) - 1, a.shape[1], b.shape[1]
    out = torch.empty(experts, M, N, dtype=torch.float32, device=a.device)
    BM, BN, BK, warps = _tile(M, N, max(1, len(a) // experts), a.dtype)
    arguments = (
        a, b, out, rows.bounds, rows.tokens, term.start, term.stop, float(scaling), M, N, a.stride(0), b.stride(0),
    )  # fmt: skip
    constants = {"BM": BM, "BN": BN, "BK": BK, "SOME": not _serves_all(term, rows)}
    _launch(_experts().outer_kernel, (-(-N // BN), -(-M // BM), experts), arguments, constants, warps)
    return out


def _few(x: Tensor, stack: PackedTensor, experts: int, y: Tensor, rows: Rows, add: bool) -> None:
    """y = x W_e^T from packed bytes, one row of x after the other."""
    out, width = stack.shape[0] // experts, stack.shape[1]
    data, halves, beside, (units, row_bytes) = triton_ops.stored(stack, x.dtype)
    some_rows, some_units, warps = (64, 32, 4) if triton_ops.interpreted() else triton_ops.tile(stack.format)
    arguments = (
        x.contiguous(), data, halves, beside, y, rows.experts, out, units, row_bytes, width, *y.stride(),
    )  # fmt: skip
    constants = {
        "F": stack.format,
        "RUN": triton_ops.UNITS[stack.format][1],
        "BN": some_rows,
        "NU": some_units,
        "ADD": add,
    }
    _launch(_experts().few_kernel, (-(-out // some_rows), len(x), 1), arguments, constants, warps)


def _tile(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(rows, columns, inner numbers, warps) of a program; float32 is multiplied without tensor cores."""
    most = (64, 64, 32) if dtype == torch.float32 else (128, 128, 64)
    BM, BN, BK = (min(limit, power_of_two(max(16, n))) for limit, n in zip(most, (M, N, K), strict=True))
    return BM, BN, BK, 8 if BM * BN >= 128 * 128 else 4


def _launch(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int
) -> None:
    if all(grid):
        triton_ops.launch(kernel, grid, arguments, {**constants, "EXACT": triton_ops.interpreted()}, warps)


@cache
def _experts() -> ModuleType:
    from qgraft.kernels import triton_experts

    return triton_experts

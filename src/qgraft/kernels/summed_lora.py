"""A layer with its LoRAs in half precision on a GPU, in one sum.

What LoRAs add comes first and the product with W is added to it, in the sum that cuBLAS takes in float32: y = s h B^T, then
y += x W^T. Added to a y that was rounded to bfloat16 before, a delta of a thousandth of y keeps half of its value on average,
one of a ten-thousandth 6 %. The gradients of A and B are sums over all tokens of a pass, and passes are summed: they stay in
float32.

Not chosen: W and B side by side in one product of a larger inner dimension. It is the same sum, but cuBLAS takes 12 % longer
for 4112 columns than for 4096, and x must be copied.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from qgraft.formats import PackedTensor
from qgraft.kernels import triton_ops
from qgraft.kernels.choice import choose
from qgraft.kernels.reference import dequantize, lora_gradients
from qgraft.kernels.terms import Grads, Term, Weight

Casts = dict[tuple[int, torch.dtype, float], tuple[Tensor, Tensor]]
_casts: ContextVar[Casts | None] = ContextVar("casts of A and B", default=None)


@contextmanager
def casts_kept(casts: Casts | None = None) -> Iterator[None]:
    """Within the block A and B are made half precision once: for a step of training, whose passes do not change them.

    It holds in this thread. Autograd has threads of its own, so a backward pass takes up what `kept_casts` gave forward.
    """
    token = _casts.set({} if casts is None else casts)
    try:
        yield
    finally:
        _casts.reset(token)


def kept_casts() -> Casts | None:
    """What the block around keeps; None outside of one."""
    return _casts.get()


def cast_kept(weight: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """weight * scaling in `dtype`; itself where that is no other."""
    casts = _casts.get()
    key = (weight.data_ptr(), dtype, scaling)
    if casts is not None and (known := casts.get(key)) is not None:
        return known[1]
    cast = (weight if scaling == 1.0 else weight * scaling).to(dtype)
    if casts is not None:
        casts[key] = weight, cast  # with the weight, or another tensor could take its address
    return cast


def lora_forward(x_NI: Tensor, base: Weight, terms: Sequence[Term]) -> tuple[Tensor, list[Tensor]]:
    """As lora.lora_forward."""
    hs, dtype = [term.x @ cast_kept(term.A, x_NI.dtype).T for term in terms], x_NI.dtype
    parts = [(t.start, t.stop, h, cast_kept(t.B, dtype, t.scaling).T) for t, h in zip(terms, hs, strict=True)]
    y_NO = _added(parts, x_NI, base.packed.shape[0]).addmm_(x_NI, unpacked_weight(base.packed, dtype).T)
    return (y_NO if base.bias is None else y_NO.add_(base.bias)), hs


def lora_backward(
    g_NO: Tensor, base: Weight, terms: Sequence[Term], hs: Sequence[Tensor]
) -> tuple[Tensor, list[Grads]]:
    """As lora.lora_backward."""
    dtype = g_NO.dtype
    gs = [g_NO[t.start : t.stop] for t in terms]
    ghs = [g_SO @ cast_kept(t.B, dtype, t.scaling) for t, g_SO in zip(terms, gs, strict=True)]
    parts = [(t.start, t.stop, gh, cast_kept(t.A, dtype)) for t, gh in zip(terms, ghs, strict=True) if t.adds]
    gx_NI = _added(parts, g_NO, base.packed.shape[1]).addmm_(g_NO, unpacked_weight(base.packed, dtype))
    return gx_NI, [lora_gradients(*each) for each in zip(gs, ghs, terms, hs, strict=True)]


def _added(parts: Sequence[tuple[int, int, Tensor, Tensor]], x_NI: Tensor, width: int) -> Tensor:
    """What terms add, [N, width]: the product of two narrow matrices in the rows start:stop of each part."""
    if len(parts) == 1 and parts[0][:2] == (0, len(x_NI)):
        return parts[0][2] @ parts[0][3]
    total_NW = x_NI.new_zeros(len(x_NI), width)
    for start, stop, narrow_SR, wide_RW in parts:
        total_NW[start:stop].addmm_(narrow_SR, wide_RW)
    return total_NW


def unpacked_weight(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """w_OI to multiply with at once, not to be written to."""
    if choose("dequantize", packed.format, packed.device.type).kernel == "triton":
        return triton_ops.weight(packed, dtype)
    return dequantize(packed, dtype)

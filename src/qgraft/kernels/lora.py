"""What LoRAs add to a frozen linear layer, and its gradients: the C kernel of linear.c, and plain torch beside it.

    forward    h = x A^T                 y  = base(x) + s h B^T
    backward   gh = s g B                gx = g W + gh A                 gA = gh^T x        gB = s g^T h

Each LoRA is a `Term`: it serves tokens start:stop. The C kernel computes the product with W in the same call, where W is
packed in a format that it reads (`Weight`); where it is not, y and gx come in with that product in them, and it adds the
rest. Other dtypes and CPUs without AVX2 are served by the ops of ops.py and by torch.

In half precision on a GPU what LoRAs add comes first and the product with W is added to it, in the sum that cuBLAS takes in
float32 (`summed_forward`): y = s h B^T, then y += x W^T. Added to a y that was rounded to bfloat16 before, a delta of a
thousandth of y keeps half of its value on average, one of a ten-thousandth 6 %. The gradients of A and B are sums over all
tokens of a pass, and passes are summed: they stay in float32.

Not chosen: W and B side by side in one product of a larger inner dimension. It is the same sum, but cuBLAS takes 12 % longer
for 4112 columns than for 4096, and x must be copied.

Shapes: N tokens, S tokens of a term, I inputs, O outputs, R rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from qgraft.formats import PackedTensor
from qgraft.kernels import reference, triton_ops
from qgraft.kernels.choice import choose, in_c
from qgraft.kernels.cpu.abi import LoraTerm
from qgraft.kernels.cpu.library import has_bf16, has_panels
from qgraft.kernels.cpu.packed import linear_call
from qgraft.kernels.ops import linear, linear_bf16, linear_grad_input, linear_grad_input_bf16

HALVES = (torch.bfloat16, torch.float16)

Casts = dict[tuple[int, torch.dtype, float], tuple[Tensor, Tensor]]
_casts: ContextVar[Casts | None] = ContextVar("casts of A and B", default=None)


class Weight(NamedTuple):
    """A packed weight that the kernel multiplies with, its bias, and whether in bfloat16 (see ops.linear_bf16)."""

    packed: PackedTensor
    bias: Tensor | None
    bf16: bool


class Term(NamedTuple):
    """One LoRA on the tokens start:stop.

    Attributes:
        A: [R, I] float32.
        B: [O, R] float32.
        x: [S, I] what A multiplies, in the dtype of the layer's input: its rows start:stop, or these with some dropped.
        adds: whether the backward pass adds gh A to gx; where x has been dropped from, the caller does.
    """

    start: int
    stop: int
    scaling: float
    A: Tensor
    B: Tensor
    x: Tensor
    adds: bool = True


class Grads(NamedTuple):
    """Gradients of one term, in float32, and gh [S, R], which goes back through A."""

    A: Tensor
    B: Tensor
    gh: Tensor


def reads(format: str, x: Tensor) -> bool:
    """Whether a kernel multiplies x with weights of this format together with what LoRAs add."""
    few = x.numel() <= triton_ops.FEW_ROWS * x.shape[-1]  # which linear multiplies without unpacking
    return (_sums(x) and not few) or _read_in_c(format, x)


def _read_in_c(format: str, x: Tensor) -> bool:
    return _in_c(x) and choose("linear", format, "cpu").kernel == "native"


def _sums(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in HALVES


def _in_c(x: Tensor) -> bool:
    return in_c(x) and has_panels()


def _fuses(base: Weight, x: Tensor) -> bool:
    """Whether the C kernel computes the product with this weight together with the rest."""
    return _read_in_c(base.packed.format, x) and (has_bf16() or not base.bf16)


def lora_forward(x_NI: Tensor, base: Weight | Tensor, terms: Sequence[Term]) -> tuple[Tensor, list[Tensor]]:
    """(y [N, O], h [S, R] of each term).

    Args:
        base: the frozen weight, or the product with it, [N, O], which is overwritten.
    """
    _check(base, x_NI, 1)
    if isinstance(base, Weight) and _sums(x_NI):
        return summed_forward(x_NI, base, terms)
    weight: PackedTensor | tuple[int, int]
    if isinstance(base, Weight) and not _fuses(base, x_NI):
        base = _product(x_NI, base)
    if isinstance(base, Weight):
        y_NO, (weight, bias, bf16) = x_NI.new_empty(len(x_NI), base.packed.shape[0]), base
    elif not _in_c(x_NI):
        return _add_terms(base, terms)
    else:
        y_NO, weight, bias, bf16 = base, (base.shape[1], x_NI.shape[1]), None, False
    hs = [x_NI.new_empty(len(term.x), len(term.A)) for term in terms]
    pointers = [
        LoraTerm(*_start(term), _rows(term.x), h.data_ptr(), None, None, None, 0)
        for term, h in zip(terms, hs, strict=True)
    ]
    linear_call(x_NI, y_NO, weight, bias=bias, terms=pointers, bf16=bf16)
    return y_NO, hs


def lora_backward(
    g_NO: Tensor, base: Weight | Tensor | None, terms: Sequence[Term], hs: Sequence[Tensor]
) -> tuple[Tensor | None, list[Grads]]:
    """(gx [N, I] or None, the gradients of each term).

    Args:
        base: the frozen weight; or g W [N, I], which is overwritten; None if no gx is wanted.
        hs: as lora_forward gave them.
    """
    _check(base, g_NO, 0)
    if isinstance(base, Weight) and _sums(g_NO):
        return summed_backward(g_NO, base, terms, hs)
    gx_NI: Tensor | None
    weight: PackedTensor | tuple[int, int]
    if isinstance(base, Weight) and not _fuses(base, g_NO):
        base = (linear_grad_input_bf16 if base.bf16 else linear_grad_input)(g_NO, base.packed)
    if isinstance(base, Weight):
        gx_NI, (weight, _, bf16) = g_NO.new_empty(len(g_NO), base.packed.shape[1]), base
    elif not _in_c(g_NO):
        return base, [_term_backward(g_NO, base, term, h) for term, h in zip(terms, hs, strict=True)]
    else:
        gx_NI, weight, bf16 = base, (g_NO.shape[1], terms[0].A.shape[1]), False
    grads = [
        Grads(torch.empty_like(t.A), torch.empty_like(t.B), torch.empty_like(h)) for t, h in zip(terms, hs, strict=True)
    ]
    pointers = [
        LoraTerm(
            *_start(term), _rows(term.x), h.data_ptr(), grad.gh.data_ptr(), grad.A.data_ptr(),
            grad.B.data_ptr(), term.adds,
        )
        for term, h, grad in zip(terms, hs, grads, strict=True)
    ]  # fmt: skip
    linear_call(g_NO, gx_NI, weight, terms=pointers, backward=True, bf16=bf16)
    return gx_NI, grads


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


def _cast(weight: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """weight * scaling in `dtype`."""
    casts = _casts.get()
    key = (weight.data_ptr(), dtype, scaling)
    if casts is not None and (known := casts.get(key)) is not None:
        return known[1]
    cast = (weight if scaling == 1.0 else weight * scaling).to(dtype)
    if casts is not None:
        casts[key] = weight, cast  # with the weight, or another tensor could take its address
    return cast


def summed_forward(x_NI: Tensor, base: Weight, terms: Sequence[Term]) -> tuple[Tensor, list[Tensor]]:
    """lora_forward as one sum, see the module's docstring."""
    hs, dtype = [term.x @ _cast(term.A, x_NI.dtype).T for term in terms], x_NI.dtype
    parts = [(t.start, t.stop, h, _cast(t.B, dtype, t.scaling).T) for t, h in zip(terms, hs, strict=True)]
    y_NO = _added(parts, x_NI, base.packed.shape[0]).addmm_(x_NI, _unpacked(base.packed, dtype).T)
    return (y_NO if base.bias is None else y_NO.add_(base.bias)), hs


def summed_backward(
    g_NO: Tensor, base: Weight, terms: Sequence[Term], hs: Sequence[Tensor]
) -> tuple[Tensor, list[Grads]]:
    """lora_backward likewise."""
    dtype = g_NO.dtype
    gs = [g_NO[t.start : t.stop] for t in terms]
    ghs = [g_SO @ _cast(t.B, dtype, t.scaling) for t, g_SO in zip(terms, gs, strict=True)]
    parts = [(t.start, t.stop, gh, _cast(t.A, dtype)) for t, gh in zip(terms, ghs, strict=True) if t.adds]
    gx_NI = _added(parts, g_NO, base.packed.shape[1]).addmm_(g_NO, _unpacked(base.packed, dtype))
    return gx_NI, [_gradients(*each) for each in zip(gs, ghs, terms, hs, strict=True)]


def _added(parts: Sequence[tuple[int, int, Tensor, Tensor]], x_NI: Tensor, width: int) -> Tensor:
    """What terms add, [N, width]: the product of two narrow matrices in the rows start:stop of each part."""
    if len(parts) == 1 and parts[0][:2] == (0, len(x_NI)):
        return parts[0][2] @ parts[0][3]
    total_NW = x_NI.new_zeros(len(x_NI), width)
    for start, stop, narrow_SR, wide_RW in parts:
        total_NW[start:stop].addmm_(narrow_SR, wide_RW)
    return total_NW


def _unpacked(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    if choose("dequantize", packed.format, packed.device.type).kernel == "triton":
        return triton_ops.weight(packed, dtype)
    return reference.dequantize(packed, dtype)


def _unrounded(a_RN: Tensor, b_NK: Tensor) -> Tensor:
    """The product as it was summed: of half-precision matrices in float32."""
    if a_RN.dtype not in HALVES:
        return a_RN @ b_NK
    return torch.mm(a_RN, b_NK, out_dtype=torch.float32) if a_RN.is_cuda else a_RN.float() @ b_NK.float()


def _product(x_NI: Tensor, base: Weight) -> Tensor:
    y_NO = (linear_bf16 if base.bf16 else linear)(x_NI, base.packed)
    return y_NO if base.bias is None else y_NO + base.bias


def _check(base: Weight | Tensor | None, x: Tensor, side: int) -> None:
    # the C loops trust the width of x: a wrong one would read past its end
    if isinstance(base, Weight) and x.shape[1] != base.packed.shape[side]:
        raise ValueError(f"got an input {list(x.shape)}, expected [tokens, {base.packed.shape[side]}]")


def _start(term: Term) -> tuple[int, int, int, float, int, int]:
    """The first fields of LoraTerm."""
    return (
        term.start, term.stop, len(term.A), term.scaling, _rows(term.A), _rows(term.B),
    )  # fmt: skip


def _rows(tensor: Tensor) -> int:
    """Where its first element is; the C kernel takes rows one after another."""
    assert tensor.is_contiguous() and tensor.dtype == torch.float32, f"{tensor.dtype} {list(tensor.shape)}, with gaps?"
    return tensor.data_ptr()


def _add_terms(y_NO: Tensor, terms: Sequence[Term]) -> tuple[Tensor, list[Tensor]]:
    hs = []
    for term in terms:
        h_SR = term.x @ term.A.to(term.x.dtype).T
        y_NO[term.start : term.stop].addmm_(h_SR, term.B.to(h_SR.dtype).T, alpha=term.scaling)
        hs.append(h_SR)
    return y_NO, hs


def _term_backward(g_NO: Tensor, gx_NI: Tensor | None, term: Term, h_SR: Tensor) -> Grads:
    g_SO = g_NO[term.start : term.stop]
    gh_SR = (g_SO @ term.B.to(g_SO.dtype)).mul_(term.scaling)
    if gx_NI is not None and term.adds:
        gx_NI[term.start : term.stop].addmm_(gh_SR, term.A.to(gh_SR.dtype))
    return _gradients(g_SO, gh_SR, term, h_SR)


def _gradients(g_SO: Tensor, gh_SR: Tensor, term: Term, h_SR: Tensor) -> Grads:
    grad_B_OR = _unrounded(g_SO.T, h_SR).to(term.B.dtype)
    if term.scaling != 1.0:
        grad_B_OR.mul_(term.scaling)
    return Grads(_unrounded(gh_SR.T, term.x).to(term.A.dtype), grad_B_OR, gh_SR)

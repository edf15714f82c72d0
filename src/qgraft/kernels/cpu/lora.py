"""A frozen layer with its LoRAs in one call of linear.c, forward and backward: float32, or the product with W rounded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qgraft.formats import PackedTensor
from qgraft.kernels.cpu.abi import LoraTerm
from qgraft.kernels.cpu.packed import linear_call
from qgraft.kernels.terms import Grads, Term, Weight


def lora_forward(x_NI: Tensor, base: Weight | Tensor, terms: Sequence[Term]) -> tuple[Tensor, list[Tensor]]:
    """As lora.lora_forward."""
    weight: PackedTensor | tuple[int, int]
    if isinstance(base, Weight):
        y_NO, (weight, bias, compute) = x_NI.new_empty(len(x_NI), base.packed.shape[0]), base
    else:
        y_NO, weight, bias, compute = base, (base.shape[1], x_NI.shape[1]), None, "float32"
    hs = [x_NI.new_empty(len(term.x), len(term.A)) for term in terms]
    pointers = [
        LoraTerm(*_start(term), _rows(term.x), h.data_ptr(), None, None, None, 0)
        for term, h in zip(terms, hs, strict=True)
    ]
    linear_call(x_NI, y_NO, weight, bias=bias, terms=pointers, compute=compute)
    return y_NO, hs


def lora_backward(
    g_NO: Tensor, base: Weight | Tensor | None, terms: Sequence[Term], hs: Sequence[Tensor]
) -> tuple[Tensor | None, list[Grads]]:
    """As lora.lora_backward."""
    gx_NI: Tensor | None
    weight: PackedTensor | tuple[int, int]
    if isinstance(base, Weight):
        gx_NI, (weight, _, compute) = g_NO.new_empty(len(g_NO), base.packed.shape[1]), base
    else:
        gx_NI, weight, compute = base, (g_NO.shape[1], terms[0].A.shape[1]), "float32"
    grads = [
        Grads(torch.empty_like(t.A), torch.empty_like(t.B), torch.empty_like(h)) for t, h in zip(terms, hs, strict=True)
    ]
    pointers = [
        LoraTerm(
            *_start(term), _rows(term.x), h.data_ptr(), grad.gh.data_ptr(), grad.A.data_ptr(), grad.B.data_ptr(),
            term.adds,
        )
        for term, h, grad in zip(terms, hs, grads, strict=True)
    ]  # fmt: skip
    linear_call(g_NO, gx_NI, weight, terms=pointers, backward=True, compute=compute)
    return gx_NI, grads


def _start(term: Term) -> tuple[int, int, int, float, int, int]:
    """The first fields of LoraTerm."""
    return (
        term.start, term.stop, len(term.A), term.scaling, _rows(term.A), _rows(term.B),
    )  # fmt: skip


def _rows(tensor: Tensor) -> int:
    """Where its first element is; C takes rows one after another."""
    assert tensor.is_contiguous() and tensor.dtype == torch.float32, f"{tensor.dtype} {list(tensor.shape)}, with gaps?"
    return tensor.data_ptr()

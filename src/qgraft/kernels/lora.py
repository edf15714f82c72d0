"""What LoRAs add to a frozen linear layer, and its gradients.

    forward    h = x A^T                 y  = base(x) + s h B^T
    backward   gh = s g B                gx = g W + gh A                 gA = gh^T x        gB = s g^T h

Each LoRA is a `Term`: it serves tokens start:stop. Kernels of the rows `lora`, `lora_bf16` and `lora_int8` compute the
product with W in the same call, where W is packed in a format that they read (`Weight`): linear.c on a CPU, one sum in
cuBLAS on a GPU (summed_lora.py). Where none does, the ops of ops.py compute that product, and what the LoRAs add to it is
again a row of the table, without a format: C in float32, else plain torch.

Shapes: N tokens, S tokens of a term, I inputs, O outputs, R rank.
"""

from collections.abc import Sequence

from torch import Tensor

from qgraft.kernels import triton_ops
from qgraft.kernels.choice import Choice, choose
from qgraft.kernels.ops import (
    linear,
    linear_bf16,
    linear_grad_input,
    linear_grad_input_bf16,
    linear_grad_input_int8,
    linear_int8,
)
from qgraft.kernels.terms import Grads, Term, Weight

# By the `compute` of a product: its row with LoRAs, the product alone, its input gradient.
_ROWS = {"float32": "lora", "bf16": "lora_bf16", "int8": "lora_int8"}
_PRODUCTS = {"float32": linear, "bf16": linear_bf16, "int8": linear_int8}
_GRADIENTS = {"float32": linear_grad_input, "bf16": linear_grad_input_bf16, "int8": linear_grad_input_int8}


def fuses(format: str, x: Tensor, compute: str) -> bool:
    """Whether a kernel multiplies x with weights of this format together with what LoRAs add."""
    few = x.numel() <= triton_ops.FEW_ROWS * x.shape[-1]  # which linear multiplies without unpacking
    return _choice(format, x, compute).kernel != "reference" and not (few and x.is_cuda)


def lora_forward(x_NI: Tensor, base: Weight | Tensor, terms: Sequence[Term]) -> tuple[Tensor, list[Tensor]]:
    """(y [N, O], h [S, R] of each term).

    Args:
        base: the frozen weight, or the product with it, [N, O], which is overwritten.
    """
    _check(base, x_NI, 1)
    choice = _choice_of(base, x_NI)
    if isinstance(base, Weight) and choice.kernel == "reference":
        base, choice = _product(x_NI, base), _choice(None, x_NI)
    y_NO, hs = choice.module.lora_forward(x_NI, base, terms)
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
    choice = _choice_of(base, g_NO)
    if isinstance(base, Weight) and choice.kernel == "reference":
        base = _GRADIENTS[base.compute](g_NO, base.packed)
        choice = _choice(None, g_NO)
    gx_NI, grads = choice.module.lora_backward(g_NO, base, terms, hs)
    return gx_NI, grads


def _choice_of(base: Weight | Tensor | None, x: Tensor) -> Choice:
    return _choice(base.packed.format, x, base.compute) if isinstance(base, Weight) else _choice(None, x)


def _choice(format: str | None, x: Tensor, compute: str = "float32") -> Choice:
    return choose(_ROWS[compute], format, x.device.type, x.dtype)


def _product(x_NI: Tensor, base: Weight) -> Tensor:
    y_NO = _PRODUCTS[base.compute](x_NI, base.packed)
    return y_NO if base.bias is None else y_NO + base.bias


def _check(base: Weight | Tensor | None, x: Tensor, side: int) -> None:
    # the C loops trust the width of x: a wrong one would read past its end
    if isinstance(base, Weight) and x.shape[1] != base.packed.shape[side]:
        raise ValueError(f"got an input {list(x.shape)}, expected [tokens, {base.packed.shape[side]}]")

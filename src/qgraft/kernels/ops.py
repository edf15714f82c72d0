"""The op table: torch ops on packed weights, with shapes for tracing and gradients.

    qgraft::dequantize(parts, format, in_features, dtype) -> w_OI
    qgraft::linear(x, parts, format) -> y                                y = x W^T
    qgraft::linear_grad_input(grad, parts, format, in_features) -> gx    gx = g W
    qgraft::linear_int8(x, parts, format) -> y              linear with x rounded to 8 bits, float32 in and out
    qgraft::linear_grad_input_int8(grad, parts, format, in_features) -> gx                linear_grad_input likewise
    qgraft::linear_bf16, qgraft::linear_grad_input_bf16     both factors rounded to bfloat16, float32 in and out

The base is frozen, so a weight gradient does not exist; linear's input gradient is linear_grad_input and the other way
round, in bfloat16 and in 8 bits, too: the rounding of x is passed through. `parts` are
the stored tensors of a weight, as many as its format has (formats/packed.py): one table for all formats, since no kernel
differs in anything but how it reads a row, and a format of more parts changes no schema.

Argument checks run in eager code (`formats.checked`), not only in the shape functions, which eager calls never reach.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qgraft.formats import PackedTensor, checked
from qgraft.kernels.choice import choose
from qgraft.kernels.cpu.packed import FEW_ROUNDED

# Not torch.library.custom_op: its wrapper takes 2 us more of each call, and a small product of decoding takes 5.
_LIBRARY = torch.library.Library("qgraft", "DEF")


def _op(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function as the op `name`, on every device."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def dequantize(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] in `dtype`."""
    return torch.ops.qgraft.dequantize(packed.parts, packed.format, packed.shape[1], dtype)


def linear(x: Tensor, packed: PackedTensor) -> Tensor:
    """x [..., in] -> y = x W^T [..., out] in the dtype of x; differentiable in x."""
    return torch.ops.qgraft.linear(x, packed.parts, packed.format)


def linear_bf16(x: Tensor, packed: PackedTensor) -> Tensor:
    """As `linear` for float32 x, with x and W rounded to bfloat16, their products summed in float32.

    Fewer than FEW_ROUNDED rows are computed in float32, by every kernel: it takes no longer.
    """
    return torch.ops.qgraft.linear_bf16(x, packed.parts, packed.format)


def linear_int8(x: Tensor, packed: PackedTensor) -> Tensor:
    """As `linear` for float32 x, which is rounded to 8 bits in groups of 32 columns: the products are of integers.

    Formats without such a kernel are computed in float32: `choose("linear_int8", ...).compute` says so. The gradient is
    `linear_grad_input_int8`.
    """
    return torch.ops.qgraft.linear_int8(x, packed.parts, packed.format)


def linear_grad_input(grad: Tensor, packed: PackedTensor) -> Tensor:
    """g [..., out] -> g W [..., in] in the dtype of g; differentiable in g."""
    return torch.ops.qgraft.linear_grad_input(grad, packed.parts, packed.format, packed.shape[1])


def linear_grad_input_bf16(grad: Tensor, packed: PackedTensor) -> Tensor:
    """As `linear_grad_input` for float32 g, which is rounded to bfloat16 as `linear_bf16` rounds x."""
    return torch.ops.qgraft.linear_grad_input_bf16(grad, packed.parts, packed.format, packed.shape[1])


def linear_grad_input_int8(grad: Tensor, packed: PackedTensor) -> Tensor:
    """As `linear_grad_input` for float32 g: g times the scales of W is rounded to 8 bits, in runs of 32 rows of W.

    Fewer than FEW_ROUNDED rows of g are computed in float32, by every kernel, and so are formats without such a kernel.
    """
    return torch.ops.qgraft.linear_grad_input_int8(grad, packed.parts, packed.format, packed.shape[1])


def _kernel(op: str, format: str, device: torch.device) -> Any:
    return choose(op, format, device.type).module


@_op("dequantize")
def _dequantize_op(parts: Sequence[Tensor], format: str, in_features: int, dtype: torch.dtype) -> Tensor:
    packed = checked(parts, format, in_features)
    # never a view of a part, which a custom op must not return: formats read into memory of their own
    return _kernel("dequantize", format, packed.device).dequantize(packed, dtype)


@_op("linear")
def _linear_op(x: Tensor, parts: Sequence[Tensor], format: str) -> Tensor:
    packed = checked(parts, format, x.shape[-1])
    return _kernel("linear", format, x.device).linear(x, packed)


@_op("linear_bf16")
def _linear_bf16_op(x: Tensor, parts: Sequence[Tensor], format: str) -> Tensor:
    packed = checked(parts, format, x.shape[-1])
    _expect_float32("linear_bf16", x)
    kernel = _kernel("linear_bf16", format, x.device)
    return kernel.linear(x, packed) if _few(x) else kernel.linear_bf16(x, packed)


@_op("linear_int8")
def _linear_int8_op(x: Tensor, parts: Sequence[Tensor], format: str) -> Tensor:
    packed = checked(parts, format, x.shape[-1])
    _expect_float32("linear_int8", x)
    choice = choose("linear_int8", format, x.device.type)
    kernel = choice.module
    return kernel.linear_int8(x, packed) if choice.compute == "int8" else kernel.linear(x, packed)


@_op("linear_grad_input")
def _linear_grad_input_op(grad: Tensor, parts: Sequence[Tensor], format: str, in_features: int) -> Tensor:
    packed = _packed_for(grad, parts, format, in_features)
    return _kernel("linear_grad_input", format, grad.device).linear_grad_input(grad, packed)


@_op("linear_grad_input_bf16")
def _grad_input_bf16_op(grad: Tensor, parts: Sequence[Tensor], format: str, in_features: int) -> Tensor:
    packed = _packed_for(grad, parts, format, in_features)
    _expect_float32("linear_grad_input_bf16", grad)
    kernel = _kernel("linear_grad_input_bf16", format, grad.device)
    return kernel.linear_grad_input(grad, packed) if _few(grad) else kernel.linear_grad_input_bf16(grad, packed)


@_op("linear_grad_input_int8")
def _grad_input_int8_op(grad: Tensor, parts: Sequence[Tensor], format: str, in_features: int) -> Tensor:
    packed = _packed_for(grad, parts, format, in_features)
    _expect_float32("linear_grad_input_int8", grad)
    choice = choose("linear_grad_input_int8", format, grad.device.type)
    rounds, kernel = choice.compute == "int8" and not _few(grad), choice.module
    return kernel.linear_grad_input_int8(grad, packed) if rounds else kernel.linear_grad_input(grad, packed)


def _few(x: Tensor) -> bool:
    return x.numel() < FEW_ROUNDED * x.shape[-1]


def _packed_for(grad: Tensor, parts: Sequence[Tensor], format: str, in_features: int) -> PackedTensor:
    packed = checked(parts, format, in_features)
    if grad.shape[-1] != packed.shape[0]:
        raise ValueError(f"gradient of {grad.shape[-1]} outputs for a weight of {packed.shape[0]} outputs")
    return packed


def _expect_float32(op: str, x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"{op}: got {x.dtype}, expected torch.float32")


@torch.library.register_fake("qgraft::dequantize", lib=_LIBRARY)
def _(parts: Sequence[Tensor], format: str, in_features: int, dtype: torch.dtype) -> Tensor:
    packed = checked(parts, format, in_features)
    return parts[0].new_empty(packed.shape, dtype=dtype)


@torch.library.register_fake("qgraft::linear", lib=_LIBRARY)
@torch.library.register_fake("qgraft::linear_bf16", lib=_LIBRARY)
@torch.library.register_fake("qgraft::linear_int8", lib=_LIBRARY)
def _(x: Tensor, parts: Sequence[Tensor], format: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], checked(parts, format, x.shape[-1]).shape[0])


@torch.library.register_fake("qgraft::linear_grad_input", lib=_LIBRARY)
@torch.library.register_fake("qgraft::linear_grad_input_bf16", lib=_LIBRARY)
@torch.library.register_fake("qgraft::linear_grad_input_int8", lib=_LIBRARY)
def _(grad: Tensor, parts: Sequence[Tensor], format: str, in_features: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _save_packed(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    first, parts, ctx.format = inputs[:3]
    ctx.in_features = inputs[3] if len(inputs) == 4 else first.shape[-1]
    ctx.save_for_backward(*parts)


def _by_grad_input(name: str):  # type: ignore[no-untyped-def]
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        parts = ctx.saved_tensors
        op = getattr(torch.ops.qgraft, name)
        return op(grad, parts, ctx.format, ctx.in_features), [None] * len(parts), None

    return backward


def _by_linear(name: str):  # type: ignore[no-untyped-def]
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        parts = ctx.saved_tensors
        op = getattr(torch.ops.qgraft, name)
        return op(grad, parts, ctx.format), [None] * len(parts), None, None

    return backward


for _name, _backward in (
    ("linear", _by_grad_input("linear_grad_input")),
    ("linear_int8", _by_grad_input("linear_grad_input_int8")),
    ("linear_bf16", _by_grad_input("linear_grad_input_bf16")),
    ("linear_grad_input", _by_linear("linear")),
    ("linear_grad_input_bf16", _by_linear("linear_bf16")),
    ("linear_grad_input_int8", _by_linear("linear_int8")),
):
    torch.library.register_autograd("qgraft::" + _name, _backward, setup_context=_save_packed, lib=_LIBRARY)

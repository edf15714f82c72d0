"""The op table: torch ops on packed weights, with shapes for tracing and gradients.

    qgraft::dequantize(data, scale?, format, in_features, dtype) -> w_OI
    qgraft::linear(x, data, scale?, format) -> y            y = x W^T
    qgraft::linear_grad_input(grad, data, scale?, format, in_features) -> gx     gx = g W
    qgraft::linear_int8(x, data, scale?, format) -> y      linear with x rounded to 8 bits, float32 in and out
    qgraft::linear_bf16, qgraft::linear_grad_input_bf16     both factors rounded to bfloat16, float32 in and out

The base is frozen, so a weight gradient does not exist; linear's input gradient is linear_grad_input and the other way
round, in bfloat16, too. The gradient of linear_int8 is that of linear: the rounding of x is passed through. Both storage
families pass through the same ops, `scale` being None for GGML blocks: one table instead of one for each family, since no
kernel differs in anything but how it reads a row.

Argument checks run in eager code (`checked`), not only in the shape functions, which eager calls never reach.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from qgraft.formats import PackedTensor, get_format
from qgraft.kernels import native, reference, triton_ops
from qgraft.kernels.choice import choose

_KERNELS: dict[str, ModuleType] = {"native": native, "triton": triton_ops, "reference": reference}

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
    return torch.ops.qgraft.dequantize(packed.data, packed.scale, packed.format, packed.shape[1], dtype)


def linear(x: Tensor, packed: PackedTensor) -> Tensor:
    """x [..., in] -> y = x W^T [..., out] in the dtype of x; differentiable in x."""
    return torch.ops.qgraft.linear(x, packed.data, packed.scale, packed.format)


def linear_bf16(x: Tensor, packed: PackedTensor) -> Tensor:
    """As `linear` for float32 x, with x and W rounded to bfloat16, their products summed in float32.

    Fewer than native.BF16_ROWS rows are computed in float32, by every kernel: it takes no longer.
    """
    return torch.ops.qgraft.linear_bf16(x, packed.data, packed.scale, packed.format)


def linear_int8(x: Tensor, packed: PackedTensor) -> Tensor:
    """As `linear` for float32 x, which is rounded to 8 bits in groups of 32 columns: the products are of integers.

    Formats without such a kernel are computed in float32: `choose("linear_int8", ...).compute` says so. The gradient is that
    of `linear`.
    """
    return torch.ops.qgraft.linear_int8(x, packed.data, packed.scale, packed.format)


def linear_grad_input(grad: Tensor, packed: PackedTensor) -> Tensor:
    """g [..., out] -> g W [..., in] in the dtype of g; differentiable in g."""
    return torch.ops.qgraft.linear_grad_input(grad, packed.data, packed.scale, packed.format, packed.shape[1])


def linear_grad_input_bf16(grad: Tensor, packed: PackedTensor) -> Tensor:
    """As `linear_grad_input` for float32 g, which is rounded to bfloat16 as `linear_bf16` rounds x."""
    return torch.ops.qgraft.linear_grad_input_bf16(grad, packed.data, packed.scale, packed.format, packed.shape[1])


def checked(data: Tensor, scale: Tensor | None, format: str, in_features: int) -> PackedTensor:
    """The packed tensor of these parts. Raises ValueError where their sizes are not those of the format."""
    # The native loops trust these sizes: a wrong one would read past the end of the data or of the scales.
    layout = get_format(format)
    width = layout.row_bytes(in_features)
    if in_features % layout.block_size:
        raise ValueError(f"{format} weight: got {in_features} inputs, expected a multiple of {layout.block_size}")
    if data.dim() != 2 or data.shape[1] != width:
        raise ValueError(
            f"{format} weight of {in_features} inputs: got data {list(data.shape)}, expected [out, {width}]"
        )
    got_scales = None if scale is None else list(scale.shape)
    expected_scales = [data.shape[0]] if layout.family == "rowwise" else None
    if got_scales != expected_scales:
        raise ValueError(f"{format} weight: got scales {got_scales}, expected {expected_scales}")
    return PackedTensor(format, (data.shape[0], in_features), data, scale)


def _kernel(op: str, format: str, device: torch.device) -> ModuleType:
    return _KERNELS[choose(op, format, device.type).kernel]


@_op("dequantize")
def _dequantize_op(data: Tensor, scale: Tensor | None, format: str, in_features: int, dtype: torch.dtype) -> Tensor:
    packed = checked(data, scale, format, in_features)
    # never a view of `data`, which a custom op must not return: formats read into memory of their own
    return _kernel("dequantize", format, data.device).dequantize(packed, dtype)


@_op("linear")
def _linear_op(x: Tensor, data: Tensor, scale: Tensor | None, format: str) -> Tensor:
    packed = checked(data, scale, format, x.shape[-1])
    return _kernel("linear", format, x.device).linear(x, packed)


@_op("linear_bf16")
def _linear_bf16_op(x: Tensor, data: Tensor, scale: Tensor | None, format: str) -> Tensor:
    packed = checked(data, scale, format, x.shape[-1])
    _expect_float32("linear_bf16", x)
    kernel = _kernel("linear_bf16", format, x.device)
    return kernel.linear(x, packed) if _few(x) else kernel.linear_bf16(x, packed)


@_op("linear_int8")
def _linear_int8_op(x: Tensor, data: Tensor, scale: Tensor | None, format: str) -> Tensor:
    packed = checked(data, scale, format, x.shape[-1])
    _expect_float32("linear_int8", x)
    choice = choose("linear_int8", format, x.device.type)
    kernel = _KERNELS[choice.kernel]
    return kernel.linear_int8(x, packed) if choice.compute == "int8" else kernel.linear(x, packed)


@_op("linear_grad_input")
def _linear_grad_input_op(grad: Tensor, data: Tensor, scale: Tensor | None, format: str, in_features: int) -> Tensor:
    packed = _packed_for(grad, data, scale, format, in_features)
    return _kernel("linear_grad_input", format, grad.device).linear_grad_input(grad, packed)


@_op("linear_grad_input_bf16")
def _grad_input_bf16_op(grad: Tensor, data: Tensor, scale: Tensor | None, format: str, in_features: int) -> Tensor:
    packed = _packed_for(grad, data, scale, format, in_features)
    _expect_float32("linear_grad_input_bf16", grad)
    kernel = _kernel("linear_grad_input_bf16", format, grad.device)
    return kernel.linear_grad_input(grad, packed) if _few(grad) else kernel.linear_grad_input_bf16(grad, packed)


def _few(x: Tensor) -> bool:
    return x.numel() < native.BF16_ROWS * x.shape[-1]


def _packed_for(grad: Tensor, data: Tensor, scale: Tensor | None, format: str, in_features: int) -> PackedTensor:
    packed = checked(data, scale, format, in_features)
    if grad.shape[-1] != packed.shape[0]:
        raise ValueError(f"gradient of {grad.shape[-1]} outputs for a weight of {packed.shape[0]} outputs")
    return packed


def _expect_float32(op: str, x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"{op}: got {x.dtype}, expected torch.float32")


@torch.library.register_fake("qgraft::dequantize", lib=_LIBRARY)
def _(data: Tensor, scale: Tensor | None, format: str, in_features: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty(data.shape[0], in_features, dtype=dtype)


@torch.library.register_fake("qgraft::linear", lib=_LIBRARY)
@torch.library.register_fake("qgraft::linear_bf16", lib=_LIBRARY)
@torch.library.register_fake("qgraft::linear_int8", lib=_LIBRARY)
def _(x: Tensor, data: Tensor, scale: Tensor | None, format: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], data.shape[0])


@torch.library.register_fake("qgraft::linear_grad_input", lib=_LIBRARY)
@torch.library.register_fake("qgraft::linear_grad_input_bf16", lib=_LIBRARY)
def _(grad: Tensor, data: Tensor, scale: Tensor | None, format: str, in_features: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _save_packed(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    first, data, scale, ctx.format = inputs[:4]
    ctx.in_features = inputs[4] if len(inputs) == 5 else first.shape[-1]
    ctx.save_for_backward(data, scale)


def _by_grad_input(name: str):  # type: ignore[no-untyped-def]
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        data, scale = ctx.saved_tensors
        op = getattr(torch.ops.qgraft, name)
        return op(grad, data, scale, ctx.format, ctx.in_features), None, None, None

    return backward


def _by_linear(name: str):  # type: ignore[no-untyped-def]
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        data, scale = ctx.saved_tensors
        return getattr(torch.ops.qgraft, name)(grad, data, scale, ctx.format), None, None, None, None

    return backward


for _name, _backward in (
    ("linear", _by_grad_input("linear_grad_input")),
    ("linear_int8", _by_grad_input("linear_grad_input")),
    ("linear_bf16", _by_grad_input("linear_grad_input_bf16")),
    ("linear_grad_input", _by_linear("linear")),
    ("linear_grad_input_bf16", _by_linear("linear_bf16")),
):
    torch.library.register_autograd("qgraft::" + _name, _backward, setup_context=_save_packed, lib=_LIBRARY)

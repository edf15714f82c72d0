"""QuantizedLinear and QuantizedEmbedding: modules that hold a packed tensor and call one op.

A model never holds its weights in float: `PackedWeight` keeps the file's bytes as buffers (often views of the
memory-mapped file), and both modules hand them to kernels.ops. A tied output layer shares the embedding's
PackedWeight, so moving the model to another device moves the bytes once.

`LinearLike` is all that adapters and merging may ask of a layer; no bits, dtypes or class names elsewhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, Self, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from qgraft.formats import PackedTensor, checked, get_format, take_rows
from qgraft.kernels import (
    choose,
    dequantize,
    linear,
    linear_bf16,
    linear_grad_input,
    linear_grad_input_bf16,
    linear_grad_input_int8,
    linear_int8,
)
from qgraft.kernels.autocast import to_autocast
from qgraft.kernels.lora import fuses
from qgraft.kernels.terms import Weight

# By QuantizedLinear.compute, for a float32 x.
_ROUNDED = {"bf16": linear_bf16, "int8": linear_int8}
_ROUNDED_GRADIENTS = {"bf16": linear_grad_input_bf16, "int8": linear_grad_input_int8}


@runtime_checkable
class LinearLike(Protocol):
    """What adapters and merging may ask of a linear layer."""

    in_features: int
    out_features: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] in `dtype`."""

    def replace(self, packed: PackedTensor) -> None:
        """Put other packed bytes of the same shape in place of the weight."""


_BLOCK = 1 << 22  # numbers of a weight that are unpacked at a time


def nothing(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN [rows, columns] of one number's memory."""
    return torch.full((1, 1), torch.nan, dtype=dtype, device=device).expand(rows, columns)


class PackedWeight(nn.Module):
    """The buffers of one packed tensor, named as its format names its parts, in their order.

    Casting the model (`.half()`) leaves all of them as they are.
    """

    _buffers: dict[str, Tensor]  # type: ignore[assignment]  # none of them is None
    _squares: Tensor | None

    def __init__(self, packed: PackedTensor) -> None:
        super().__init__()
        self.set(packed)

    def set(self, packed: PackedTensor) -> None:
        """Hold `packed` from now on. Raises ValueError where its parts are not of its format's sizes."""
        whole = checked(packed.parts, packed.format, packed.shape[1])
        if whole.shape != packed.shape:
            raise ValueError(f"{packed.format} weight: got parts of {whole.shape[0]} rows for a shape {packed.shape}")
        self.format, self.shape, self._squares = packed.format, packed.shape, None
        for name in [*self._buffers]:
            delattr(self, name)  # another format may have fewer
        for part, tensor in zip(get_format(packed.format).parts, packed.parts, strict=True):
            self.register_buffer(part.name, tensor)

    def get(self) -> PackedTensor:
        """The packed tensor, sharing memory with the buffers."""
        return PackedTensor(self.format, self.shape, tuple(self._buffers.values()))

    @property
    def device(self) -> torch.device:
        """Where the buffers lie."""
        return self.get().device

    def squares(self) -> Tensor:
        """The sum of the squares of each row, [out] float64; computed once for the bytes that are held."""
        if self._squares is None:
            packed, step = self.get(), max(1, _BLOCK // self.shape[1])
            rows = torch.arange(self.shape[0], device=self.device).split(step)  # never the whole weight in float32
            sums = [dequantize(take_rows(packed, each), torch.float32).square_().sum(1) for each in rows]
            self._squares = torch.cat(sums).double()
        return self._squares

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._squares = None
        # Seen as bytes, a buffer follows `.to(device)` but not `.half()`: stored numbers must keep their bits.
        for name, buffer in self._buffers.items():
            bytes_only = buffer if buffer.itemsize == 1 else buffer.contiguous()
            self._buffers[name] = fn(bytes_only.view(torch.uint8)).view(buffer.dtype)
        return self


class QuantizedLinear(nn.Module):
    """y = x W^T + b with a packed, frozen W. x [..., in] -> y [..., out] in the dtype of x.

    Attributes:
        compute: how the products of a float32 x are computed: "float32", or "bf16": x and W rounded to bfloat16,
            which is faster on CPUs that multiply bfloat16 in hardware, or "int8": x, and gradients where that is
            faster, rounded to 8 bits. Set by `computing`.
        weight_is_given: whether `weight` unpacks the numbers each time that it is asked for, for code of others that
            multiplies by the output layer's weight itself; else they are NaN.
        input_order: [in] int64, which input the stored column j of W multiplies; None where that is j. Bytes stay as
            their file has them, whose blocks may hold columns of several heads: x is put in their order instead. Inputs,
            gradients and `dequantize` are in the model's order, `packed` and `replace` in the stored one.

    Args:
        weight: the packed weight, or a PackedWeight to share (a tied output layer).
        bias: [out] floating point, or None.
        dtype: what the model computes in, which some ask their layers for.
    """

    bias: nn.Parameter | None
    input_order: Tensor | None
    compute = "float32"
    weight_is_given = False

    def __init__(
        self, weight: PackedTensor | PackedWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.packed_weight = weight if isinstance(weight, PackedWeight) else PackedWeight(weight)
        self.out_features, self.in_features = self.packed_weight.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("input_order", None, persistent=False)

    @classmethod
    def from_params(
        cls, weight_bit_width: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
    ) -> Self:
        """The layer of a quantized ChatGLM checkpoint, from its tensors as they are; nothing is copied.

        Args:
            weight_bit_width: 4 or 8.
            weight: int8 [out, in], or [out, in / 2] with two 4-bit weights a byte, the even column in the high half.
            weight_scale: float16 or float32 [out].
            bias: [out], or None.

        Raises ValueError for tensors that are not so.
        """
        rows = weight.shape[0]
        if weight_bit_width not in (4, 8) or weight.dim() != 2 or weight.dtype != torch.int8:
            got = f"{weight_bit_width} bits in {weight.dtype} {list(weight.shape)}"
            raise ValueError(f"from_params: got {got}, expected 4 or 8 bits in int8 [out, bytes of a row]")
        for name, tensor in (("weight_scale", weight_scale), ("bias", bias)):
            if tensor is not None and (tensor.shape != (rows,) or not tensor.is_floating_point()):
                raise ValueError(
                    f"from_params: {name}: got {tensor.dtype} {list(tensor.shape)}, expected floats [{rows}]"
                )
        shape = (rows, weight.shape[1] * 8 // weight_bit_width)
        return cls(PackedTensor(f"chatglm-int{weight_bit_width}", shape, (weight, weight_scale)), bias)

    @property
    def packed(self) -> PackedTensor:
        """The stored bytes."""
        return self.packed_weight.get()

    @property
    def weight(self) -> Tensor:
        """[out, in] in the dtype that the model computes in, for code that asks for shape, dtype and device.

        Its values are NaN, and take no memory: nobody shall compute with it, but where `weight_is_given`. They are in
        `dequantize`.
        """
        if self.weight_is_given:
            return self.dequantize(self.dtype)
        return nothing(self.out_features, self.in_features, self.dtype, self.packed_weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] in `dtype`."""
        return _in_model_order(self, dequantize(self.packed, dtype))

    def replace(self, packed: PackedTensor) -> None:
        """Put other packed bytes of the same shape in place of the weight. Raises ValueError for another shape."""
        if packed.shape != self.packed_weight.shape:
            raise ValueError(f"replace: got shape {packed.shape}, expected {self.packed_weight.shape}")
        self.packed_weight.set(packed)

    def resize(self, packed: PackedTensor) -> None:
        """Put packed bytes with another number of rows in place of the weight. Raises ValueError for another width."""
        _resize(self, packed)
        self.out_features = packed.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        x = in_stored_order(self, to_autocast(x))
        y = packed_product(x, self.packed, self.compute)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        shape = f"{self.in_features}, {self.out_features}, {self.packed_weight.format}, bias={self.bias is not None}"
        return f"{shape}; adapters: qgraft.attach_lora"  # PEFT's error shows this where it cannot wrap the layer


class QuantizedEmbedding(nn.Module):
    """Rows of a packed table: ids [...] int64 -> [..., embedding_dim]; only the rows asked for are unpacked.

    Args:
        weight: the packed table [num_embeddings, embedding_dim].
        dtype: of the output.
        scale: every row is multiplied by it (Gemma scales its embeddings by sqrt(embedding_dim)).
        padding_idx: the token whose row is not trained, where rows are trained beside the table.
    """

    weight_is_given = False

    def __init__(
        self,
        weight: PackedTensor | PackedWeight,
        dtype: torch.dtype,
        scale: float = 1.0,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.packed_weight = weight if isinstance(weight, PackedWeight) else PackedWeight(weight)
        self.num_embeddings, self.embedding_dim = self.packed_weight.shape
        self.dtype, self.scale, self.padding_idx = dtype, scale, padding_idx

    @property
    def weight(self) -> Tensor:
        """As that of a QuantizedLinear, [num_embeddings, embedding_dim], without the scale."""
        if self.weight_is_given:
            return dequantize(self.packed_weight.get(), self.dtype)
        return nothing(self.num_embeddings, self.embedding_dim, self.dtype, self.packed_weight.device)

    def resize(self, packed: PackedTensor) -> None:
        """Put a table with another number of rows in place of this one. Raises ValueError for another width."""
        _resize(self, packed)
        self.num_embeddings = packed.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., embedding_dim]."""
        rows = take_rows(self.packed_weight.get(), ids.reshape(-1))
        embedded = dequantize(rows, self.dtype).view(*ids.shape, self.embedding_dim)
        return embedded if self.scale == 1.0 else embedded * torch.tensor(self.scale, dtype=self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The table keeps its bytes, but what comes out follows `.half()` as the output of nn.Embedding does.
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.packed_weight.format}; adapters: qgraft.attach_lora"


def _resize(layer: "QuantizedLinear | QuantizedEmbedding", packed: PackedTensor) -> None:
    if packed.shape[1] != layer.packed_weight.shape[1]:
        raise ValueError(f"resize: got width {packed.shape[1]}, expected {layer.packed_weight.shape[1]}")
    layer.packed_weight.set(packed)


def table_rows(layer: Any) -> int:
    """How many tokens a table or an output layer has a row of."""
    return int(layer.num_embeddings if hasattr(layer, "num_embeddings") else layer.out_features)


def packed_product(x: Tensor, packed: PackedTensor, compute: str) -> Tensor:
    """x [..., in] -> x W^T [..., out], computed as QuantizedLinear.compute says."""
    rounded = _ROUNDED.get(compute) if x.dtype == torch.float32 else None
    return (rounded or linear)(x, packed)


def packed_gradient(grad: Tensor, packed: PackedTensor, compute: str) -> Tensor:
    """g [..., out] -> g W [..., in], where `compute` is what the layer's was in the forward pass."""
    rounded = _ROUNDED_GRADIENTS.get(compute) if grad.dtype == torch.float32 else None
    return (rounded or linear_grad_input)(grad, packed)


def in_stored_order(layer: nn.Module, values: Tensor) -> Tensor:
    """values [..., in], such as inputs of the layer, with their columns in the order that its weight is stored in."""
    order = getattr(layer, "input_order", None)
    return values if order is None else values.index_select(-1, order)


def _in_model_order(layer: QuantizedLinear, values: Tensor) -> Tensor:
    """The inverse of in_stored_order, without autograd."""
    order = layer.input_order
    return values if order is None else torch.empty_like(values).index_copy_(-1, order, values)


@torch.no_grad()
def rows_of(layer: QuantizedLinear | nn.Linear, rows: slice) -> Tensor:
    """Some rows of the weight [out, in] of a layer, float32 in the model's order."""
    if isinstance(layer, nn.Linear):
        return layer.weight[rows].float()
    index = torch.arange(layer.out_features, device=layer.packed_weight.device)[rows]
    return _in_model_order(layer, dequantize(take_rows(layer.packed, index), torch.float32))


@contextmanager
def computing(model: nn.Module, compute: str) -> Iterator[None]:
    """Within the block the packed layers of `model` compute products so, see QuantizedLinear; the output layer does not.

    Rounded to bfloat16, a logit of 20 is off by up to 0.06: that would be felt in the loss, unlike everything before it.
    Neither do layers in 8 bits that make at most half as many numbers as a state has, the keys and values of grouped heads:
    several heads read each of these. In SmolLM2 they are 6 % of the products and make 38 % of the error.
    """
    output_layer = getattr(model, "get_output_embeddings", None)
    head = output_layer() if callable(output_layer) else None
    head = getattr(head, "base", head)  # below adapters
    layers: list[Any] = [
        module for module in model.modules() if hasattr(type(module), "compute") and module is not head
    ]
    before = [layer.compute for layer in layers]
    embedding = getattr(model, "get_input_embeddings", lambda: None)() if compute == "int8" else None
    width = getattr(embedding, "embedding_dim", 0)
    for layer in layers:
        layer.compute = compute if layer.out_features > width // 2 else "float32"
    try:
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer.compute = earlier


def product_dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """What the layer rounds x [..., in] to before it multiplies: its own dtype, but for what `computing` says."""
    return torch.bfloat16 if x.dtype == torch.float32 and getattr(layer, "compute", "") == "bf16" else x.dtype


def fused_weight(layer: nn.Module, x: Tensor) -> Weight | None:
    """The layer for a kernel that computes its product with x together with those of LoRAs, if one does."""
    if not _is_in_order(layer) or not fuses(layer.packed_weight.format, x, layer.compute):
        return None
    bias = None if layer.bias is None else layer.bias.to(torch.promote_types(x.dtype, layer.bias.dtype))
    return Weight(layer.packed, bias, layer.compute)


def fused_gradient(layer: nn.Module, grad: Tensor, compute: str) -> Weight | None:
    """The same for its input gradient; `compute` is what the layer's was in the forward pass."""
    if not _is_in_order(layer):
        return None
    format = layer.packed_weight.format
    if compute == "int8":  # or float32, for formats whose gradient is no faster in 8 bits
        compute = choose("linear_grad_input_int8", format, grad.device.type).compute
    return Weight(layer.packed, None, compute) if fuses(format, grad, compute) else None


def _is_in_order(layer: nn.Module) -> TypeGuard[QuantizedLinear]:
    """Whether a layer is packed with its columns in the order of its inputs, as kernels with LoRAs take them to be."""
    return isinstance(layer, QuantizedLinear) and layer.input_order is None


def grad_input(layer: nn.Module, grad: Tensor, compute: str = "float32") -> Tensor:
    """The input gradient g W of a frozen linear layer, [..., out] -> [..., in], without its autograd graph.

    Args:
        compute: what the layer's was in the forward pass.

    Raises TypeError for a module that is neither a QuantizedLinear nor an nn.Linear.
    """
    if isinstance(layer, QuantizedLinear):
        return _in_model_order(layer, packed_gradient(grad, layer.packed, compute))
    if isinstance(layer, nn.Linear):
        return grad @ layer.weight.to(grad.dtype)
    raise TypeError(f"no input gradient for {type(layer).__name__}: expected QuantizedLinear or nn.Linear")

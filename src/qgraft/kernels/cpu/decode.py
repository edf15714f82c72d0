"""New tokens through a whole decoder in one C call: decode.c's structures made of a decoder (kernels/decoder.py).

C is given addresses, so what stands behind them must stay: each structure made here is listed in a `Held` together with
what keeps the memory that it names.
"""

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qgraft.formats import PackedTensor, checked
from qgraft.kernels import decoder as plain
from qgraft.kernels.choice import choose
from qgraft.kernels.cpu.abi import (
    FLOATS,
    FORMAT_IDS,
    INT8_FORMATS,
    Decoder,
    DecoderLayer,
    DecoderPart,
    DecoderRow,
    Experts,
    Linear,
    Lora,
    Loras,
)
from qgraft.kernels.cpu.library import loaded
from qgraft.kernels.cpu.packed import stored
from qgraft.kernels.decoder import Part, Row

Held = list[Any]  # what must live as long as the structures do


def available(format: str) -> bool:
    """Whether weights of this format can be multiplied in C here."""
    return choose("decode_step", format, "cpu").kernel == "native"


def address(tensor: Tensor | None, held: Held) -> int | None:
    """Where a contiguous float32 tensor on the CPU lies, or None for None. Raises ValueError for another tensor."""
    if tensor is None:
        return None
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"got {tensor.dtype} on {tensor.device}, expected contiguous float32 on the CPU")
    held.append(tensor.untyped_storage())  # the memory stays, whatever the parameter is set to
    return tensor.data_ptr()


def lora(A: Tensor, B: Tensor, scaling: float, held: Held) -> Lora:
    """The structure of one LoRA, or of those of all experts: see kernels/decoder.py."""
    if B.dim() == 2:
        return Lora(address(A, held), address(B, held), A.shape[0], 0, scaling)
    address(B[0], held)  # of one expert; those of the others lie further on
    return Lora(address(A, held), B.data_ptr(), A.shape[1], B.stride(0), scaling)


def adapters(of_linears: Sequence[Sequence[Lora]], held: Held) -> "ctypes.Array[Loras]":
    """The LoRAs of all linear layers of a decoder, layer by layer in the order of `PLACES`."""
    arrays = [(Lora * len(loras))(*loras) for loras in of_linears]
    made = (Loras * len(arrays))(*(Loras(len(array), array) for array in arrays))
    held += [*arrays, made]
    return made


def linear(packed: PackedTensor, bias: Tensor | None, held: Held, int8: bool = False, experts: int = 1) -> Linear:
    """The structure of one packed layer; `int8` where it is to compute as ops.linear_int8 does.

    Args:
        experts: how many weights of the same shape lie there, one behind the other, each with a bias of its own.

    Raises ValueError for what C does not multiply.
    """
    if not available(packed.format) or packed.device.type != "cpu" or not packed.parts[0].is_contiguous():
        raise ValueError(f"got a {packed.format} weight on {packed.device}, which no native kernel multiplies")
    rows, columns = packed.shape
    if (got := checked(packed.parts, packed.format, columns).shape) != packed.shape:
        raise ValueError(f"{packed.format} weight {packed.shape}: got parts of {got}")
    if rows % experts:
        raise ValueError(f"{packed.format} weight {packed.shape}: got {experts} experts")
    if bias is not None and bias.numel() != rows:
        raise ValueError(f"{packed.format} weight {packed.shape}: got bias {list(bias.shape)}")
    data, scales = stored(packed)
    held.append(data.detach())
    return Linear(
        FORMAT_IDS[packed.format], rows // experts, columns, int8 and packed.format in INT8_FORMATS,
        data.data_ptr(), address(scales, held), address(bias, held),
    )  # fmt: skip


def experts(given: plain.Experts, held: Held) -> Experts:
    """The structure of a layer's experts. Raises ValueError for what C does not multiply, or tensors of other shapes."""
    count, inner, routing = len(given.router), given.inner, given.routing
    shapes = ((given.router_bias, (count,)), (given.correction, (count,)), (given.bias, (count, 2 * inner)))
    for tensor, shape in shapes:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"got {list(tensor.shape)} beside {count} experts, expected {list(shape)}")
    step = 2 if given.alternates else 1
    gate_bias = address(given.bias, held)
    limit, alpha = given.clamp or (0.0, 0.0)
    return Experts(
        *(linear(each.packed, each.bias, held, each.int8, count) for each in given.linears),
        gate_bias, gate_bias and gate_bias + 4 * (1 if given.alternates else inner), address(given.router, held),
        address(given.router_bias, held), address(given.correction, held), step, count,
        routing.chosen, plain.SCORES.index(routing.scores), routing.groups, routing.kept, routing.normalized,
        given.clamp is not None, routing.least_sum, routing.added_to_sum, routing.scaling, limit, alpha,
    )  # fmt: skip


class Structures:
    """See kernels/decoder.py."""

    most_rows = sys.maxsize

    def __init__(self, decoder: plain.Decoder) -> None:
        self.held: Held = []
        made = [self._layer(layer) for layer in decoder.layers]
        self._layers = (DecoderLayer * len(made))(*made)
        norm = address(decoder.norm, self.held)
        self.model = Decoder(
            len(made), decoder.hidden, decoder.inner, decoder.heads, decoder.groups, decoder.channels, 0,
            decoder.angles, decoder.pairs, decoder.wide_norms, decoder.epsilon, decoder.scale, decoder.residual, norm,
            self._layers,
        )  # fmt: skip

    def _layer(self, layer: plain.Layer) -> DecoderLayer:
        norms = ("attention_norm", "mlp_norm", "q_norm", "k_norm")
        given = dict(zip(plain.LINEARS, layer.linears, strict=True))
        made = DecoderLayer(
            **{name: self._linear(each) for name, each in given.items() if each is not None},
            **{name: address(norm, self.held) for name, norm in zip(norms, layer.norms, strict=False)},
            sinks=address(layer.sinks, self.held),
            window=layer.window,
        )
        if layer.experts is not None:
            made.experts = ctypes.pointer(experts(layer.experts, self.held))
            self.held.append(made.experts)
        return made

    def _linear(self, given: plain.Linear) -> Linear:
        if given.packed.format != "f32":
            return linear(given.packed, given.bias, self.held, given.int8)
        weight = given.packed.parts[0]
        return Linear(FLOATS, *weight.shape, 0, address(weight, self.held), None, address(given.bias, self.held))

    def adapters(self, of_linears: Sequence[Sequence[plain.Lora]]) -> "tuple[ctypes.Array[Loras], Held]":
        """See kernels/decoder.py; contiguous float32 on the CPU."""
        held: Held = []
        return adapters([[lora(*each, held) for each in loras] for loras in of_linears], held), held

    def use(self, memory: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See kernels/decoder.py; contiguous float32."""
        self._memory = memory
        self.model.capacity = memory[0][0].shape[1]
        for layer, (keys, values) in zip(self._layers, memory, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()

    def step(self, parts: Sequence[Part], rows: Sequence[Row], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See kernels/decoder.py; x is written over."""
        step(self.model, [Part(part.loras and part.loras[0], part.rows) for part in parts], rows, x, cos, sin)
        return x


def step(decoder: Decoder, parts: Sequence[Part], rows: Sequence[Row], x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Take tokens through the decoder: x [rows, hidden] is their embeddings, and becomes their normed last states.

    Args:
        parts: the adapters of the rows, in their order.
        cos, sin: [rows, angles of the decoder], of their rotations.
    """
    held: Held = []
    places = [address(tensor, held) or 0 for tensor in (x, cos, sin)]
    if any(tensor.shape != (len(x), decoder.rotated) for tensor in (cos, sin)):
        raise ValueError(f"got cos and sin {[list(cos.shape), list(sin.shape)]}, expected {[len(x), decoder.rotated]}")
    if len(x) != len(rows) or any(row.slots.dtype != torch.int64 or len(row.slots) < row.seen for row in rows):
        raise ValueError(f"got {len(rows)} rows, expected {len(x)}, each with int64 slots for what it sees")
    part_array = (DecoderPart * len(parts))(*(DecoderPart(*part) for part in parts))
    row_array = (DecoderRow * len(rows))(*(DecoderRow(row.slots.data_ptr(), row.seen, row.front) for row in rows))
    code = loaded().qgraft_decode_rows(
        ctypes.addressof(decoder), part_array, len(parts), row_array, len(rows), *places, torch.get_num_threads()
    )
    if code == -2:
        raise MemoryError(f"qgraft_decode_rows: no memory for the activations of {len(rows)} tokens")
    assert code == 0, f"qgraft_decode_rows returned {code}"

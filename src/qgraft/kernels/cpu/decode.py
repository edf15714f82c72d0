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
    FORMAT_IDS,
    INT8_FORMATS,
    Decoder,
    DecoderLayer,
    DecoderPart,
    DecoderRow,
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
    """The structure of one LoRA, A [rank, in] and B [out, rank]."""
    return Lora(address(A, held), address(B, held), A.shape[0], scaling)


def adapters(of_linears: Sequence[Sequence[Lora]], held: Held) -> "ctypes.Array[Loras]":
    """The LoRAs of all linear layers of a decoder, layer by layer: q, k, v, o, gate, up, down."""
    arrays = [(Lora * len(loras))(*loras) for loras in of_linears]
    made = (Loras * len(arrays))(*(Loras(len(array), array) for array in arrays))
    held += [*arrays, made]
    return made


def linear(packed: PackedTensor, bias: Tensor | None, held: Held, int8: bool = False) -> Linear:
    """The structure of one packed layer; `int8` where it is to compute as ops.linear_int8 does.

    Raises ValueError for what C does not multiply.
    """
    if not available(packed.format) or packed.device.type != "cpu" or not packed.parts[0].is_contiguous():
        raise ValueError(f"got a {packed.format} weight on {packed.device}, which no native kernel multiplies")
    rows, columns = packed.shape
    if (got := checked(packed.parts, packed.format, columns).shape) != packed.shape:
        raise ValueError(f"{packed.format} weight {packed.shape}: got parts of {got}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"{packed.format} weight {packed.shape}: got bias {list(bias.shape)}")
    data, scales = stored(packed)
    held.append(data.detach())
    return Linear(
        FORMAT_IDS[packed.format], rows, columns, int8 and packed.format in INT8_FORMATS,
        data.data_ptr(), address(scales, held), address(bias, held),
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
            decoder.epsilon, decoder.scale, norm, self._layers,
        )  # fmt: skip

    def _layer(self, layer: plain.Layer) -> DecoderLayer:
        return DecoderLayer(
            *(linear(each.packed, each.bias, self.held, each.int8) for each in layer.linears),
            *(address(norm, self.held) for norm in layer.norms),
            window=layer.window,
        )

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
        cos, sin: [rows, channels], of their rotations.
    """
    held: Held = []
    places = [address(tensor, held) or 0 for tensor in (x, cos, sin)]
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

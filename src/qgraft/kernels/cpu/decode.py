"""One token through a whole decoder in one C call: decode.c's structures made of tensors.

C is given addresses, so what stands behind them must stay: each structure made here is listed in a `Held` together with
the tensors whose memory it names.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qgraft.formats import PackedTensor, checked
from qgraft.kernels.choice import choose
from qgraft.kernels.cpu.abi import FORMAT_IDS, INT8_FORMATS, Decoder, Linear, Lora
from qgraft.kernels.cpu.library import loaded
from qgraft.kernels.cpu.packed import stored

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
    held.append(tensor.detach())  # a tensor of its own: the memory stays, whatever the parameter is set to
    return tensor.data_ptr()


def lora(A: Tensor, B: Tensor, scaling: float, held: Held) -> Lora:
    """The structure of one LoRA, A [rank, in] and B [out, rank]."""
    return Lora(address(A, held), address(B, held), A.shape[0], scaling)


def linear(packed: PackedTensor, bias: Tensor | None, loras: Sequence[Lora], held: Held, int8: bool = False) -> Linear:
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
    array = (Lora * len(loras))(*loras)
    held += [data.detach(), array]
    return Linear(
        FORMAT_IDS[packed.format], rows, columns, int8 and packed.format in INT8_FORMATS,
        len(loras), data.data_ptr(), address(scales, held),
        address(bias, held), array,
    )  # fmt: skip


def step(decoder: Decoder, x: Tensor, cos: Tensor, sin: Tensor, position: int) -> None:
    """Take one token through the decoder: x [hidden] is its embedding, and becomes its normed last state.

    Args:
        cos, sin: [channels], of its rotation.
        position: how many keys and values there are; the token's own are written behind them.
    """
    held: Held = []
    places = [address(tensor, held) or 0 for tensor in (x, cos, sin)]
    code = loaded().qgraft_decode_step(ctypes.addressof(decoder), *places, position, torch.get_num_threads())
    if code == -2:
        raise MemoryError("qgraft_decode_step: no memory for the activations of one token")
    assert code == 0, f"qgraft_decode_step returned {code}"

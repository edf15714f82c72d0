"""The C library itself, called through ctypes: what no torch op reaches."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qgraft.formats import FORMATS, PackedTensor
from qgraft.formats import dequantize as format_dequantize
from qgraft.kernels import native, native_status

MakePacked = Callable[..., PackedTensor]

pytestmark = pytest.mark.skipif(not native_status()[0], reason=f"native kernels are {native_status()[1]}")


def dequantize_bf16(packed: PackedTensor, threads: int = 1) -> Tensor:
    library = native._library()
    assert library is not None
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function = library.qgraft_dequantize_bf16
    function.argtypes = [i32, pointer, pointer, i64, i64, pointer, i32]
    rows, columns = packed.shape
    scale = None if packed.scale is None else packed.scale.float()
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    code = function(
        native.FORMAT_IDS[packed.format], packed.data.data_ptr(), None if scale is None else scale.data_ptr(),
        rows, columns, out.data_ptr(), threads,
    )  # fmt: skip
    assert code == 0
    return out


@pytest.mark.parametrize("format", native.FORMAT_IDS)
def test_bf16_rows_are_the_float32_rows_rounded(format: str, random_packed: MakePacked) -> None:
    """Widths below, at and above the number of columns that are unpacked at a time."""
    block = max(32, FORMATS[format].block_size)
    for rows, columns in ((1, block), (3, 1024), (5, 1024 + block), (33, 2048), (2, 2304)):
        packed = random_packed(format, rows, columns)
        expected = format_dequantize(packed, torch.float32).bfloat16()
        for threads in (1, 2):
            assert torch.equal(dequantize_bf16(packed, threads).view(torch.int16), expected.view(torch.int16))


def test_bf16_rounds_ties_to_even_and_keeps_nan_and_infinity() -> None:
    """A row scale of every upper half of a float32, with lower halves around the tie; weight 1."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    scale = (torch.arange(-32768, 32768, dtype=torch.int32)[:, None] * 65536 + low).view(torch.float32).flatten()
    packed = PackedTensor("chatglm-int8", (scale.numel(), 1), torch.ones(scale.numel(), 1, dtype=torch.int8), scale)
    got, expected = dequantize_bf16(packed)[:, 0], scale.bfloat16()
    assert torch.equal(got.isnan(), scale.isnan())
    number = ~scale.isnan()
    assert torch.equal(got[number].view(torch.int16), expected[number].view(torch.int16))


def test_bf16_of_an_unknown_format_is_an_error_code() -> None:
    assert native._loaded().qgraft_dequantize_bf16(99, None, None, 1, 32, None, 1) == -1

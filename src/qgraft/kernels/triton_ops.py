"""The ops on a GPU: packed weights are unpacked by Triton kernels (triton_blocks.py) and multiplied by cuBLAS.

    dequantize           one kernel: 20 us for 4096 x 4096 q4_1 (H100), where plain torch takes 286
    linear, grad_input   unpacked into a block of memory that the allocator gives to one layer after the other, then
                         torch.mm: a product of 8192 rows takes 5 % longer than with weights that lie there in bfloat16
    linear, few rows     of x, as in decoding: weights go from packed bytes to registers, 14 us where cuBLAS takes 23 to
                         read four times as many bytes

A kernel that unpacks and multiplies many rows in one was tried: three times slower than cuBLAS. Values are bit for bit those
of the reference. Triton is imported at the first use; it compiles a kernel for each format the first time, which takes
seconds, and keeps it on disk.
"""

import os
import shutil
import sysconfig
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qgraft.formats import PackedTensor
from qgraft.formats.lattices import LATTICES, table_on
from qgraft.kernels import reference
from qgraft.kernels.unpacked import unpacked

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
UNITS = {  # format -> bytes of a block, weights of a run, units of a block; as in triton_blocks.py
    "q4_0": (18, 16, 1), "q4_1": (20, 16, 1), "q5_0": (22, 16, 1), "q5_1": (24, 16, 1), "q8_0": (34, 16, 1),
    "q2_k": (84, 16, 8), "q3_k": (110, 16, 8), "q4_k": (144, 32, 4), "q5_k": (176, 32, 4), "q6_k": (210, 16, 8),
    "iq4_nl": (18, 16, 1), "iq4_xs": (136, 16, 8), "mxfp4": (17, 16, 1), "nvfp4": (36, 8, 4), "tq2_0": (66, 16, 8),
    "chatglm-int4": (16, 16, 1), "chatglm-int8": (32, 16, 1), "tq1_0": (54, 16, 8),
    **{name: (lattice.bytes, 16, 8) for name, lattice in LATTICES.items()},
}  # fmt: skip
WITHOUT_HALVES = ("chatglm-int4", "chatglm-int8", "mxfp4", "nvfp4")  # formats with no float16 in their blocks
FORMATS = (*UNITS, *FLOATS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_compiled: dict[tuple[Any, ...], Any] = {}  # variants of kernels that ran, by what launch() asks
TILES = {  # of gemv_kernel: rows, units, warps
    "q4_0": (1, 64, 4), "q4_1": (1, 64, 4), "q8_0": (1, 64, 4), "q4_k": (4, 16, 2), "q6_k": (1, 128, 4),
}  # fmt: skip

FEW_ROWS = 2  # of x, up to which reading packed bytes for each of them is faster than unpacking


@cache
def triton_status() -> tuple[bool, str]:
    """(available, one line that says why) for `qgraft doctor` and the choice of kernels."""
    if find_spec("triton") is None:
        return False, "plain torch: triton is not installed"
    if not interpreted() and (torch.version.cuda is None or not torch.cuda.is_available()):
        return False, "plain torch: no NVIDIA GPU, the one kind that the kernels were tried on"
    if not interpreted() and torch.cuda.get_device_capability() < (8, 0):
        return False, "plain torch: this GPU is older than compute capability 8.0"
    if not interpreted() and (missing := _missing_for_launchers()):
        return False, f"plain torch: triton builds its launchers with {missing}, which is not here"
    try:
        version = _blocks().triton.__version__
    except ImportError as error:
        return False, f"plain torch: triton cannot be imported: {error}"
    return True, f"triton {version}" + (", interpreted" if interpreted() else "")


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter is on: TRITON_INTERPRET=1, read when triton is imported. It runs on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def dequantize(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """w_OI in `dtype`, in memory of its own."""
    if dtype not in DTYPES:
        return reference.dequantize(packed, dtype)
    out = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    unpack_into(packed, out)
    return out


def weight(packed: PackedTensor, dtype: torch.dtype, copies: bool = True) -> Tensor:
    """w_OI to multiply with at once: as it is stored, or as a copy is kept, in `dtype`; not to be written to.

    Args:
        copies: whether a kept one will do. It may be gone later: not for a graph that outlives the block that keeps it.
    """
    if FLOATS.get(packed.format) == dtype:
        return _stored(packed)
    kept = unpacked(packed, dtype) if copies else None
    return dequantize(packed, dtype) if kept is None else kept


def unpack_into(packed: PackedTensor, out: Tensor) -> None:
    """Write w_OI to `out` [out, in] of a dtype of DTYPES, whose rows may lie apart."""
    if packed.format in FLOATS:
        out.copy_(_stored(packed))
        return
    rows, run = packed.shape[0], UNITS[packed.format][1]
    data, halves, beside, (units, row_bytes) = stored(packed, out.dtype)
    if not rows or not units:
        return
    # under the interpreter few programs with large tiles: there each takes milliseconds
    some_rows, some_units = (64, 64) if interpreted() else (4, 1024 // run)
    grid = (-(-rows // some_rows), -(-units // some_units), 1)
    arguments = (data, halves, beside, out, rows, units, row_bytes, packed.shape[1], out.stride(0))
    constants = {"F": packed.format, "RUN": run, "BR": some_rows, "NU": some_units, "EXACT": interpreted()}
    launch(_blocks().dequantize_kernel, grid, arguments, constants, 8)


def linear(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T: [..., in] -> [..., out] in the dtype of x."""
    if x.dtype not in DTYPES:
        return reference.linear(x, packed)
    if x.dtype != torch.float32 and packed.format in UNITS and 0 < x.numel() <= FEW_ROWS * x.shape[-1]:
        y = x.new_empty((*x.shape[:-1], packed.shape[0]))
        if y.numel():
            gemv(x.reshape(-1, x.shape[-1]), packed, y.view(-1, packed.shape[0]))
        return y
    return x @ weight(packed, x.dtype).T


def linear_grad_input(grad: Tensor, packed: PackedTensor) -> Tensor:
    """dL/dx = g W: [..., out] -> [..., in] in the dtype of g."""
    return grad @ weight(packed, grad.dtype)


def linear_bf16(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T with float32 x and W rounded to bfloat16, summed in float32."""
    return reference.linear_bf16(x, packed)


def linear_grad_input_bf16(grad: Tensor, packed: PackedTensor) -> Tensor:
    """dL/dx = g W likewise."""
    return reference.linear_grad_input_bf16(grad, packed)


def linear_int8(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T with x rounded to 8 bits."""
    return reference.linear_int8(x, packed)


def linear_grad_input_int8(grad: Tensor, packed: PackedTensor) -> Tensor:
    """dL/dx = g W with g rounded to 8 bits."""
    return reference.linear_grad_input_int8(grad, packed)


def gemv(
    x: Tensor, packed: PackedTensor, y: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    loras: tuple[Tensor, Tensor] | None = None, ranks: tuple[int, int] = (0, 0),
) -> None:  # fmt: skip
    """Write W x + bias + LoRAs + residual to y [M, out], whose rows may lie apart, for x [M, in] of few rows.

    Args:
        loras: the table and the h of down_kernel for this layer (triton_gemv.py); `ranks` are its NA and R.
    """
    rows, columns = packed.shape
    data, halves, beside, (units, row_bytes) = stored(packed, x.dtype)
    some_rows, some_units, warps = (64, 32, 4) if interpreted() else tile(packed.format)
    table, h = loras or (x, x)
    arguments = (
        x.contiguous(), data, halves, beside, y, x if bias is None else bias, x if residual is None else residual,
        table, h, rows, units, row_bytes, columns, y.stride(0),
    )  # fmt: skip
    constants = {
        "F": packed.format, "RUN": UNITS[packed.format][1], "BN": some_rows, "NU": some_units, "BIAS": bias is not None,
        "ADD": residual is not None, "NA": ranks[0], "R": ranks[1], "EXACT": interpreted(),
    }  # fmt: skip
    if rows and len(x):
        launch(products().gemv_kernel, (-(-rows // some_rows), len(x), 1), arguments, constants, warps)


def tile(format: str) -> tuple[int, int, int]:
    """(rows, units, warps) of a program of gemv_kernel: the fastest of those tried on an H100."""
    return TILES[format] if format in TILES else (4, 512 // UNITS[format][1], 2)


def stored(packed: PackedTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """What kernels read of a format of UNITS: bytes [out, row_bytes], the same as float16, what is beside them, its sizes.

    Beside them are the scales of the rows or the table of points, where a format has such; sizes are (units, row_bytes).
    """
    block_bytes, _, units_in_block = UNITS[packed.format]
    data = packed.parts[0].contiguous().view(torch.uint8)
    row_bytes = data.shape[1]
    units = -(-row_bytes // block_bytes) * units_in_block
    return data, _halves(data, packed.format), _beside(packed, dtype, data), (units, row_bytes)


def _stored(packed: PackedTensor) -> Tensor:
    """The numbers of a float format as they are stored, [out, in]."""
    return packed.parts[0].contiguous().view(FLOATS[packed.format])


def _halves(data: Tensor, format: str) -> Tensor:
    """The same bytes as float16, where the blocks of the format have such scales; each is then an even number."""
    return data if format in WITHOUT_HALVES else data.view(torch.float16)


def _beside(packed: PackedTensor, dtype: torch.dtype, unused: Tensor) -> Tensor:
    """A row's scale in float32, first rounded to float16 for float16 weights, as formats/rowwise.py says; or a table."""
    if packed.format in LATTICES:
        return table_on(LATTICES[packed.format].table, packed.device)
    if len(packed.parts) == 1:
        return unused
    scale = packed.parts[1].to(torch.float16) if dtype == torch.float16 else packed.parts[1]
    return scale.to(torch.float32).contiguous()


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: Sequence[Any], constants: dict[str, Any], warps: int
) -> None:
    """Run a kernel on the GPU of its first argument.

    Triton finds out at each call which of the compiled variants the arguments need, by hashing all of them: 40 us, longer
    than most of these kernels run. Here the same is asked of what it looks at: whether 16 divides numbers and addresses,
    whether a number is 1 or needs 64 bits.

    Args:
        arguments: tensors and numbers, in the kernel's order; `constants` are those that follow them, by name.
    """
    device = arguments[0].device
    if interpreted():
        kernel[grid](*arguments, **constants)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, arguments, constants, warps)
        return
    key = (kernel.fn, device.index, *map(_variant, arguments), *constants.values())
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, **constants, num_warps=warps)
    else:
        compiled[grid](*arguments, *constants.values())


def _variant(argument: Any) -> Any:
    """What Triton compiles in of an argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument > 0x7FFFFFFF
    return float


@cache
def _blocks() -> ModuleType:
    from qgraft.kernels import triton_blocks

    return triton_blocks


@cache
def products() -> ModuleType:
    """The kernels of products with few rows, triton_gemv.py."""
    from qgraft.kernels import triton_gemv

    return triton_gemv


def _missing_for_launchers() -> str:
    """What Triton would not find when it builds the C code that launches a kernel; empty where all is there."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc or clang)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's headers (python3-dev)"
    return ""

"""The ops on packed weights, on a CPU: linear.c and packed.c; and torch's products between panels where those have none.

Forward and backward read the same packed bytes; nothing is repacked or transposed.

    C loops    few rows of x (decoding): weights go from the packed row to registers, since memory traffic is the limit.
               Many: panels of 8 192 weights (AVX2: 4 096) are unpacked into the first-level cache and multiplied there
               (gemm.h), in float32 on CPUs with AVX2, in bfloat16 where they have AVX512-BF16.
    panels     for x in half precision, for bfloat16 products with AMX, which oneDNN multiplies in, and for float32
               on CPUs without AVX2: a few hundred packed rows are unpacked into a scratch buffer that stays in the
               second-level cache, and torch multiplies it.
"""

import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qgraft.formats import PackedTensor
from qgraft.kernels.cpu.abi import FORMAT_IDS, ROUNDINGS, LinearCall, LoraTerm, pointer
from qgraft.kernels.cpu.library import has_amx, has_bf16, has_panels, loaded

FEW_PLAIN_ROWS = 2  # of x, up to which the plain C loop of CPUs without AVX2 beats torch.mm
FEW_ROUNDED = 10  # rows of x or g, from which on rounding them saves time; fewer are computed in float32
FEW_ROWS = 16  # of half-precision x, up to which the C loop in float32 beats torch.mm in that precision
PANEL_BYTES = 4 * 512 * 576  # of weights unpacked at a time: 1.2 MB, about one core's second-level cache
BF16_PANEL_BYTES = 8 << 20  # oneDNN packs a bfloat16 panel anew anyway, and does better with large ones
PANEL_ROWS = 256  # at least: for 13 696 inputs, panels of 21 rows would halve the speed of sgemm

_scratch = threading.local()


def dequantize(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """w_OI in `dtype`; float32 values are bit for bit those of the reference."""
    w_OI = torch.empty(packed.shape, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    _unpack(packed, 0, packed.shape[0], w_OI)
    return w_OI.to(dtype)


def linear(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T: [..., in] -> [..., out] in the dtype of x."""
    batch = x.numel() // x.shape[-1]
    if x.dtype == torch.float32 and (has_panels() or batch <= FEW_PLAIN_ROWS):
        return _product(x, packed)
    if x.dtype in (torch.bfloat16, torch.float16) and batch <= (FEW_ROWS if has_panels() else FEW_PLAIN_ROWS):
        return _product(x.to(torch.float32), packed).to(x.dtype)
    x_BI = _few_shapes(x.reshape(batch, x.shape[-1]))
    y_BO = x.new_empty(x_BI.shape[0], packed.shape[0])
    for start, stop, w_PI in _panels(packed, x.dtype):
        torch.mm(x_BI, w_PI.T, out=y_BO[:, start:stop])
    return _own(y_BO, *x.shape[:-1], packed.shape[0])


def linear_bf16(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T with float32 x and W rounded to bfloat16, their products summed in float32."""
    if has_bf16():
        return _product(x, packed, compute="bf16")
    if has_amx():  # oneDNN gives its sums in bfloat16
        return linear(x.to(torch.bfloat16), packed).to(torch.float32)
    rounded_BI = x.reshape(x.numel() // x.shape[-1], x.shape[-1]).bfloat16().float()
    y_BO = x.new_empty(len(rounded_BI), packed.shape[0])
    for start, stop, w_PI in _panels(packed, torch.bfloat16):
        torch.mm(rounded_BI, w_PI.float().T, out=y_BO[:, start:stop])
    return _own(y_BO, *x.shape[:-1], packed.shape[0])


def linear_int8(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T with float32 x rounded to 8 bits in groups of 32 columns, for the formats of its choice."""
    return _product(x, packed, compute="int8")


def linear_grad_input(grad: Tensor, packed: PackedTensor) -> Tensor:
    """dL/dx = g W: [..., out] -> [..., in] in the dtype of g."""
    batch = grad.numel() // grad.shape[-1]
    if grad.dtype == torch.float32 and has_panels():
        return _product(grad, packed, backward=True)
    g_BO = _few_shapes(grad.reshape(batch, grad.shape[-1]))
    # Half precision is summed over panels in float32: a bfloat16 sum stops growing once a part is below its last bit.
    gx_BI = None
    for start, stop, w_PI in _panels(packed, grad.dtype):
        g_BP = g_BO[:, start:stop]
        if gx_BI is None:
            part = g_BP @ w_PI
            gx_BI = part if stop == packed.shape[0] else part.to(torch.promote_types(grad.dtype, torch.float32))
        elif gx_BI.dtype == grad.dtype:
            gx_BI.addmm_(g_BP, w_PI)
        else:
            gx_BI += g_BP @ w_PI
    if gx_BI is None:  # a weight without rows
        gx_BI = grad.new_zeros(g_BO.shape[0], packed.shape[1])
    return _own(gx_BI.to(grad.dtype), *grad.shape[:-1], packed.shape[1])


def linear_grad_input_bf16(grad: Tensor, packed: PackedTensor) -> Tensor:
    """dL/dx = g W with float32 g and W rounded to bfloat16, their products summed in float32."""
    if has_bf16():
        return _product(grad, packed, backward=True, compute="bf16")
    if has_amx():
        return linear_grad_input(grad.to(torch.bfloat16), packed).to(torch.float32)
    rounded_BO = grad.reshape(grad.numel() // grad.shape[-1], grad.shape[-1]).bfloat16().float()
    gx_BI = grad.new_zeros(len(rounded_BO), packed.shape[1])
    for start, stop, w_PI in _panels(packed, torch.bfloat16):
        gx_BI.addmm_(rounded_BO[:, start:stop], w_PI.float())
    return _own(gx_BI, *grad.shape[:-1], packed.shape[1])


def linear_grad_input_int8(grad: Tensor, packed: PackedTensor) -> Tensor:
    """dL/dx = g W with float32 g rounded to 8 bits in runs of 32 rows of W, for the formats of its choice."""
    return _product(grad, packed, backward=True, compute="int8")


def _own(y_NO: Tensor, *shape: int) -> Tensor:
    """y without its surplus rows, in its shape. Not as a view: autograd lets nobody change the view that an op gave."""
    return y_NO.resize_(shape)


def _few_shapes(x_BI: Tensor) -> Tensor:
    """x; in bfloat16 with rows of zeros up to a multiple of 32.

    oneDNN compiles a kernel for each number of rows and keeps a thousand of them: with batches of all lengths hundreds of
    megabytes.
    """
    missing = -x_BI.shape[0] % 32
    return F.pad(x_BI, (0, 0, 0, missing)) if x_BI.dtype == torch.bfloat16 and missing else x_BI


def _panels(packed: PackedTensor, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """Yield (first row, last row + 1, w_PI): the weight in unpacked panels that share one scratch buffer."""
    rows, columns = packed.shape
    unpacked = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    panel_weights = BF16_PANEL_BYTES // 2 if unpacked == torch.bfloat16 else PANEL_BYTES // 4
    step = max(1, min(rows, max(PANEL_ROWS, panel_weights // columns)))
    scratch = _scratch_buffer(step * columns * unpacked.itemsize).view(unpacked)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        w_PI = scratch[: (stop - start) * columns].view(stop - start, columns)
        _unpack(packed, start, stop, w_PI)
        yield start, stop, w_PI.to(dtype)


def _scratch_buffer(size: int) -> Tensor:
    """A buffer of bytes kept for each thread: allocating it anew would cost a page fault every 4 kB."""
    buffer: Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _scratch.buffer = torch.empty(size, dtype=torch.uint8)
    return buffer[:size]


def _unpack(packed: PackedTensor, start: int, stop: int, out: Tensor) -> None:
    """Write rows of the weight to `out`, float32 or bfloat16."""
    data, scales = packed.parts[0][start:stop].contiguous(), _row_scales(packed)
    library = loaded()
    unpack = library.qgraft_dequantize_bf16 if out.dtype == torch.bfloat16 else library.qgraft_dequantize
    code = unpack(
        FORMAT_IDS[packed.format], data.data_ptr(), None if scales is None else scales[start:].data_ptr(), stop - start,
        packed.shape[1], out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    assert code == 0, f"native dequantize returned {code} for {packed.format}"


def _product(x: Tensor, packed: PackedTensor, *, backward: bool = False, compute: str = "float32") -> Tensor:
    """x W^T, or x W where `backward`, in C; float32 but for what `compute` rounds."""
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], packed.shape[1 if backward else 0]), dtype=torch.float32)
    linear_call(x.view(-1, x.shape[-1]), y, packed, backward=backward, compute=compute)
    return y


def linear_call(
    x_NI: Tensor,
    y: Tensor | None,
    weight: PackedTensor | tuple[int, int],
    *,
    bias: Tensor | None = None,
    terms: Sequence[LoraTerm] = (),
    backward: bool = False,
    compute: str = "float32",
) -> None:
    """qgraft_linear: y = x W^T + bias + what the terms add; or, where `backward`, gx from g and the terms' gradients.

    Args:
        x_NI: x or g, contiguous float32.
        y: written, contiguous float32; None if no gx is wanted.
        weight: W, or its shape where y holds the product with it already.
        compute: "bf16": round x and W (g and W) to bfloat16; "int8": x (g) to 8 bits. Few rows of x or g are not rounded
            to bfloat16, few of g not to 8 bits: it would save no time.
    """
    packed = weight if isinstance(weight, PackedTensor) else None
    rows, columns = packed.shape if packed else weight  # type: ignore[misc]
    data, scales = stored(packed) if packed else (None, None)
    tokens, width = x_NI.shape
    compute = rounding_of(compute, tokens, backward)
    floats = scratch_floats(compute, tokens, width)
    for term in terms:
        floats += term.rank * (rows + 2 * (term.stop - term.start))
    call = LinearCall(
        FORMAT_IDS[packed.format] if packed else 0, rows, columns, tokens, ROUNDINGS.index(compute), len(terms),
        pointer(data), pointer(scales), pointer(bias), x_NI.data_ptr(), pointer(y), None, (LoraTerm * len(terms))(*terms),
    )  # fmt: skip
    call_linear([(call, 0)], floats, backward)


def call_linear(calls: Sequence[tuple[LinearCall, int]], floats: int, backward: bool) -> None:
    """qgraft_linear of several layers at once.

    Args:
        calls: each with where its scratch begins, in numbers.
        floats: the numbers of scratch that all of them take.
    """
    scratch = _scratch_buffer(4 * floats).data_ptr() if floats else None
    for call, start in calls:
        call.scratch = None if scratch is None else scratch + 4 * start
    asked = (LinearCall * len(calls))(*(call for call, _ in calls))
    code = loaded().qgraft_linear(asked, len(calls), backward, torch.get_num_threads())
    assert code == 0, f"qgraft_linear returned {code}"


def rounding_of(compute: str, tokens: int, backward: bool) -> str:
    """What the product of so many tokens rounds: few are computed in float32, but for 8 bits forward."""
    return "float32" if tokens < FEW_ROUNDED and (compute == "bf16" or backward) else compute


def scratch_floats(compute: str, tokens: int, width: int) -> int:
    """What x or g take when they are rounded: as scratch_size of linear.c."""
    if compute == "bf16":
        return (width // 2 + 1) * tokens
    return (width + 255) // 256 * 80 * tokens if compute == "int8" else 0


def stored(packed: PackedTensor) -> tuple[Tensor, Tensor | None]:
    """What C reads of a weight: its bytes, and ChatGLM's row scales in float32; other formats keep theirs in the bytes."""
    return packed.parts[0].contiguous(), _row_scales(packed)


def _row_scales(packed: PackedTensor) -> Tensor | None:
    return packed.parts[1].to(torch.float32).contiguous() if len(packed.parts) > 1 else None

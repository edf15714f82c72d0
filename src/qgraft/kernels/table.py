"""The one table: every computation that has more than one implementation is a row of it.

    row                 reference      C, on a CPU         Triton, on a GPU    torch's own kernels, on a GPU
    the packed ops      reference.py   cpu/packed.py       triton_ops.py
    grouped             reference.py   cpu/grouped.py
    experts             experts.py                         gpu_experts.py
    lora, _bf16, _int8  reference.py   cpu/lora.py                             summed_lora.py
    norm gated rotate   reference.py   cpu/pointwise.py    gpu_rows.py
    varlen_attention    reference.py   cpu/varlen_...py                        varlen.py
    cross_entropy       reference.py                       gpu_rows.py
    descend             reference.py   cpu/descend.py
    decode_step         the model's    cpu/decode.py       gpu_decode.py
                        own pass

A module has the functions of its rows, with the arguments and results of those in reference.py. What single calls may have
that a kernel does not take (odd shapes, a prefix, dropout), the module itself hands to the reference; formats, dtypes and
devices are asked for here, once (choice.py). A row that is added needs a case in tests/kernels/test_table.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from qgraft.kernels import triton_ops, varlen
from qgraft.kernels.cpu import library
from qgraft.kernels.cpu.abi import FORMAT_IDS, INT8_GRADIENT_FORMATS
from qgraft.kernels.reference import HALVES

Lacks = Callable[
    [str | None, torch.dtype], str
]  # (format, dtype) -> what there is no kernel for, empty where there is one


class Kernel(NamedTuple):
    """One implementation of a row.

    Attributes:
        name: "native", "triton" or "torch".
        device: where it computes.
        module: the file, below qgraft.kernels.
        lacks: what the row is not computed for by it.
        status: (available here, why).
        mixes: whether one call may have tensors of different dtypes.
    """

    name: str
    device: str
    module: str
    lacks: Lacks
    status: Callable[[], tuple[bool, str]]
    mixes: bool = False


class Row(NamedTuple):
    """One computation.

    Attributes:
        name: what `choose` is asked for.
        what: for people.
        functions: what reference.py and each kernel's module have for it.
        by_format: whether weights of one format are served and of another not.
        kernels: the first that is there and lacks nothing serves.
        reference: the module with what they are compared with.
    """

    name: str
    what: str
    functions: tuple[str, ...]
    by_format: bool
    kernels: tuple[Kernel, ...]
    reference: str = "reference"


def _unread(format: str | None, dtype: torch.dtype) -> str:
    return "" if format in FORMAT_IDS else "no native loop for this format yet"


def _not_float32(format: str | None, dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else "native loops compute in float32"


def _not_gated(format: str | None, dtype: torch.dtype) -> str:
    return "" if dtype in (torch.float32, torch.bfloat16) else "native loops read float32 and bfloat16"


def _no_lora(format: str | None, dtype: torch.dtype) -> str:
    if format is not None and format not in FORMAT_IDS:
        return "no native loop for this format yet"
    if library.load() is not None and not library.has_panels():
        return "the plain level has no such loops"
    return _not_float32(format, dtype)


def _no_lora_bf16(format: str | None, dtype: torch.dtype) -> str:
    if library.load() is not None and not library.has_bf16():
        return "this CPU's level multiplies no bfloat16 numbers in C"
    return _no_lora(format, dtype)


def _no_lora_int8(format: str | None, dtype: torch.dtype) -> str:
    if library.load() is not None and not library.has_int8_panels():
        return "this CPU's level takes no gradients in 8 bits"
    if format not in INT8_GRADIENT_FORMATS:
        return "no 8-bit gradients of this format, which would be no faster"
    return _no_lora(format, dtype)


def _no_decoding(format: str | None, dtype: torch.dtype) -> str:
    return _unread(format, dtype) or _not_float32(format, dtype)


def _no_triton(format: str | None, dtype: torch.dtype) -> str:
    return "" if format in triton_ops.FORMATS else "no triton kernel for this format yet"


def _no_triton_rows(format: str | None, dtype: torch.dtype) -> str:
    return "" if dtype in triton_ops.DTYPES else "triton kernels compute in float32, bfloat16 and float16"


def _not_half(format: str | None, dtype: torch.dtype) -> str:
    return "" if dtype in HALVES else "for half precision only"


def _not_summed(format: str | None, dtype: torch.dtype) -> str:
    return _not_half(format, dtype) if format is not None else "it adds the product with the weight to what LoRAs add"


def _native(module: str, lacks: Lacks) -> Kernel:
    return Kernel("native", "cpu", "cpu." + module, lacks, lambda: library.native_status())


def _triton(module: str, lacks: Lacks) -> Kernel:
    return Kernel("triton", "cuda", module, lacks, lambda: triton_ops.triton_status(), mixes=True)


def _summed_status() -> tuple[bool, str]:
    return True, "one sum in cuBLAS, of the product and what LoRAs add"


def _packed(name: str, what: str) -> Row:
    return Row(name, what, (name,), True, (_native("packed", _unread), _triton("triton_ops", _no_triton)))


def _rows(name: str, what: str, functions: tuple[str, ...], lacks: Lacks) -> Row:
    kernels = (_native("pointwise", lacks), _triton("gpu_rows", _no_triton_rows))
    return Row(name, what, functions, False, kernels)


PACKED_OPS = (
    "dequantize", "linear", "linear_grad_input", "linear_bf16", "linear_grad_input_bf16", "linear_int8",
    "linear_grad_input_int8",
)  # fmt: skip
_LORA = ("lora_forward", "lora_backward")
_SUMMED = Kernel("torch", "cuda", "summed_lora", _not_summed, _summed_status)
_VARLEN = Kernel("torch", "cuda", "varlen", _not_half, lambda: varlen.status())

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        _packed("dequantize", "unpack a weight, or the rows of an embedding"),
        _packed("linear", "y = x W^T"),
        _packed("linear_grad_input", "gx = g W"),
        _packed("linear_bf16", "y = x W^T, both rounded to bfloat16"),
        _packed("linear_grad_input_bf16", "gx = g W, both rounded to bfloat16"),
        _packed("linear_int8", "y = x W^T, x rounded to 8 bits"),
        _packed("linear_grad_input_int8", "gx = g W, g rounded to 8 bits"),
        Row(
            "grouped", "products of experts, each with rows of its own", ("grouped_linear",), True,
            (_native("grouped", _no_lora),),
        ),
        Row(
            "experts", "a projection of all experts with its LoRAs", ("experts_forward", "experts_backward"), False,
            (_triton("gpu_experts", _no_triton_rows),), "experts",
        ),
        Row("lora", "a layer with its LoRAs", _LORA, True, (_native("lora", _no_lora), _SUMMED)),
        Row("lora_bf16", "the same in bfloat16", _LORA, True, (_native("lora", _no_lora_bf16),)),
        Row("lora_int8", "the same in 8 bits", _LORA, True, (_native("lora", _no_lora_int8),)),
        Row(
            "decode_step", "tokens through a decoder", ("Structures",), True,
            (_native("decode", _no_decoding), _triton("gpu_decode", _no_triton)),
        ),
        _rows("norm", "RMSNorm", ("norm", "normalized", "norm_backward"), _not_float32),
        _rows("gated", "act(gate) up", ("gated", "gated_backward"), _not_gated),
        _rows("rotate", "rotary positions", ("rotate",), _not_float32),
        Row(
            "varlen_attention", "attention of samples that share a row", ("attend",), False,
            (_native("varlen_attention", _not_float32), _VARLEN),
        ),
        Row(
            "cross_entropy", "loss of logits, and its gradient", ("loss_to_gradient",), False,
            (_triton("gpu_rows", _no_triton_rows),),
        ),
        Row("descend", "steps of codes, of a merge", ("descend",), False, (_native("descend", _not_float32),)),
    )
}  # fmt: skip

"""Which kernel serves which op, format and device. Chosen once, shown by `qgraft doctor`, never changed silently.

The environment variable QGRAFT_KERNELS forces a choice: `reference` (plain torch everywhere), `native` (C on the CPU, an
error where the library is not built; plain torch on a GPU), `triton` (on a GPU, an error where it cannot be; the CPU is
served as ever) or `auto`, the default: each device the fastest that it has. QGRAFT_CPU_LEVEL is for the library itself
(cpu/library.py).
"""

import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qgraft.errors import OptionError, UnsupportedError, near_match
from qgraft.kernels import triton_ops
from qgraft.kernels.cpu import library
from qgraft.kernels.cpu.abi import FORMAT_IDS, INT8_FORMATS

OPS = ("dequantize", "linear", "linear_grad_input", "linear_bf16", "linear_grad_input_bf16", "linear_int8")
KERNELS_VARIABLE = "QGRAFT_KERNELS"
VALUES = ("auto", "native", "triton", "reference")


@dataclass(frozen=True)
class Choice:
    """One row of the table: `kernel` is "native", "triton" or "reference", `why` is for people.

    `compute` is what the products of float32 are computed in: "int8" for linear_int8 and a format that has it.
    """

    op: str
    format: str
    device: str
    kernel: str
    why: str
    compute: str = "float32"


def in_c(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether C computes with these, where no weight's format decides: all of `dtype` on a CPU, and the library serves."""
    for tensor in tensors:
        if tensor.dtype != dtype or not tensor.is_cpu:
            return False
    return choose("linear", next(iter(FORMAT_IDS)), "cpu").kernel == "native"


def has_fast_bf16() -> bool:
    """Whether products of bfloat16 numbers are computed in hardware here, so that they are faster than those of float32."""
    return in_c() and (library.has_bf16() or library.has_amx())


@cache
def choose(op: str, format: str, device: str) -> Choice:
    """The kernel for `op` on weights of `format` on `device` ("cpu", "cuda").

    Raises OptionError for an unknown QGRAFT_KERNELS or QGRAFT_CPU_LEVEL, UnsupportedError for a kernel that is not there,
    InstallationError for a library that was made from other sources.
    """
    wanted = os.environ.get(KERNELS_VARIABLE, "auto")
    if wanted not in VALUES:
        raise OptionError(
            f"{KERNELS_VARIABLE}={wanted!r}: expected {', '.join(VALUES[:-1])} or {VALUES[-1]}",
            hint=near_match(wanted, VALUES),
        )
    compute = "int8" if op == "linear_int8" and format in INT8_FORMATS else "float32"
    if wanted == "reference":
        return Choice(op, format, device, "reference", f"{KERNELS_VARIABLE}=reference", compute)
    if device == "cuda" or (wanted == "triton" and triton_ops.interpreted()):
        return Choice(op, format, device, *_on_gpu(format, wanted), compute)
    if device != "cpu":
        return Choice(op, format, device, "reference", "plain torch; no faster kernel for this device yet", compute)
    return Choice(op, format, device, *_on_cpu(format, wanted), compute)


def _on_gpu(format: str, wanted: str) -> tuple[str, str]:
    if wanted == "native":
        return "reference", f"plain torch: {KERNELS_VARIABLE}=native is for the CPU and leaves this device to it"
    if format not in triton_ops.FORMATS:
        return "reference", "plain torch; no triton kernel for this format yet"
    available, why = triton_ops.triton_status()
    if wanted == "triton" and not available:
        raise UnsupportedError(
            f"{KERNELS_VARIABLE}=triton, but: {why}",
            hint="`pip install triton` and a C compiler, or unset the variable",
        )
    return ("triton" if available else "reference"), why


def _on_cpu(format: str, wanted: str) -> tuple[str, str]:
    if format not in FORMAT_IDS:
        return "reference", "plain torch; no native loop for this format yet"
    available, why = library.native_status()
    if wanted == "native" and not available:
        raise UnsupportedError(
            f"{KERNELS_VARIABLE}=native, but the native kernels are {why}",
            hint="install gcc and reinstall qgraft, or unset the variable",
        )
    return ("native" if available else "reference"), why

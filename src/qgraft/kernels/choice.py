"""Which kernel serves which op, format and device. Chosen once, shown by `qgraft doctor`, never changed silently.

The environment variable QGRAFT_KERNELS forces a choice: `reference` (plain torch everywhere), `native` (an error where
the native library is not built) or `auto`, the default. QGRAFT_CPU_LEVEL is for the library itself (library.py).
"""

import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qgraft.errors import OptionError, UnsupportedError, near_match
from qgraft.kernels import library, native

OPS = ("dequantize", "linear", "linear_grad_input", "linear_bf16", "linear_grad_input_bf16", "linear_int8")
KERNELS_VARIABLE = "QGRAFT_KERNELS"


@dataclass(frozen=True)
class Choice:
    """One row of the table: `kernel` is "native" or "reference", `why` is for people.

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
    return choose("linear", next(iter(native.FORMAT_IDS)), "cpu").kernel == "native"


def has_fast_bf16() -> bool:
    """Whether products of bfloat16 numbers are computed in hardware here, so that they are faster than those of float32."""
    return in_c() and (native.has_bf16() or native.has_amx())


@cache
def choose(op: str, format: str, device: str) -> Choice:
    """The kernel for `op` on weights of `format` on `device` ("cpu", "cuda").

    Raises OptionError for an unknown QGRAFT_KERNELS or QGRAFT_CPU_LEVEL, UnsupportedError for a kernel that is not there,
    InstallationError for a library that was made from other sources.
    """
    wanted = os.environ.get(KERNELS_VARIABLE, "auto")
    if wanted not in ("auto", "native", "reference"):
        raise OptionError(
            f"{KERNELS_VARIABLE}={wanted!r}: expected auto, native or reference",
            hint=near_match(wanted, ("auto", "native", "reference")),
        )
    compute = "int8" if op == "linear_int8" and format in native.INT8_FORMATS else "float32"
    if wanted == "reference":
        return Choice(op, format, device, "reference", f"{KERNELS_VARIABLE}=reference", compute)
    if device != "cpu":
        return Choice(op, format, device, "reference", "plain torch; no faster kernel for this device yet", compute)
    if format not in native.FORMAT_IDS:
        return Choice(op, format, device, "reference", "plain torch; no native loop for this format yet", compute)
    available, why = library.native_status()
    if available:
        return Choice(op, format, device, "native", why, compute)
    if wanted == "native":
        raise UnsupportedError(
            f"{KERNELS_VARIABLE}=native, but the native kernels are {why}",
            hint="install gcc and reinstall qgraft, or unset the variable",
        )
    return Choice(op, format, device, "reference", why, compute)

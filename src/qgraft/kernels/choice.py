"""Which kernel serves which row of the table (table.py). Chosen once, shown by `qgraft doctor`, never changed silently.

The environment variable QGRAFT_KERNELS forces a choice for all rows: `reference` (plain torch everywhere), `native` (C on
the CPU, an error where the library is not built; plain torch on a GPU), `triton` (on a GPU, an error where it cannot be; the
CPU is served as ever) or `auto`, the default: each device the fastest that it has. A row, format or dtype that the wanted
kernel was never written for is served as by default, and `doctor` says so. QGRAFT_CPU_LEVEL is for the library itself
(cpu/library.py).
"""

import os
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from qgraft.errors import OptionError, UnsupportedError, near_match
from qgraft.kernels import triton_ops
from qgraft.kernels.cpu import library
from qgraft.kernels.cpu.abi import INT8_FORMATS, INT8_GRADIENT_FORMATS
from qgraft.kernels.table import ROWS, Kernel

KERNELS_VARIABLE = "QGRAFT_KERNELS"
VALUES = ("auto", "native", "triton", "reference")
_HINTS = {
    "native": "install gcc and reinstall qgraft, or unset the variable",
    "triton": "`pip install triton` and a C compiler, or unset the variable",
}


@dataclass(frozen=True)
class Choice:
    """An answer of the table: `kernel` is "native", "triton", "torch" or "reference", `why` is for people.

    `compute` is what the products of float32 are computed in: "int8" for the rows of that name and a format that has it.
    """

    op: str
    format: str | None
    device: str
    kernel: str
    why: str
    compute: str = "float32"
    dtype: str = "float32"

    @cached_property
    def module(self) -> Any:
        """What computes: it has the functions of the row, as reference.py has."""
        return import_module("qgraft.kernels." + (self._kernel.module if self._kernel else ROWS[self.op].reference))

    @cached_property
    def mixes(self) -> bool:
        """Whether a call may have tensors of other dtypes besides."""
        return self._kernel is None or self._kernel.mixes

    @property
    def _kernel(self) -> Kernel | None:
        return next((kernel for kernel in ROWS[self.op].kernels if kernel.name == self.kernel), None)


@cache
def choose(op: str, format: str | None, device: str, dtype: torch.dtype = torch.float32) -> Choice:
    """The kernel for the row `op` on `device` ("cpu", "cuda").

    Args:
        format: of the weights; None for rows without any, and for a layer's LoRAs alone.
        dtype: of what goes in.

    Raises OptionError for an unknown QGRAFT_KERNELS or QGRAFT_CPU_LEVEL, UnsupportedError for a kernel that is not there,
    InstallationError for a library that was made from other sources.
    """
    wanted = _wanted()
    kernel, why = _chosen(op, format, device, dtype, wanted)
    return Choice(op, format, device, kernel, why, _compute(op, format, kernel), str(dtype).removeprefix("torch."))


def serving(op: str, first: Tensor, *others: Tensor) -> Any:
    """The module that computes a row without weights for these tensors: all on one device, in dtypes that go together."""
    device, dtype = first.device, first.dtype
    choice = choose(op, None, device.type, dtype)
    for tensor in others:
        if tensor.device != device or (tensor.dtype is not dtype and not _together(choice, tensor.dtype)):
            return _reference()
    return choice.module


def has_fast_bf16() -> bool:
    """Whether products of bfloat16 numbers are computed in hardware here, so that they are faster than those of float32."""
    native = choose("linear_bf16", INT8_FORMATS[0], "cpu").kernel == "native"
    return native and (library.has_bf16() or library.has_amx())


def _wanted() -> str:
    wanted = os.environ.get(KERNELS_VARIABLE, "auto")
    if wanted not in VALUES:
        raise OptionError(
            f"{KERNELS_VARIABLE}={wanted!r}: expected {', '.join(VALUES[:-1])} or {VALUES[-1]}",
            hint=near_match(wanted, VALUES),
        )
    return wanted


def _chosen(op: str, format: str | None, device: str, dtype: torch.dtype, wanted: str) -> tuple[str, str]:
    """(kernel, why)."""
    if wanted == "reference":
        return "reference", f"{KERNELS_VARIABLE}=reference"
    if wanted == "native" and device == "cuda":
        return "reference", f"plain torch: {KERNELS_VARIABLE}=native is for the CPU and leaves this device to it"
    place = "cuda" if wanted == "triton" and triton_ops.interpreted() else device
    kernels = [kernel for kernel in ROWS[op].kernels if kernel.device == place]
    reason = "plain torch; no faster kernel for this device yet"
    for kernel in kernels:
        if lacks := kernel.lacks(format, dtype):
            reason = f"plain torch; {lacks}"
            continue
        available, reason = kernel.status()
        if available:
            return kernel.name, reason
        if kernel.name == wanted:
            raise UnsupportedError(_missing(op, format, kernel, reason), hint=_HINTS[wanted])
    return "reference", reason


def _compute(op: str, format: str | None, kernel: str) -> str:
    """Plain torch computes in 8 bits what C does on any level: results to compare with, whatever CPU there is."""
    served: tuple[str, ...] = ()
    if op == "linear_int8":
        served = INT8_FORMATS
    elif op in ("linear_grad_input_int8", "lora_int8") and (kernel != "native" or library.has_int8_panels()):
        served = INT8_GRADIENT_FORMATS
    return "int8" if format in served else "float32"


def _missing(op: str, format: str | None, kernel: Kernel, why: str) -> str:
    row = op if format is None else f"{op} of {format} weights"
    return f"{KERNELS_VARIABLE}={kernel.name}, but there is no {kernel.name} kernel for {row}: {why}"


def _together(choice: Choice, dtype: torch.dtype) -> bool:
    return choice.mixes and (choice.kernel == "reference" or dtype in triton_ops.DTYPES)


@cache
def _reference() -> Any:
    return import_module("qgraft.kernels.reference")

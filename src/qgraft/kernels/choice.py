"""Which kernel serves which op, format and device. Chosen once, shown by `qgraft doctor`, never changed silently.

The environment variable QGRAFT_KERNELS forces a choice: `reference` (plain torch everywhere), `native` (an error where
the native library is not built) or `auto`, the default.
"""

import os
from dataclasses import dataclass
from functools import cache

from qgraft.errors import OptionError, UnsupportedError, near_match
from qgraft.kernels import native

OPS = ("dequantize", "linear", "linear_grad_input", "linear_int8")
KERNELS_VARIABLE = "QGRAFT_KERNELS"


@dataclass(frozen=True)
class Choice:
    """One row of the table: `kernel` is "native" or "reference", `why` is for people."""

    op: str
    format: str
    device: str
    kernel: str
    why: str


@cache
def choose(op: str, format: str, device: str) -> Choice:
    """The kernel for `op` on weights of `format` on `device` ("cpu", "cuda").

    Raises OptionError for an unknown QGRAFT_KERNELS, UnsupportedError when it asks for a kernel that is not there.
    """
    wanted = os.environ.get(KERNELS_VARIABLE, "auto")
    if wanted not in ("auto", "native", "reference"):
        raise OptionError(
            f"{KERNELS_VARIABLE}={wanted!r}: expected auto, native or reference",
            hint=near_match(wanted, ("auto", "native", "reference")),
        )
    if wanted == "reference":
        return Choice(op, format, device, "reference", f"{KERNELS_VARIABLE}=reference")
    if device != "cpu":
        return Choice(op, format, device, "reference", "plain torch; no faster kernel for this device yet")
    if format not in native.FORMAT_IDS:
        return Choice(op, format, device, "reference", "plain torch; no native loop for this format yet")
    available, why = native.native_status()
    if available and op == "linear_int8" and format not in native.INT8_FORMATS:
        return Choice(op, format, device, "native", f"in float32: no 8-bit loop for this format yet; {why}")
    if available:
        return Choice(op, format, device, "native", why)
    if wanted == "native":
        raise UnsupportedError(
            f"{KERNELS_VARIABLE}=native, but the native kernels are {why}",
            hint="install gcc and reinstall qgraft, or unset the variable",
        )
    return Choice(op, format, device, "reference", why)

"""HOW packed weights are computed with: registered torch ops and the kernels that serve them.

    ops.py        the ops: schemas, shape rules for tracing, gradients        torch.ops.qgraft.*
    choice.py     which kernel serves which op, format and device, and why    `qgraft doctor` prints it
    reference.py  plain torch, for every format and device; the truth the others are tested against
    cpu/          C behind ctypes: the library, the level of CPU it runs as, its functions
    triton_ops.py on a GPU: unpacked by triton_blocks.py, multiplied by cuBLAS
    lora.py       a packed layer with LoRAs on it in one call of linear.c; and in torch
    pointwise.py  what a training step computes beside products, by pointwise.c or in plain torch
    varlen_attention.py  attention within samples that share a row, in C or in plain torch
    varlen.py     the same on a GPU by torch's own kernel

The functions here take a PackedTensor; below them everything is tensors, as torch.library wants it.
"""

from qgraft.kernels.choice import KERNELS_VARIABLE, Choice, choose
from qgraft.kernels.cpu.library import LEVEL_VARIABLE, native_status
from qgraft.kernels.ops import (
    dequantize,
    linear,
    linear_bf16,
    linear_grad_input,
    linear_grad_input_bf16,
    linear_int8,
)

__all__ = [
    "KERNELS_VARIABLE",
    "LEVEL_VARIABLE",
    "Choice",
    "choose",
    "dequantize",
    "linear",
    "linear_bf16",
    "linear_grad_input",
    "linear_grad_input_bf16",
    "linear_int8",
    "native_status",
]

"""HOW it is computed: one table of all computations that have more than one implementation.

    table.py      the table: a row for each computation, its reference, its kernels, what these lack
    choice.py     which kernel serves which row, format, device and dtype, and why    `qgraft doctor` prints it
    reference.py  plain torch for every row, format and device; the truth the others are tested against
    ops.py        the rows on packed weights as torch ops: schemas, shape rules for tracing, gradients    torch.ops.qgraft.*
    grouped.py    products of all experts of a layer
    lora.py       a packed layer with LoRAs on it;  summed_lora.py: in half precision on a GPU
    pointwise.py  norms, gated products, rotations;  cross_entropy.py: the loss of logits
    varlen_attention.py  attention within samples that share a row;  varlen.py: on a GPU by torch's own kernel
    cpu/          C behind ctypes: the library, the level of CPU it runs as, its functions
    triton_ops.py, gpu_rows.py  on a GPU: weights unpacked by triton_blocks.py and multiplied by cuBLAS; triton_rows.py
    unpacked.py   copies of weights in half precision, kept where a GPU has room
    decoder.py    a decoder as kernels take it that compute all of it: cpu/decode.py, and gpu_decode.py by a CUDA graph

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
    linear_grad_input_int8,
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
    "linear_grad_input_int8",
    "linear_int8",
    "native_status",
]

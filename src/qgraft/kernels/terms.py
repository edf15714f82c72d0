"""A frozen layer and its LoRAs, as the kernels of the rows `lora` and `lora_bf16` take them.

Shapes: N tokens, S tokens of a term, I inputs, O outputs, R rank.
"""

from typing import NamedTuple

from torch import Tensor

from qgraft.formats import PackedTensor


class Weight(NamedTuple):
    """A packed weight that the kernel multiplies with, its bias, and how: see QuantizedLinear.compute."""

    packed: PackedTensor
    bias: Tensor | None
    compute: str


class Term(NamedTuple):
    """One LoRA on the tokens start:stop.

    Attributes:
        A: [R, I] float32.
        B: [O, R] float32.
        x: [S, I] what A multiplies, in the dtype of the layer's input: its rows start:stop, or these with some dropped.
        adds: whether the backward pass adds gh A to gx; where x has been dropped from, the caller does.
    """

    start: int
    stop: int
    scaling: float
    A: Tensor
    B: Tensor
    x: Tensor
    adds: bool = True


class Grads(NamedTuple):
    """Gradients of one term, in float32, and gh [S, R], which goes back through A."""

    A: Tensor
    B: Tensor
    gh: Tensor

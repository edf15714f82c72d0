"""A decoder of Llama's formula as kernels take it that compute it as a whole: one call for the new tokens of any texts.

    Structures(decoder)     cpu/decode.py or gpu_decode.py: raises ValueError for what it does not compute
        .adapters(...)      what some LoRAs add in each linear layer, made once for a choice of adapters
        .use(...)           the memory that keys and values are read from and written to
        .step(...)          new tokens through all layers

These are values: nothing here is a module, and nothing follows a model that changes (passes/decoding_network.py does).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from qgraft.formats import PackedTensor

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer, in the order in which adapters are given


class Linear(NamedTuple):
    """A packed layer; `int8` where it is to compute as ops.linear_int8 does."""

    packed: PackedTensor
    bias: Tensor | None = None
    int8: bool = False


class Layer(NamedTuple):
    """One layer.

    Attributes:
        linears: in the order of `LINEARS`.
        norms: weights of those before the attention and before the MLP, and of heads of queries and keys if there are any.
        window: how many tokens it sees at most, 0 for all.
    """

    linears: tuple[Linear, ...]
    norms: tuple[Tensor, ...]
    window: int = 0


class Decoder(NamedTuple):
    """All layers and what they share: heads of `channels`, scores times `scale`; norm is the one behind the last layer."""

    layers: Sequence[Layer]
    norm: Tensor
    channels: int
    epsilon: float
    scale: float

    @property
    def hidden(self) -> int:
        """Numbers of a state."""
        return self.layers[0].linears[0].packed.shape[1]

    @property
    def inner(self) -> int:
        """Numbers between gate and down."""
        return self.layers[0].linears[4].packed.shape[0]

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return self.layers[0].linears[0].packed.shape[0] // self.channels

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.layers[0].linears[1].packed.shape[0] // self.channels


class Lora(NamedTuple):
    """s B A: A [rank, in] and B [out, rank]."""

    A: Tensor
    B: Tensor
    scaling: float


class Part(NamedTuple):
    """Rows that follow each other and have the same adapters, as Structures.adapters made them; None for none."""

    loras: Any
    rows: int


class Row(NamedTuple):
    """A new token of a text.

    Attributes:
        slots: of the keys and values of its text, int64; its own are written to slots[seen - 1].
        seen: how many of them it sees, itself among them.
        front: how many at the beginning are a prefix's, which no window hides.
    """

    slots: Tensor
    seen: int
    front: int = 0


class Structures(Protocol):
    """See the module's docstring."""

    most_rows: int  # that one step takes

    def adapters(self, of_linears: Sequence[Sequence[Lora]]) -> Any:
        """What LoRAs add in all linear layers, layer by layer in the order of `LINEARS`.

        Raises ValueError for LoRAs that it does not add.
        """

    def use(self, memory: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keys and values [groups, capacity, channels] of each layer."""

    def step(self, parts: Sequence[Part], rows: Sequence[Row], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Take tokens through the decoder.

        Args:
            parts: the adapters of the rows, in their order.
            x: [rows, hidden] float32, their embeddings; may be written over.
            cos, sin: [rows, channels] float32, of their rotations.

        Returns their normed last states [rows, hidden] float32.
        """

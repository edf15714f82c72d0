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

LINEARS = ("q", "k", "v", "o", "gate", "up", "shared_gate", "down")  # of a layer
PLACES = (*LINEARS, "expert_gate", "expert_up", "expert_down")  # where a layer may have LoRAs, in their order
SCORES = ("softmax", "sigmoid", "logits")  # of experts, to be chosen by


class Linear(NamedTuple):
    """A packed layer; `int8` where it is to compute as ops.linear_int8 does."""

    packed: PackedTensor
    bias: Tensor | None = None
    int8: bool = False


class Routing(NamedTuple):
    """Which experts a token goes to, and what each is weighted by: decode_experts.h has the formula.

    Attributes:
        chosen: how many experts a token goes to.
        scores: one of `SCORES`; with logits the weights are the softmax of those that are chosen.
        groups, kept: groups of experts, and how many of them have experts that may be chosen.
        normalized: whether the weights are divided by max(their sum, least_sum) + added_to_sum.
        scaling: what they are multiplied by at last.
    """

    chosen: int
    scores: str = "softmax"
    groups: int = 1
    kept: int = 1
    normalized: bool = False
    least_sum: float = 0.0
    added_to_sum: float = 0.0
    scaling: float = 1.0


class Experts(NamedTuple):
    """The experts of a layer, E of them.

    Attributes:
        gate, up, down: of all experts, [E out, in]; biases of down [E, out].
        router: [E, hidden] float32; router_bias: [E].
        correction: [E], added to the scores that experts are chosen by, not to those they are weighted by.
        bias: [E, 2 inner] of gate and up, one behind the other, or alternating.
        clamp: (limit, alpha) of gpt-oss's gate; None for silu(gate) up.
    """

    gate: Linear
    up: Linear
    down: Linear
    router: Tensor
    routing: Routing
    router_bias: Tensor | None = None
    correction: Tensor | None = None
    bias: Tensor | None = None
    alternates: bool = False
    clamp: tuple[float, float] | None = None

    @property
    def linears(self) -> tuple[Linear, Linear, Linear]:
        """Gate, up and down."""
        return self.gate, self.up, self.down

    @property
    def inner(self) -> int:
        """Numbers between gate and down of one expert."""
        return self.gate.packed.shape[0] // len(self.router)


class Layer(NamedTuple):
    """One layer.

    Attributes:
        linears: in the order of `LINEARS`, None for what it does not have: gate, up and down where it has experts alone,
            and mostly the shared gate [1, hidden], f32, through whose sigmoid what comes out of down is weighted.
        norms: weights of those before the attention and before the MLP, and of heads of queries and keys if there are any.
        window: how many tokens it sees at most, 0 for all.
        experts: what it has instead of gate, up and down, or beside them, which all tokens share.
        sinks: [heads] float32, a score that each head has of nothing, or None.
    """

    linears: tuple[Linear | None, ...]
    norms: tuple[Tensor, ...]
    window: int = 0
    experts: Experts | None = None
    sinks: Tensor | None = None

    @property
    def packed(self) -> list[PackedTensor]:
        """The packed weights that it has, those of the experts too; a shared gate is floats."""
        found = [linear for name, linear in zip(LINEARS, self.linears, strict=True) if name != "shared_gate"]
        found += self.experts.linears if self.experts else ()
        return [linear.packed for linear in found if linear is not None]

    def rows(self, name: str) -> int:
        """The outputs of one of `LINEARS`, 0 for one that it does not have."""
        linear = self.linears[LINEARS.index(name)]
        return 0 if linear is None else linear.packed.shape[0]


class Decoder(NamedTuple):
    """All layers and what they share: heads of `channels`, scores times `scale`; norm is the one behind the last layer.

    Attributes:
        rotated: how many channels at the beginning of a head are rotated; None for all.
        pairs: whether neighbours are rotated together, as in GLM's, instead of those half of them apart.
        wide_norms: whether the norms of queries and keys are of all heads together.
        residual: what is added to a state is multiplied by it.
    """

    layers: Sequence[Layer]
    norm: Tensor
    channels: int
    epsilon: float
    scale: float
    rotated: int | None = None
    pairs: bool = False
    wide_norms: bool = False
    residual: float = 1.0

    @property
    def hidden(self) -> int:
        """Numbers of a state."""
        return len(self.norm)

    @property
    def inner(self) -> int:
        """Numbers between gate and down, but those of experts, in the widest layer."""
        return max(layer.rows("gate") for layer in self.layers)

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return self.layers[0].rows("q") // self.channels

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.layers[0].rows("k") // self.channels

    @property
    def angles(self) -> int:
        """Numbers of cos, and of sin, of a token."""
        return self.channels if self.rotated is None else self.rotated


class Lora(NamedTuple):
    """s B A: A [rank, in] and B [out, rank]; of experts A [E, rank, in] and B [E, out, rank], whose rows lie together."""

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
        """What LoRAs add in all linear layers, layer by layer in the order of `PLACES`.

        Raises ValueError for LoRAs that it does not add.
        """

    def use(self, memory: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keys and values [groups, capacity, channels] of each layer."""

    def step(self, parts: Sequence[Part], rows: Sequence[Row], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Take tokens through the decoder.

        Args:
            parts: the adapters of the rows, in their order.
            x: [rows, hidden] float32, their embeddings; may be written over.
            cos, sin: [rows, angles of the decoder] float32, of their rotations.

        Returns their normed last states [rows, hidden] float32.
        """

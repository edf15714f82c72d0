"""A decoder of Llama's formula with random weights, as kernels take it, and the same computed in float64."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import mixture_float64
import torch
from mixture_float64 import Mixture
from torch import Tensor

from qgraft.formats import PackedTensor, get_format
from qgraft.kernels.decoder import LINEARS, PLACES, Decoder, Layer, Linear, Lora, Part, Row, Structures

HIDDEN, INNER, HEADS, GROUPS, CHANNELS, CAPACITY, LAYERS = 64, 96, 4, 2, 32, 220, 2
WIDE, NARROW = HEADS * CHANNELS, GROUPS * CHANNELS
SHAPES = {
    "q": (WIDE, HIDDEN), "k": (NARROW, HIDDEN), "v": (NARROW, HIDDEN), "o": (HIDDEN, WIDE),
    "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
}  # fmt: skip
EPSILON, WINDOW = 1e-5, 9
RANKS = ((), (3, 16), (8, 12), (1,))  # of the adapters of some choices: some fill vectors


class TestedDecoder:
    """Random layers, half of them with biases, a window and norms of the heads; and LoRAs on one product or all.

    Args:
        make: Structures of an implementation.
        memory: dtype of the keys and values.
        mixture: experts of the second layer, instead of its own gate, up and down or beside them.
        sinks: whether that layer has some.
        options: of the Decoder.
    """

    __test__ = False

    def __init__(
        self, make: Callable[[Decoder], Structures], *, int8: bool = False, format: str = "q8_0",
        memory: torch.dtype = torch.float32, device: str = "cpu", mixture: Mixture | None = None, sinks: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        self.memory = torch.randn(2 * LAYERS, GROUPS, CAPACITY, CHANNELS).to(device, memory)
        self.past = self.memory.double().cpu()
        self.norm, self.int8, self.format, self.device = torch.rand(HIDDEN) + 0.5, int8, format, device
        self.mixture, self.sinks = mixture, sinks
        self.options = Decoder([], self.norm, CHANNELS, EPSILON, CHANNELS**-0.5, **options)
        self.layers = [self._layer(index) for index in range(LAYERS)]
        layers = [self._plain(layer) for layer in self.layers]
        self.structures = make(self.options._replace(layers=layers, norm=self.norm.to(device)))
        self.choices = [
            self.structures.adapters(
                [
                    [Lora(A.to(device), B.to(device), s) for A, B, s in layer["loras"][choice].get(name, [])]
                    for layer in self.layers
                    for name in PLACES
                ]
            )
            for choice in range(len(RANKS))
        ]

    def _layer(self, index: int) -> dict[str, Any]:
        extra = bool(index)
        mixture = self.mixture if extra else None
        shapes = SHAPES if mixture is None else _beside(mixture)
        wide = (WIDE, NARROW) if self.options.wide_norms else (CHANNELS, CHANNELS)
        of_heads = wide if extra or self.options.wide_norms else ()
        return {
            **{name: get_format(self.format).quantize(torch.randn(shape) * 0.2) for name, shape in shapes.items()},
            "experts": None if mixture is None else mixture_float64.made(mixture, HIDDEN, self.format),
            "sinks": torch.randn(HEADS) if extra and self.sinks else None,
            "bias": {name: torch.randn(rows) if extra else None for name, (rows, _) in shapes.items()},
            "loras": [
                {
                    name: [
                        (torch.randn(r, columns), torch.randn(rows, r), 0.3 / r)
                        for r in ranks
                        if extra or name in ("k", "up", "down")
                    ]
                    for name, (rows, columns) in shapes.items()
                }
                | ({} if mixture is None else mixture_float64.loras(mixture, HIDDEN, ranks))
                for ranks in RANKS
            ],
            "norms": [torch.rand(n) + 0.5 for n in (HIDDEN, HIDDEN, *of_heads)],
            "window": WINDOW if extra else 0,
        }

    def _plain(self, layer: dict[str, Any]) -> Layer:
        def there(tensor: Tensor) -> Tensor:
            return tensor.to(self.device)

        biases = {name: None if bias is None else there(bias) for name, bias in layer["bias"].items()}
        linears = [
            Linear(layer[name].map(there), biases[name], self.int8) if name in layer else None for name in LINEARS
        ]
        if "shared_gate" in layer:
            place, packed = LINEARS.index("shared_gate"), layer["shared_gate"]
            weight = get_format(packed.format).dequantize(packed, torch.float32)
            linears[place] = Linear(PackedTensor("f32", packed.shape, (weight,)), biases["shared_gate"])
        experts = None if layer["experts"] is None else mixture_float64.plain(*layer["experts"], self.int8)
        norms = tuple(map(there, layer["norms"]))
        return Layer(tuple(linears), norms, layer["window"], experts, layer["sinks"])

    def step(self, rows: Sequence[Row], choices: Sequence[int], x: Tensor, angles: Tensor) -> Tensor:
        """The step, of rows with these choices of adapters."""
        parts = [Part(self.choices[choice] if choice else None, len(list(run))) for choice, run in groupby(choices)]
        self.structures.use([(self.memory[2 * i], self.memory[2 * i + 1]) for i in range(LAYERS)])
        return self.structures.step(parts, rows, x, angles.cos(), angles.sin())

    def expected(self, row: Row, choice: int, x: Tensor, angle: Tensor) -> Tensor:
        """What becomes of one row in float64; its keys and values are written to self.past."""
        x, cos, sin = x.double(), angle.double().cos(), angle.double().sin()
        slots = row.slots[: row.seen]
        for index, layer in enumerate(self.layers):
            norms = [tensor.double() for tensor in layer["norms"]] + [None] * (4 - len(layer["norms"]))
            normed = rms(x, norms[0])
            q, k, v = (project(layer, name, choice, normed) for name in ("q", "k", "v"))
            q, k = (
                rotated(self._normed(part, norm), cos, sin, self.options.pairs)
                for part, norm in ((q, norms[2]), (k, norms[3]))
            )
            keys, values = self.past[2 * index], self.past[2 * index + 1]
            keys[:, slots[-1]], values[:, slots[-1]] = k, v.view(-1, CHANNELS)
            seen = slots
            if layer["window"]:
                seen = torch.cat([slots[: row.front], slots[row.front :][-layer["window"] :]])
            keys, values = (part[:, seen].repeat_interleave(HEADS // GROUPS, 0) for part in (keys, values))
            scores = (keys @ q[:, :, None])[..., 0] / math.sqrt(CHANNELS)
            if layer["sinks"] is not None:
                scores = torch.cat([scores, layer["sinks"].double()[:, None]], -1)
            shares = torch.softmax(scores, -1)[:, : len(seen)]
            x = x + self.options.residual * project(layer, "o", choice, (shares[:, None] @ values).reshape(-1))
            x = x + self.options.residual * feed_forward(layer, choice, rms(x, norms[1]))
        return rms(x, self.norm.double())

    def _normed(self, x: Tensor, norm: Tensor | None) -> Tensor:
        heads = x.view(-1, CHANNELS)
        return rms(x, norm).view(-1, CHANNELS) if self.options.wide_norms else rms(heads, norm)


def _beside(mixture: Mixture) -> dict[str, tuple[int, int]]:
    """What a layer with experts has beside them."""
    shared = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    attention = {name: SHAPES[name] for name in ("q", "k", "v", "o")}
    gate = {"shared_gate": (1, HIDDEN)} if mixture.shared == "gated expert" else {}
    return {**attention, **(shared if mixture.shared else {}), **gate}


def feed_forward(layer: dict[str, Any], choice: int, x: Tensor) -> Tensor:
    """What gate, up and down make of a row, and experts."""
    total = torch.zeros_like(x)
    if layer["experts"] is not None:
        total = mixture_float64.expected(layer["experts"][0], x, layer["loras"][choice])
    if "gate" not in layer:
        return total
    gate, up = project(layer, "gate", choice, x), project(layer, "up", choice, x)
    y = project(layer, "down", choice, torch.nn.functional.silu(gate) * up)
    return total + (y * project(layer, "shared_gate", choice, x).sigmoid() if "shared_gate" in layer else y)


def rms(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """The first channels of heads; in pairs of neighbours or half of them apart, each with an angle for its own number."""
    half = len(cos) // 2
    x, rest = x[:, : 2 * half], x[:, 2 * half :]
    if pairs:
        turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:half])
        return torch.cat([turned.flatten(-2), rest], -1)
    a, b = x.chunk(2, -1)
    return torch.cat([x * cos + torch.cat([-b, a], -1) * sin, rest], -1)


def project(layer: dict[str, Any], name: str, choice: int, x: Tensor) -> Tensor:
    packed, bias = layer[name], layer["bias"][name]
    y = get_format(packed.format).dequantize(packed, torch.float64) @ x
    for A, B, scaling in layer["loras"][choice][name]:
        y = y + scaling * (B.double() @ (A.double() @ x))
    return y if bias is None else y + bias


def texts(lengths: list[tuple[int, int]]) -> list[Row]:
    """Rows of texts, (tokens before, new ones) of each, in slots of no order; the third text has a prefix of 4 in front."""
    places, rows = torch.randperm(CAPACITY), []
    for number, (past, new) in enumerate(lengths):
        front = 4 if number == 2 else 0
        slots, places = places[: front + past + new], places[front + past + new :]
        if number % 2:
            slots = slots.sort().values  # spans of several slots
        rows += [Row(slots, front + past + 1 + i, front) for i in range(new)]
    return rows

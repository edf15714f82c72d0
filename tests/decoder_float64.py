"""A decoder of Llama's formula with random weights, as kernels take it, and the same computed in float64."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qgraft.formats import get_format
from qgraft.kernels.decoder import LINEARS, Decoder, Layer, Linear, Lora, Part, Row, Structures

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
    """

    __test__ = False

    def __init__(
        self, make: Callable[[Decoder], Structures], *, int8: bool = False, format: str = "q8_0",
        memory: torch.dtype = torch.float32, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.memory = torch.randn(2 * LAYERS, GROUPS, CAPACITY, CHANNELS).to(device, memory)
        self.past = self.memory.double().cpu()
        self.norm, self.int8, self.format, self.device = torch.rand(HIDDEN) + 0.5, int8, format, device
        self.layers = [self._layer(index) for index in range(LAYERS)]
        layers = [self._plain(layer) for layer in self.layers]
        self.structures = make(Decoder(layers, self.norm.to(device), CHANNELS, EPSILON, CHANNELS**-0.5))
        self.choices = [
            self.structures.adapters(
                [
                    [Lora(A.to(device), B.to(device), s) for A, B, s in layer["loras"][choice].get(name, [])]
                    for layer in self.layers
                    for name in LINEARS
                ]
            )
            for choice in range(len(RANKS))
        ]

    def _layer(self, index: int) -> dict[str, Any]:
        extra = bool(index)
        return {
            **{name: get_format(self.format).quantize(torch.randn(shape) * 0.2) for name, shape in SHAPES.items()},
            "bias": {name: torch.randn(rows) if extra else None for name, (rows, _) in SHAPES.items()},
            "loras": [
                {
                    name: [
                        (torch.randn(r, columns), torch.randn(rows, r), 0.3 / r)
                        for r in ranks
                        if extra or name in ("k", "up", "down")
                    ]
                    for name, (rows, columns) in SHAPES.items()
                }
                for ranks in RANKS
            ],
            "norms": [torch.rand(n) + 0.5 for n in (HIDDEN, HIDDEN, *((CHANNELS, CHANNELS) if extra else ()))],
            "window": WINDOW if extra else 0,
        }

    def _plain(self, layer: dict[str, Any]) -> Layer:
        def there(tensor: Tensor) -> Tensor:
            return tensor.to(self.device)

        biases = {name: None if bias is None else there(bias) for name, bias in layer["bias"].items()}
        linears = [
            Linear(layer[name].map(there), biases[name], self.int8) if name in layer else None for name in LINEARS
        ]
        return Layer(tuple(linears), tuple(map(there, layer["norms"])), layer["window"])

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
                rotated(rms(part.view(-1, CHANNELS), norm), cos, sin) for part, norm in ((q, norms[2]), (k, norms[3]))
            )
            keys, values = self.past[2 * index], self.past[2 * index + 1]
            keys[:, slots[-1]], values[:, slots[-1]] = k, v.view(-1, CHANNELS)
            seen = slots
            if layer["window"]:
                seen = torch.cat([slots[: row.front], slots[row.front :][-layer["window"] :]])
            keys, values = (part[:, seen].repeat_interleave(HEADS // GROUPS, 0) for part in (keys, values))
            shares = torch.softmax((keys @ q[:, :, None])[..., 0] / math.sqrt(CHANNELS), -1)
            x = x + project(layer, "o", choice, (shares[:, None] @ values).reshape(-1))
            normed = rms(x, norms[1])
            gate, up = project(layer, "gate", choice, normed), project(layer, "up", choice, normed)
            x = x + project(layer, "down", choice, torch.nn.functional.silu(gate) * up)
        return rms(x, self.norm.double())


def rms(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


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

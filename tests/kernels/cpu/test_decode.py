"""decode.c against the same decoder in float64."""

import math
from collections.abc import Callable
from functools import cache
from itertools import groupby

import pytest
import torch
from torch import Tensor

from qgraft.formats import PackedTensor, get_format
from qgraft.kernels.cpu import abi, decode

pytestmark = pytest.mark.usefixtures("native_kernels")

HIDDEN, INNER, HEADS, GROUPS, CHANNELS, CAPACITY, LAYERS = 64, 96, 4, 2, 32, 220, 2
WIDE, NARROW = HEADS * CHANNELS, GROUPS * CHANNELS
SHAPES = {
    "q": (WIDE, HIDDEN), "k": (NARROW, HIDDEN), "v": (NARROW, HIDDEN), "o": (HIDDEN, WIDE),
    "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
}  # fmt: skip
EPSILON, WINDOW = 1e-5, 9
RANKS = ((), (3, 16), (8,), (1,))  # of the adapters of some choices: one fills vectors


class Decoder:
    """Random layers, half of them with biases, a window and norms of the heads; and LoRAs on one product or all."""

    def __init__(self) -> None:
        self.held: decode.Held = []
        self.memory = torch.randn(2 * LAYERS, GROUPS, CAPACITY, CHANNELS)
        self.past = self.memory.double()
        self.norm = torch.rand(HIDDEN) + 0.5
        self.layers = [self._layer(index) for index in range(LAYERS)]
        self.array = (abi.DecoderLayer * LAYERS)(*(self._structure(i, layer) for i, layer in enumerate(self.layers)))
        self.model = abi.Decoder(
            LAYERS, HIDDEN, INNER, HEADS, GROUPS, CHANNELS, CAPACITY, EPSILON, CHANNELS**-0.5,
            self.norm.data_ptr(), self.array,
        )  # fmt: skip
        self.choices = [
            decode.adapters(
                [
                    [decode.lora(*lora, self.held) for lora in layer["loras"][choice][name]]
                    for layer in self.layers
                    for name in SHAPES
                ],
                self.held,
            )
            for choice in range(len(RANKS))
        ]

    def _layer(self, index: int) -> dict:
        extra = bool(index)
        return {
            **{name: get_format("q8_0").quantize(torch.randn(shape) * 0.2) for name, shape in SHAPES.items()},
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

    def _structure(self, index: int, layer: dict) -> abi.DecoderLayer:
        linears = [decode.linear(layer[name], layer["bias"][name], self.held) for name in SHAPES]
        norms = [tensor.data_ptr() for tensor in layer["norms"]]
        places = [self.memory[2 * index + part].data_ptr() for part in (0, 1)]
        return abi.DecoderLayer(*linears, *norms, *[None] * (4 - len(norms)), *places, layer["window"])

    def step(self, rows: list[decode.Row], choices: list[int], x: Tensor, angles: Tensor) -> None:
        """The step, of rows with these choices of adapters."""
        parts = [
            decode.Part(self.choices[choice] if choice else None, len(list(run))) for choice, run in groupby(choices)
        ]
        decode.step(self.model, parts, rows, x, angles.cos(), angles.sin())

    def expected(self, row: decode.Row, choice: int, x: Tensor, angle: Tensor) -> Tensor:
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


def project(layer: dict, name: str, choice: int, x: Tensor) -> Tensor:
    packed, bias = layer[name], layer["bias"][name]
    y = get_format(packed.format).dequantize(packed, torch.float64) @ x
    for A, B, scaling in layer["loras"][choice][name]:
        y = y + scaling * (B.double() @ (A.double() @ x))
    return y if bias is None else y + bias


def texts(lengths: list[tuple[int, int]]) -> list[decode.Row]:
    """Rows of texts, (tokens before, new ones) of each, in slots of no order; the third text has a prefix of 4 in front."""
    places, rows = torch.randperm(CAPACITY), []
    for number, (past, new) in enumerate(lengths):
        front = 4 if number == 2 else 0
        slots, places = places[: front + past + new], places[front + past + new :]
        if number % 2:
            slots = slots.sort().values  # spans of several slots
        rows += [decode.Row(slots, front + past + 1 + i, front) for i in range(new)]
    return rows


BATCHES = {  # texts of a step: (tokens before, new ones); and the choices of adapters of their rows
    "one": ([(20, 1)], [1]),
    "one alone": ([(0, 1)], [0]),
    "some": ([(3, 1), (30, 1), (8, 1)], [0, 2, 2]),
    "a prompt among others": ([(3, 1), (12, 1), (2, 13), (40, 1)], [1, 2, *[3] * 13, 0]),
    "more than lanes": ([(1, 1)] * 17, [n // 3 % 4 for n in range(17)]),
    "many": ([(2, 1), (0, 50), (30, 1)], [2, *[1] * 50, 3]),
}


def made(batch: str) -> tuple[Decoder, list[decode.Row], list[int], Tensor, Tensor]:
    """A decoder, and the rows, choices, x and angles of a step: the same ones each time."""
    torch.manual_seed(0)
    decoder, (lengths, choices) = Decoder(), BATCHES[batch]
    rows = texts(lengths)
    return decoder, rows, choices, torch.randn(len(rows), HIDDEN), torch.randn(len(rows), CHANNELS)


@cache
def judged(batch: str) -> tuple[Tensor, Tensor]:
    """What becomes of x, and of the keys and values."""
    decoder, rows, choices, x, angles = made(batch)
    want = torch.stack([decoder.expected(*each) for each in zip(rows, choices, x, angles, strict=True)])
    return want, decoder.past


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_step_is_that_of_the_decoder_in_float64(
    cpu_level: str, threads: Callable[[int], None], count: int, batch: str
) -> None:
    threads(count)
    decoder, rows, choices, x, angles = made(batch)
    want, memory = judged(batch)
    decoder.step(rows, choices, x, angles)
    torch.testing.assert_close(x.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoder.memory.double(), memory, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 9, 200])
def test_a_step_in_8_bits_is_near_that_in_float64(cpu_level: str, count: int) -> None:
    """Each row's numbers are rounded as they are, wherever it stands."""
    decoder = Decoder()
    for layer in decoder.array:
        for name in SHAPES:
            getattr(layer, name).int8 = 1
    slots = torch.arange(CAPACITY)
    rows = [decode.Row(slots[n % CAPACITY : n % CAPACITY + 1], 1) for n in range(count)]
    x, angles = torch.randn(len(rows), HIDDEN), torch.randn(len(rows), CHANNELS)
    want = torch.stack([decoder.expected(row, 0, *each) for row, *each in zip(rows, x, angles, strict=True)])
    decoder.step(rows, [0] * count, x, angles)
    assert 0 < float((x - want).norm() / want.norm()) < 0.03


def test_scores_far_apart_and_numbers_that_are_none(cpu_level: str) -> None:
    """exp below its range is 0, and a NaN of the input reaches every number of its row, and no other row."""
    decoder = Decoder()
    decoder.memory[:, :, :5] *= 1e3
    decoder.past = decoder.memory.double()
    rows = [decode.Row(torch.arange(6), 6), decode.Row(torch.arange(5, 9), 4)]
    x, angles = torch.randn(2, HIDDEN), torch.zeros(2, CHANNELS)
    want = decoder.expected(rows[0], 0, x[0], angles[0])
    decoder.step(rows[:1], [0], x[:1], angles[:1])
    torch.testing.assert_close(x[0].double(), want, rtol=1e-3, atol=1e-3)
    rows = [decode.Row(torch.arange(10), 10), decode.Row(torch.arange(10, 14), 4)]
    x[0, 3] = float("nan")
    decoder.step(rows, [0, 0], x, angles)
    assert bool(x[0].isnan().all()) and bool(x[1].isfinite().all())


@pytest.mark.parametrize("row", [
    decode.Row(torch.arange(4), 0), decode.Row(torch.tensor([0, -1]), 2), decode.Row(torch.tensor([CAPACITY, 0]), 2),
    decode.Row(torch.arange(4), 2, 2), decode.Row(torch.arange(4), 2, -1),
])  # fmt: skip
def test_no_place_for_the_token_is_an_error(row: decode.Row) -> None:
    x = torch.randn(1, HIDDEN)
    with pytest.raises(AssertionError):
        Decoder().step([row], [0], x, x[:, :CHANNELS])


def test_rows_that_are_not_what_they_say_are_refused() -> None:
    decoder, x = Decoder(), torch.randn(2, HIDDEN)
    row, angles = decode.Row(torch.arange(4), 4), torch.zeros(2, CHANNELS)
    for rows in ([row], [row, decode.Row(torch.arange(4), 5)], [row, decode.Row(torch.arange(4).int(), 2)]):
        with pytest.raises(ValueError, match="rows"):
            decoder.step(rows, [0, 0], x, angles)
    with pytest.raises(AssertionError):
        decoder.step([row, row], [0], x, angles)


def test_weights_that_are_not_what_they_say_are_refused() -> None:
    packed = get_format("q8_0").quantize(torch.randn(8, 64))
    with pytest.raises(ValueError, match="data"):
        decode.linear(PackedTensor("q8_0", (8, 96), (packed.parts[0],)), None, [])
    with pytest.raises(ValueError, match="bias"):
        decode.linear(packed, torch.zeros(7), [])
    with pytest.raises(ValueError, match="float32"):
        decode.linear(packed, torch.zeros(8, dtype=torch.float16), [])

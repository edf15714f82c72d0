"""decode.c against the same decoder in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qgraft.formats import PackedTensor, get_format
from qgraft.kernels.cpu import abi, decode

pytestmark = pytest.mark.usefixtures("native_kernels")

HIDDEN, INNER, HEADS, GROUPS, CHANNELS, CAPACITY, LAYERS = 64, 96, 4, 2, 32, 40, 2
WIDE, NARROW = HEADS * CHANNELS, GROUPS * CHANNELS
SHAPES = {
    "q": (WIDE, HIDDEN), "k": (NARROW, HIDDEN), "v": (NARROW, HIDDEN), "o": (HIDDEN, WIDE),
    "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
}  # fmt: skip
EPSILON = 1e-5


class Decoder:
    """Random layers, half of them with biases, LoRAs of two ranks (one fills vectors) and norms of the heads."""

    def __init__(self) -> None:
        self.held: decode.Held = []
        self.memory = torch.randn(2 * LAYERS, GROUPS, CAPACITY, CHANNELS)
        self.past = self.memory.double()
        self.norm = torch.rand(HIDDEN) + 0.5
        self.layers = [self._layer(index) for index in range(LAYERS)]
        self.array = (abi.DecoderLayer * LAYERS)(*(self._structure(i, layer) for i, layer in enumerate(self.layers)))
        self.model = abi.Decoder(
            LAYERS, HIDDEN, INNER, HEADS, GROUPS, CHANNELS, 16, CAPACITY, EPSILON, CHANNELS**-0.5,
            self.norm.data_ptr(), self.array,
        )  # fmt: skip

    def _layer(self, index: int) -> dict[str, object]:
        packed = {name: get_format("q8_0").quantize(torch.randn(shape) * 0.2) for name, shape in SHAPES.items()}
        extra = bool(index)
        return {
            **packed,
            "bias": {name: torch.randn(rows) if extra else None for name, (rows, _) in SHAPES.items()},
            "loras": {
                name: [(torch.randn(r, columns), torch.randn(rows, r), 0.1 * r) for r in (3, 16) if extra]
                for name, (rows, columns) in SHAPES.items()
            },
            "norms": [torch.rand(n) + 0.5 for n in (HIDDEN, HIDDEN, *((CHANNELS, CHANNELS) if extra else ()))],
        }

    def _structure(self, index: int, layer: dict) -> abi.DecoderLayer:
        linears = []
        for name in SHAPES:
            loras = [decode.lora(*parts, self.held) for parts in layer["loras"][name]]
            linears.append(decode.linear(layer[name], layer["bias"][name], loras, self.held))
        norms = [tensor.data_ptr() for tensor in layer["norms"]]
        places = [self.memory[2 * index + part].data_ptr() for part in (0, 1)]
        return abi.DecoderLayer(*linears, *norms, *[None] * (4 - len(norms)), *places)

    def expected(self, x: Tensor, cos: Tensor, sin: Tensor, position: int) -> Tensor:
        """The step in float64, which also writes its keys and values to self.past."""
        x, cos, sin = x.double(), cos.double(), sin.double()
        for index, layer in enumerate(self.layers):
            norms = [tensor.double() for tensor in layer["norms"]] + [None] * (4 - len(layer["norms"]))
            normed = rms(x, norms[0])
            q, k, v = (project(layer, name, normed) for name in ("q", "k", "v"))
            q, k = (
                rotated(rms(part.view(-1, CHANNELS), norm), cos, sin) for part, norm in ((q, norms[2]), (k, norms[3]))
            )
            keys, values = self.past[2 * index], self.past[2 * index + 1]
            keys[:, position], values[:, position] = k, v.view(-1, CHANNELS)
            keys, values = (part[:, : position + 1].repeat_interleave(HEADS // GROUPS, 0) for part in (keys, values))
            shares = torch.softmax((keys @ q[:, :, None])[..., 0] / math.sqrt(CHANNELS), -1)
            x = x + project(layer, "o", (shares[:, None] @ values).reshape(-1))
            normed = rms(x, norms[1])
            gate, up = project(layer, "gate", normed), project(layer, "up", normed)
            x = x + project(layer, "down", torch.nn.functional.silu(gate) * up)
        return rms(x, self.norm.double())


def rms(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def project(layer: dict, name: str, x: Tensor) -> Tensor:
    packed, bias = layer[name], layer["bias"][name]
    y = get_format(packed.format).dequantize(packed, torch.float64) @ x
    for A, B, scaling in layer["loras"][name]:
        y = y + scaling * (B.double() @ (A.double() @ x))
    return y if bias is None else y + bias


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_step_is_that_of_the_decoder_in_float64(cpu_level: str, threads: Callable[[int], None], count: int) -> None:
    threads(count)
    decoder = Decoder()
    for position in (0, 1, 6, CAPACITY - 1):
        x, angle = torch.randn(HIDDEN), torch.randn(CHANNELS)
        want = decoder.expected(x, angle.cos(), angle.sin(), position)
        decode.step(decoder.model, x, angle.cos(), angle.sin(), position)
        torch.testing.assert_close(x.double(), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decoder.memory.double(), decoder.past, rtol=1e-4, atol=1e-4)


def test_scores_far_apart_and_numbers_that_are_none(cpu_level: str) -> None:
    """exp below its range is 0, and a NaN of the input reaches every number of the output."""
    decoder = Decoder()
    decoder.memory[:, :, :5] *= 1e3
    decoder.past = decoder.memory.double()
    x, ones = torch.randn(HIDDEN), torch.ones(CHANNELS)
    want = decoder.expected(x, ones, 0 * ones, 5)
    decode.step(decoder.model, x, ones, 0 * ones, 5)
    torch.testing.assert_close(x.double(), want, rtol=1e-3, atol=1e-3)
    x[3] = float("nan")
    decode.step(decoder.model, x, ones, 0 * ones, 6)
    assert bool(x.isnan().all())


@pytest.mark.parametrize("position", [-1, CAPACITY])
def test_no_place_for_the_token_is_an_error(position: int) -> None:
    x = torch.randn(HIDDEN)
    with pytest.raises(AssertionError):
        decode.step(Decoder().model, x, x[:CHANNELS], x[:CHANNELS], position)


def test_weights_that_are_not_what_they_say_are_refused() -> None:
    packed = get_format("q8_0").quantize(torch.randn(8, 64))
    with pytest.raises(ValueError, match="data"):
        decode.linear(PackedTensor("q8_0", (8, 96), (packed.parts[0],)), None, [], [])
    with pytest.raises(ValueError, match="bias"):
        decode.linear(packed, torch.zeros(7), [], [])
    with pytest.raises(ValueError, match="float32"):
        decode.linear(packed, torch.zeros(8, dtype=torch.float16), [], [])

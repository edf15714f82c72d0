"""decode.c against the same decoder in float64."""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from decoder_float64 import CAPACITY, CHANNELS, HIDDEN, TestedDecoder, texts
from mixture_float64 import MIXTURES
from torch import Tensor

from qgraft.formats import PackedTensor, get_format
from qgraft.kernels.cpu import decode
from qgraft.kernels.decoder import Row

pytestmark = pytest.mark.usefixtures("native_kernels")
Decoder = partial(TestedDecoder, decode.Structures)

BATCHES = {  # texts of a step: (tokens before, new ones); and the choices of adapters of their rows
    "one": ([(20, 1)], [1]),
    "one alone": ([(0, 1)], [0]),
    "some": ([(3, 1), (30, 1), (8, 1)], [0, 2, 2]),
    "a prompt among others": ([(3, 1), (12, 1), (2, 13), (40, 1)], [1, 2, *[3] * 13, 0]),
    "more than lanes": ([(1, 1)] * 17, [n // 3 % 4 for n in range(17)]),
    "many": ([(2, 1), (0, 50), (30, 1)], [2, *[1] * 50, 3]),
}


def made(batch: str) -> tuple[TestedDecoder, list[Row], list[int], Tensor, Tensor]:
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
    got = decoder.step(rows, choices, x, angles)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoder.memory.double(), memory, rtol=1e-4, atol=1e-4)


OF_MIXTURES = {  # texts of a step as in BATCHES: one row, and as many of an expert as lanes, with several adapters
    "one": ([(20, 1)], [1]),
    "many": ([(2, 1), (0, 17), (30, 1)], [2, *[1] * 17, 3]),
}


def of_mixture(name: str, batch: str, **options: object) -> tuple[TestedDecoder, list[Row], list[int], Tensor, Tensor]:
    """As `made`, of a decoder whose second layer has experts."""
    torch.manual_seed(0)
    mixture, own = MIXTURES[name]
    decoder, (lengths, choices) = Decoder(mixture=mixture, **own, **options), OF_MIXTURES[batch]
    rows = texts(lengths)
    return decoder, rows, choices, torch.randn(len(rows), HIDDEN), torch.randn(len(rows), decoder.options.angles)


@cache
def judged_mixture(name: str, batch: str, **options: object) -> Tensor:
    """What becomes of x."""
    decoder, rows, choices, x, angles = of_mixture(name, batch, **options)
    return torch.stack([decoder.expected(*each) for each in zip(rows, choices, x, angles, strict=True)])


@pytest.mark.spread(30)
@pytest.mark.parametrize("batch", OF_MIXTURES)
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_those_of_float64(cpu_level: str, threads: Callable[[int], None], name: str, batch: str) -> None:
    """And the same bits whatever the number of threads."""
    want, results = judged_mixture(name, batch), []
    for count in (1, 3):
        threads(count)
        decoder, rows, choices, x, angles = of_mixture(name, batch)
        results.append(decoder.step(rows, choices, x, angles).clone())
        torch.testing.assert_close(results[-1].double(), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(*results)


@pytest.mark.parametrize("format", ["mxfp4", "chatglm-int8"])
def test_experts_in_other_formats(cpu_level: str, format: str) -> None:
    """With blocks, and with a scale for each row."""
    want = judged_mixture("clamped", "many", format=format)
    decoder, rows, choices, x, angles = of_mixture("clamped", "many", format=format)
    torch.testing.assert_close(decoder.step(rows, choices, x, angles).double(), want, rtol=1e-4, atol=1e-4)


def test_experts_in_8_bits_are_near_those_of_float64(cpu_level: str) -> None:
    want = judged_mixture("shared", "many")
    decoder, rows, choices, x, angles = of_mixture("shared", "many", int8=True)
    got = decoder.step(rows, choices, x, angles)
    assert 0 < float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("count", [1, 9, 200])
def test_a_step_in_8_bits_is_near_that_in_float64(cpu_level: str, count: int) -> None:
    """Each row's numbers are rounded as they are, wherever it stands."""
    decoder = Decoder(int8=True)
    slots = torch.arange(CAPACITY)
    rows = [Row(slots[n % CAPACITY : n % CAPACITY + 1], 1) for n in range(count)]
    x, angles = torch.randn(len(rows), HIDDEN), torch.randn(len(rows), CHANNELS)
    want = torch.stack([decoder.expected(row, 0, *each) for row, *each in zip(rows, x, angles, strict=True)])
    decoder.step(rows, [0] * count, x, angles)
    assert 0 < float((x - want).norm() / want.norm()) < 0.03


def test_scores_far_apart_and_numbers_that_are_none(cpu_level: str) -> None:
    """exp below its range is 0, and a NaN of the input reaches every number of its row, and no other row."""
    decoder = Decoder()
    decoder.memory[:, :, :5] *= 1e3
    decoder.past = decoder.memory.double()
    rows = [Row(torch.arange(6), 6), Row(torch.arange(5, 9), 4)]
    x, angles = torch.randn(2, HIDDEN), torch.zeros(2, CHANNELS)
    want = decoder.expected(rows[0], 0, x[0], angles[0])
    decoder.step(rows[:1], [0], x[:1], angles[:1])
    torch.testing.assert_close(x[0].double(), want, rtol=1e-3, atol=1e-3)
    rows = [Row(torch.arange(10), 10), Row(torch.arange(10, 14), 4)]
    x[0, 3] = float("nan")
    decoder.step(rows, [0, 0], x, angles)
    assert bool(x[0].isnan().all()) and bool(x[1].isfinite().all())


@pytest.mark.parametrize("row", [
    Row(torch.arange(4), 0), Row(torch.tensor([0, -1]), 2), Row(torch.tensor([CAPACITY, 0]), 2),
    Row(torch.arange(4), 2, 2), Row(torch.arange(4), 2, -1),
])  # fmt: skip
def test_no_place_for_the_token_is_an_error(row: Row) -> None:
    x = torch.randn(1, HIDDEN)
    with pytest.raises(AssertionError):
        Decoder().step([row], [0], x, x[:, :CHANNELS])


def test_rows_that_are_not_what_they_say_are_refused() -> None:
    decoder, x = Decoder(), torch.randn(2, HIDDEN)
    row, angles = Row(torch.arange(4), 4), torch.zeros(2, CHANNELS)
    for rows in ([row], [row, Row(torch.arange(4), 5)], [row, Row(torch.arange(4).int(), 2)]):
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

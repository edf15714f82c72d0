"""The C library itself, called through ctypes: every level that this CPU has, every format, bfloat16 rows."""

import ctypes
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraft.formats import FORMATS, PackedTensor, unpack
from qgraft.formats import dequantize as format_dequantize
from qgraft.kernels import reference
from qgraft.kernels.cpu import packed as native
from qgraft.kernels.cpu.abi import FORMAT_IDS, INT8_FORMATS, INT8_GRADIENT_FORMATS
from qgraft.kernels.cpu.library import has_int8_panels, has_panels, loaded
from qgraft.kernels.reference import linear_int8

MakePacked = Callable[..., PackedTensor]

pytestmark = pytest.mark.usefixtures("native_kernels")


def dequantize_bf16(packed: PackedTensor, threads: int = 1) -> Tensor:
    library = loaded()
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function = library.qgraft_dequantize_bf16
    function.argtypes = [i32, pointer, pointer, i64, i64, pointer, i32]
    rows, columns = packed.shape
    data, scale = native.stored(packed)
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    code = function(
        FORMAT_IDS[packed.format], data.data_ptr(), None if scale is None else scale.data_ptr(),
        rows, columns, out.data_ptr(), threads,
    )  # fmt: skip
    assert code == 0
    return out


def shapes(format: str) -> list[tuple[int, int]]:
    """Rows around the tiles of the products; columns of less, of just, of more than whole chunks of 32."""
    block = FORMATS[format].block_size
    if block > 2:
        return [(1, block), (5, 3 * block), (13, 1024), (2, 2048 + block)]
    return [(1, 2), (5, 32), (13, 50), (2, 1086)]


def test_every_level_unpacks_what_the_reference_does_bit_for_bit(cpu_level: str, random_packed: MakePacked) -> None:
    for format in FORMAT_IDS:
        for rows, columns in shapes(format):
            packed = random_packed(format, rows, columns)
            expected = format_dequantize(packed, torch.float32)
            got = native.dequantize(packed, torch.float32)
            assert torch.equal(got.view(torch.int32), expected.view(torch.int32)), (format, rows, columns)
            halves, got_halves = expected.bfloat16(), dequantize_bf16(packed)
            assert torch.equal(got_halves.view(torch.int16), halves.view(torch.int16)), (format, rows, columns)


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 8, 9, 16, 19, 25, 39, 40, 64])
def test_every_level_multiplies_few_rows_as_float64_does(cpu_level: str, batch: int, random_packed: MakePacked) -> None:
    for format in FORMAT_IDS:
        for rows, columns in shapes(format):
            packed = random_packed(format, rows, columns)
            w_OI, x = format_dequantize(packed, torch.float64), torch.randn(batch, columns)
            got = native._product(x, packed)
            bound = 2e-6 * (x.double().abs() @ w_OI.abs().T) + 1e-30
            assert bool(((got.double() - x.double() @ w_OI.T).abs() <= bound).all()), (format, rows, columns)


def test_a_row_wider_than_is_taken_at_a_time_is_multiplied_whole(cpu_level: str, random_packed: MakePacked) -> None:
    """As in decoding: one row of x, some thousand columns of which are put in the order of the codes."""
    for format in ("q4_0", "q4_1", "q8_0"):
        packed, x = random_packed(format, 6, 8224), torch.randn(1, 8224)
        w_OI = format_dequantize(packed, torch.float64)
        bound = 2e-6 * (x.double().abs() @ w_OI.abs().T) + 1e-30
        assert bool(((native._product(x, packed).double() - x.double() @ w_OI.T).abs() <= bound).all()), format


def test_one_row_of_numbers_far_apart_is_multiplied_as_float64_does(cpu_level: str, random_packed: MakePacked) -> None:
    """Off by at most 2^-21 of the largest in each group of 32 (gemv_digits.h); what is not finite reaches every number."""
    for format in INT8_FORMATS:
        packed = random_packed(format, 6, columns := 4096 + 2 * max(FORMATS[format].block_size, 32))
        w_OI = format_dequantize(packed, torch.float64)
        ramp, x = torch.randn(columns) * torch.logspace(-3, 3, columns), torch.randn(columns)
        x[32:64], x[64:96], x[96:128] = 0.0, 1e-35, 1e30
        for row in (ramp[None], ramp[torch.randperm(columns)][None], x[None]):
            bound = 2e-6 * (row.double().abs() @ w_OI.abs().T) + 2.0**-21 * largest_of_runs(row.double()) @ w_OI.abs().T
            error = native._product(row, packed).double() - row.double() @ w_OI.T
            assert bool((error.abs() <= bound + 1e-30).all()), format
        for bad in (torch.nan, torch.inf, -torch.inf):
            x[-1] = bad
            assert not native._product(x[None], packed).isfinite().any(), format


@pytest.mark.parametrize("batch", [96, 101, 250])
def test_every_level_multiplies_many_rows_as_float64_does(
    cpu_level: str, batch: int, random_packed: MakePacked, threads: Callable[[int], None]
) -> None:
    """Whole panels, a rest of rows, of columns and of tokens, several panels deep; the same bits by 1 and 3 threads.

    More rows than a block has, and more tokens.
    """
    for format in FORMAT_IDS:
        for rows, columns in (*shapes(format), (130, 512), (600, 256)):
            packed = random_packed(format, rows, columns)
            w_OI, x = format_dequantize(packed, torch.float64), torch.randn(batch, columns)
            threads(1)
            got = native._product(x, packed)
            bound = 3e-6 * (x.double().abs() @ w_OI.abs().T) + 1e-30
            assert bool(((got.double() - x.double() @ w_OI.T).abs() <= bound).all()), (format, rows, columns)
            threads(3)
            assert torch.equal(native._product(x, packed), got)


@pytest.mark.parametrize("batch", [0, 1, 5, 6, 7, 33, 300])
def test_every_level_takes_gradients_as_float64_does(
    cpu_level: str, batch: int, random_packed: MakePacked, threads: Callable[[int], None]
) -> None:
    for format in FORMAT_IDS:
        for rows, columns in (*shapes(format), (200, 512), (300, 768)):
            packed = random_packed(format, rows, columns)
            w_OI, g = format_dequantize(packed, torch.float64), torch.randn(batch, rows)
            if cpu_level == "plain":  # left to sgemm
                assert not has_panels()
                continue
            threads(1)
            got = native._product(g, packed, backward=True)
            bound = 3e-6 * (g.double().abs() @ w_OI.abs()) + 1e-30
            assert bool(((got.double() - g.double() @ w_OI).abs() <= bound).all()), (format, rows, columns)
            threads(3)
            assert torch.equal(native._product(g, packed, backward=True), got)


def test_a_row_does_not_depend_on_how_many_rows_there_are(cpu_level: str, random_packed: MakePacked) -> None:
    """What the cache of frozen layers rests on, see passes/frozen_cache.py."""
    packed = random_packed("q4_1", 130, 160)
    x = torch.randn(400, 160)
    expected = native._product(x, packed)
    for rows in (96, 97, 200, 211):
        assert torch.equal(native._product(x[-rows:], packed), expected[-rows:])


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 5, 8, 33])
def test_every_level_multiplies_8_bit_activations_as_the_reference_does(
    cpu_level: str, batch: int, random_packed: MakePacked
) -> None:
    """Groups of very different size in one token, a token of zeros, tiny groups, ties of the rounding.

    And within half a step of each group, max |x| / 254, of the product in float64.
    """
    for format in INT8_FORMATS:
        for rows, columns in shapes(format):
            packed = random_packed(format, rows, columns)
            x = torch.randn(batch, columns) * torch.logspace(-3, 3, columns)
            x[:1, ::7] = 1e-38
            x[1:2] = 0.0
            x[2:3] = torch.arange(columns).remainder(255).sub(127) / 2.0
            expected, got, w_OI = (
                linear_int8(x, packed),
                native.linear_int8(x, packed),
                format_dequantize(packed, torch.float64),
            )
            bound = 3e-6 * (x.double().abs() @ w_OI.abs().T) + 1e-30
            assert bool(((got - expected).abs() <= bound).all()), (format, rows, columns)
            bound += 0.501 * largest_of_runs(x.double()) / 127 @ w_OI.abs().T
            assert bool(((got - x.double() @ w_OI.T).abs() <= bound).all()), (format, rows, columns)


def parts_of(packed: PackedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """|q|, |d| and |m| of w = d q + m with q around 0, [out, in] in float64: what is rounded, and how far."""
    grid = unpack(packed)
    d, offsets = grid.spread(grid.steps().double()), grid.offsets()
    middle = 0 if offsets is None else (grid.high + 1) // 2
    m = torch.zeros_like(d) if offsets is None else grid.spread(offsets.double()) + middle * d
    return (grid.values().double() - middle).abs(), d.abs(), m.abs()


def largest_of_runs(values_NO: Tensor) -> Tensor:
    """Each number's largest neighbour in its run of 32, [n, out]."""
    runs = F.pad(values_NO.abs(), (0, -values_NO.shape[1] % 32)).unflatten(1, (-1, 32))
    return runs.amax(dim=2, keepdim=True).expand_as(runs).flatten(1)[:, : values_NO.shape[1]]


def check_int8(packed: PackedTensor, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Products and gradients of many rows in 8 bits: the reference's but for float32 sums, those of float64 but for rounding.

    Rounding to steps of max |g| max |d| / 127, in a run of 32 rows, is off by half a step, and by 3 / 256 of one for the 16
    bits before (reference.linear_grad_input_int8); half a step of 2^-11 max |m|, and of 2^-15 max |g|, for the minimums.
    """
    q, d, m = parts_of(packed)
    w_OI, whole = format_dequantize(packed, torch.float64), q * d + m
    y, step = native.linear_int8(x, packed), largest_of_runs(x.double()) / 127
    sums = 3e-6 * (x.double().abs() @ whole.T) + 1e-30
    assert bool(((y - reference.linear_int8(x, packed)).abs() <= sums).all())
    assert bool(((y - x.double() @ w_OI.T).abs() <= 0.501 * step @ w_OI.abs().T + sums).all())
    if packed.format not in INT8_GRADIENT_FORMATS or not has_int8_panels() or len(g) < native.FEW_ROUNDED:
        return (y,)
    gx, g64 = native.linear_grad_input_int8(g, packed), g.double()
    sums, most_g = 3e-6 * (g64.abs() @ whole) + 1e-30, largest_of_runs(g64)
    assert bool(((gx - reference.linear_grad_input_int8(g, packed)).abs() <= sums).all())
    bound = 0.512 / 127 * most_g @ (q * largest_of_runs(d.T).T)
    bound += most_g / 65000 @ m + g64.abs() @ largest_of_runs(m.T).T / 4000
    assert bool(((gx - g64 @ w_OI).abs() <= bound + sums).all())
    return y, gx


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    format=st.sampled_from(INT8_FORMATS), rows=st.integers(1, 330), blocks=st.integers(1, 5), rest=st.integers(0, 15),
    tokens=st.integers(10, 300), seed=st.integers(0, 9),
)  # fmt: skip
def test_8_bit_products_and_gradients_of_many_rows(
    format: str, rows: int, blocks: int, rest: int, tokens: int, seed: int, random_packed: MakePacked,
    threads: Callable[[int], None],
) -> None:  # fmt: skip
    """Any shape, sizes that differ a hundredfold within a token; the same bits by 1 and 3 threads, and alone."""
    if not has_int8_panels():
        pytest.skip("this level has none")
    block = FORMATS[format].block_size
    packed = random_packed(format, rows, blocks * (block if block > 2 else 64) + (2 * rest if block <= 2 else 0))
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(tokens, n, generator=generator) * torch.logspace(-1, 1, n) for n in packed.shape[::-1])
    threads(1)
    results = check_int8(packed, x, g)
    threads(3)
    assert all(torch.equal(one, three) for one, three in zip(results, check_int8(packed, x, g), strict=True))
    assert torch.equal(native.linear_int8(x[-8:], packed), results[0][-8:])
    if len(results) == 2:
        assert torch.equal(native.linear_grad_input_int8(g[-10:], packed), results[1][-10:])


@pytest.mark.parametrize("format", INT8_GRADIENT_FORMATS)
def test_8_bit_gradients_of_zeros_tiny_and_bad_numbers(format: str, random_packed: MakePacked) -> None:
    """Each in a token of its own: zeros and what is below 2^-100 give zero, one NaN or infinity the whole token NaN."""
    if not has_int8_panels():
        pytest.skip("this level has none")
    packed = random_packed(format, 70, 256)
    g = torch.randn(12, 70)
    g[1], g[2] = 0.0, 1e-38
    g[3, 40], g[4, 69], g[5, 0] = torch.nan, torch.inf, -torch.inf
    for multiply in (native.linear_grad_input_int8, reference.linear_grad_input_int8):
        gx = multiply(g, packed)
        assert gx[1:3].abs().max() == 0.0
        assert gx.isnan().any(dim=1).tolist() == gx.isnan().all(dim=1).tolist() == [3 <= t <= 5 for t in range(12)]


@pytest.mark.parametrize("batch", [2, 16])
def test_8_bit_sums_of_the_largest_codes_do_not_overflow(cpu_level: str, batch: int, random_packed: MakePacked) -> None:
    """16 bits hold the sum of 32 products of 5 bits, just: every code the lowest or highest, all of x and g at the limit."""
    for format in INT8_FORMATS:
        packed = random_packed(format, 64, 256)
        for byte in (0x00, 0x88, 0x77, 0xFF, 0x80, 0x7F):
            data = torch.full_like(packed.parts[0].view(torch.uint8), byte)
            if len(packed.parts) == 1:
                halves = {"q6_k": [208], "q4_1": [0, 2], "q5_1": [0, 2], "q4_k": [0, 2], "q5_k": [0, 2]}.get(
                    format, [0]
                )
                for blocks in data.view(-1, FORMATS[format].nbytes(1, FORMATS[format].block_size)):
                    for at in halves:
                        blocks[at : at + 2] = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
            same = PackedTensor(format, packed.shape, (data.view(packed.parts[0].dtype), *packed.parts[1:]))
            signs = torch.tensor([[1.0], [-1.0]]).repeat(batch // 2, 1)
            check_int8(same, signs.expand(-1, 256).contiguous(), signs.expand(-1, 64).contiguous())


def test_8_bit_products_are_near_the_float_ones(cpu_level: str, random_packed: MakePacked) -> None:
    for format in INT8_FORMATS:
        packed = random_packed(format, 64, 512)
        x = torch.randn(9, 512)
        exact = x.double() @ format_dequantize(packed, torch.float64).T
        error = native.linear_int8(x, packed).double() - exact
        assert 1e-4 < float(error.norm() / exact.norm()) < 1e-2, format


def test_8_bit_codes_are_exact_where_x_is_a_multiple_of_its_step(cpu_level: str, random_packed: MakePacked) -> None:
    """Whole numbers up to 127 lose nothing: what is left is the rounding of a float32 sum."""
    for format in INT8_FORMATS:
        packed = random_packed(format, 7, columns := 3 * max(FORMATS[format].block_size, 32))
        x = torch.randint(-127, 128, (6, columns)).float()
        x[:, ::32] = 127.0
        w_OI = format_dequantize(packed, torch.float64)
        bound = 2e-6 * (x.double().abs() @ w_OI.abs().T)
        assert bool(((native.linear_int8(x, packed).double() - x.double() @ w_OI.T).abs() <= bound).all()), format


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_8_bit_products_of_a_token_that_is_not_finite_are_nan(
    cpu_level: str, bad: float, random_packed: MakePacked
) -> None:
    for format in INT8_FORMATS:
        packed = random_packed(format, 5, columns := 2 * max(FORMATS[format].block_size, 32))
        x = torch.randn(3, columns)
        x[1, 40] = bad
        for multiply in (native.linear_int8, linear_int8):
            assert multiply(x, packed).isnan().all(dim=1).tolist() == [False, True, False], format


def test_results_of_a_level_do_not_depend_on_the_number_of_threads(
    cpu_level: str, random_packed: MakePacked, threads: Callable[[int], None]
) -> None:
    for format in INT8_FORMATS:
        packed, x = random_packed(format, 333, 256), torch.randn(5, 256)
        results = []
        for count in (1, 2):
            threads(count)
            results.append((native.linear_int8(x, packed), native._product(x, packed)))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_bf16_rounds_ties_to_even_and_keeps_nan_and_infinity(cpu_level: str) -> None:
    """A row scale of every upper half of a float32, with lower halves around the tie; weight 1."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    scale = (torch.arange(-32768, 32768, dtype=torch.int32)[:, None] * 65536 + low).view(torch.float32).flatten()
    ones = torch.ones(scale.numel(), 33, dtype=torch.int8)  # a whole chunk and one column more
    got_33 = dequantize_bf16(PackedTensor("chatglm-int8", tuple(ones.shape), (ones, scale)))
    got, expected = got_33[:, 0], scale.bfloat16()
    assert torch.equal(got_33.view(torch.int16), got.view(torch.int16)[:, None].expand(-1, 33))
    assert torch.equal(got.isnan(), scale.isnan())
    number = ~scale.isnan()
    assert torch.equal(got[number].view(torch.int16), expected[number].view(torch.int16))


def test_bf16_of_an_unknown_format_is_an_error_code() -> None:
    assert loaded().qgraft_dequantize_bf16(99, None, None, 1, 32, None, 1) == -1


def test_sanitizers_see_a_read_past_the_end() -> None:
    """That `make sanitize` finds what it is for."""
    if not hasattr(loaded(), "__asan_init"):
        pytest.skip("this library is built without sanitizers")
    code = """
import torch
from qgraft.kernels.cpu.library import loaded
data, out = torch.zeros(34, dtype=torch.uint8), torch.empty(64)
loaded().qgraft_dequantize(4, data.data_ptr(), None, {rows}, 32, out.data_ptr(), 1)
"""
    for rows in (1, 2):
        command = [sys.executable, "-c", code.format(rows=rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == (rows == 1)
        assert ("AddressSanitizer: heap-buffer-overflow" in done.stderr) == (rows == 2)

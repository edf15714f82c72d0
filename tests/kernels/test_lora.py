"""A packed layer with LoRAs in one C call, on every level of CPU, against the formulas in float64."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from qgraft.formats import FORMATS, PackedTensor
from qgraft.formats import dequantize as format_dequantize
from qgraft.kernels import linear_grad_input_int8, linear_int8
from qgraft.kernels.cpu.abi import FORMAT_IDS
from qgraft.kernels.cpu.library import has_bf16, has_panels
from qgraft.kernels.lora import lora_backward, lora_forward
from qgraft.kernels.summed_lora import casts_kept, kept_casts
from qgraft.kernels.summed_lora import lora_backward as summed_backward
from qgraft.kernels.summed_lora import lora_forward as summed_forward
from qgraft.kernels.terms import Grads, Term, Weight

MakePacked = Callable[..., PackedTensor]

pytestmark = pytest.mark.usefixtures("native_kernels")


def make_terms(x_NI: Tensor, outputs: int, ranks: tuple[int, ...]) -> list[Term]:
    """LoRAs on equal shares of the tokens, one after another; the last tokens are left without one."""
    share, inputs = len(x_NI) // (len(ranks) + 1) if len(ranks) > 1 else len(x_NI), x_NI.shape[1]
    return [
        Term(
            n * share, (n + 1) * share, 0.5 + n, torch.randn(r, inputs), torch.randn(outputs, r),
            x_NI[n * share : (n + 1) * share],
        )
        for n, r in enumerate(ranks)
    ]  # fmt: skip


def by_formula(
    x_NI: Tensor, g_NO: Tensor, w_OI: Tensor, bias: Tensor, terms: list[Term]
) -> tuple[Tensor, Tensor, list[Grads]]:
    """y, gx and each term's gradients in float64."""
    x_NI, g_NO, w_OI = (tensor.double() for tensor in (x_NI, g_NO, w_OI))
    y_NO, gx_NI, grads = x_NI @ w_OI.T + bias, g_NO @ w_OI, []
    for term in terms:
        rows, A, B = slice(term.start, term.stop), term.A.double(), term.B.double()
        h, gh = x_NI[rows] @ A.T, term.scaling * g_NO[rows] @ B
        y_NO[rows] += term.scaling * h @ B.T
        gx_NI[rows] += gh @ A
        grads.append(Grads(gh.T @ x_NI[rows], term.scaling * g_NO[rows].T @ h, gh))
    return y_NO, gx_NI, grads


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * largest)


def shapes(format: str) -> list[tuple[int, int]]:
    """Outputs and inputs: less than, just, and more than blocks of 64 outputs and 32 inputs; several panels deep."""
    block = FORMATS[format].block_size
    return [(5, block), (64, max(block, 96)), (201, 512)] if block > 2 else [(5, 2), (64, 96), (201, 330)]


@pytest.mark.spread(44)
@pytest.mark.parametrize("tokens", [0, 1, 7, 21, 100, 230])
@pytest.mark.parametrize("ranks", [(), (1,), (8,), (3, 17)], ids=str)
def test_every_level_computes_the_formulas(
    cpu_level: str, tokens: int, ranks: tuple[int, ...], random_packed: MakePacked, threads: Callable[[int], None]
) -> None:
    for format in ("q4_1", "q6_k", "chatglm-int4"):
        for outputs, inputs in shapes(format):
            packed, bias = random_packed(format, outputs, inputs), torch.randn(outputs)
            x_NI, g_NO = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
            terms = make_terms(x_NI, outputs, ranks)
            y, gx, grads = by_formula(x_NI, g_NO, format_dequantize(packed, torch.float32), bias, terms)
            results = []
            for count in (1, 3):
                threads(count)
                got_y, hs = lora_forward(x_NI, Weight(packed, bias, "float32"), terms)
                got_gx, got_grads = lora_backward(g_NO, Weight(packed, None, "float32"), terms, hs)
                results.append([got_y, got_gx, *(tensor for own in got_grads for tensor in own)])
            expected = [y, gx, *(tensor for own in grads for tensor in own)]
            for one, three, right in zip(*results, expected, strict=True):
                if has_panels():  # else torch computes
                    assert torch.equal(one, three), "the same bits whatever the threads"
                assert_close(one, right, 3e-6)


@pytest.mark.parametrize("tokens", [9, 10, 64, 230])
def test_bfloat16_products_are_those_of_rounded_numbers(cpu_level: str, tokens: int, random_packed: MakePacked) -> None:
    """Where whole blocks are: the last outputs and inputs, and few tokens, are computed in float32."""
    if not has_bf16():
        pytest.skip("no bfloat16 on this level")
    for format in FORMAT_IDS:
        packed, bias = random_packed(format, 192, 512), torch.randn(192)
        x_NI, g_NO = torch.randn(tokens, 512), torch.randn(tokens, 192)
        terms = make_terms(x_NI, 192, (8,))
        got_y, hs = lora_forward(x_NI, Weight(packed, bias, "bf16"), terms)
        got_gx, grads = lora_backward(g_NO, Weight(packed, None, "bf16"), terms, hs)
        w_OI, exact = format_dequantize(packed, torch.float32), by_formula
        few = tokens < 10
        rounded = [t if few else t.bfloat16().float() for t in (x_NI, g_NO, w_OI)]
        y, gx, _ = exact(*rounded, bias, [])
        delta, gx_delta, expected = exact(x_NI, g_NO, torch.zeros_like(w_OI), torch.zeros(192), terms)
        assert_close(got_y, y + delta, 3e-6)
        assert_close(got_gx, gx + gx_delta, 3e-6)
        for own, right in zip(grads, expected, strict=True):
            for got, wanted in zip(own, right, strict=True):
                assert_close(got, wanted, 3e-6)


@pytest.mark.parametrize("tokens", [1, 9, 10, 64, 230])
@pytest.mark.parametrize("format", ["q4_1", "q8_0", "q6_k", "f16"])
def test_8_bit_products_with_loras_are_those_of_the_ops(
    cpu_level: str, tokens: int, format: str, random_packed: MakePacked
) -> None:
    """In one call where the level has it, else in two: what the LoRAs add is not rounded."""
    packed, bias = random_packed(format, 201, 512), torch.randn(201)
    x_NI, g_NO = torch.randn(tokens, 512), torch.randn(tokens, 201)
    terms = make_terms(x_NI, 201, (8,))
    y, hs = lora_forward(x_NI, Weight(packed, bias, "int8"), terms)
    gx, grads = lora_backward(g_NO, Weight(packed, None, "int8"), terms, hs)
    delta, gx_delta, expected = by_formula(x_NI, g_NO, torch.zeros(201, 512), bias, terms)
    assert_close(y, linear_int8(x_NI, packed) + delta, 3e-6)
    assert_close(gx, linear_grad_input_int8(g_NO, packed) + gx_delta, 3e-6)
    for got, wanted in zip(grads[0], expected[0], strict=True):
        assert_close(got, wanted, 3e-6)


def test_a_product_from_elsewhere_is_added_to(random_packed: MakePacked) -> None:
    """What QuantizedLinear does for 8-bit products, and LoRA on nn.Linear."""
    packed = random_packed("q4_1", 70, 96)
    x_NI, g_NO = torch.randn(33, 96), torch.randn(33, 70)
    terms, w_OI = make_terms(x_NI, 70, (4, 2)), format_dequantize(packed, torch.float32)
    y, gx, grads = by_formula(x_NI, g_NO, w_OI, torch.zeros(70), terms)
    got_y, hs = lora_forward(x_NI, x_NI @ w_OI.T, terms)
    got_gx, got_grads = lora_backward(g_NO, g_NO @ w_OI, terms, hs)
    none, same_grads = lora_backward(g_NO, None, terms, hs)
    assert none is None
    assert_close(got_y, y, 3e-6)
    assert_close(got_gx, gx, 3e-6)
    for own, same, right in zip(got_grads, same_grads, grads, strict=True):
        for got, again, wanted in zip(own, same, right, strict=True):
            assert_close(got, wanted, 3e-6)
            assert torch.equal(got, again)


@pytest.mark.parametrize("compute", ["float32", "bf16", "int8"])
def test_nan_stays_in_its_token_and_in_its_term(compute: str, random_packed: MakePacked) -> None:
    packed = random_packed("q4_1", 128, 96)
    x_NI, g_NO = torch.randn(60, 96), torch.randn(60, 128)
    x_NI[3, 5] = g_NO[3, 5] = torch.nan
    terms = make_terms(x_NI, 128, (4, 2))
    y, hs = lora_forward(x_NI, Weight(packed, None, compute), terms)
    gx, grads = lora_backward(g_NO, Weight(packed, None, compute), terms, hs)
    for got in (y, gx):
        assert got.isnan().any(dim=1).nonzero().flatten().tolist() == [3]
    assert grads[0].A.isnan().any()
    assert not any(tensor.isnan().any() for tensor in grads[1])


def test_a_token_is_the_same_bits_whatever_else_is_in_the_pass(cpu_level: str, random_packed: MakePacked) -> None:
    """What the cache of frozen layers rests on, see passes/frozen_cache.py: `least_tokens`."""
    if not has_panels():
        pytest.skip("the plain level leaves this to torch")
    packed, x_NI = random_packed("q4_1", 130, 160), torch.randn(300, 160)
    for compute in ("float32", "int8", *(("bf16",) if has_bf16() else ())):
        weight = Weight(packed, None, compute)
        expected, _ = lora_forward(x_NI, weight, [])
        for tokens in (20, 31, 97, 211):
            assert torch.equal(lora_forward(x_NI[-tokens:], weight, [])[0], expected[-tokens:])


def test_an_input_of_another_width_is_refused(random_packed: MakePacked) -> None:
    with pytest.raises(ValueError, match=r"got an input \[3, 64\], expected \[tokens, 96\]"):
        lora_forward(torch.randn(3, 64), Weight(random_packed("q4_1", 70, 96), None, "float32"), [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(1,), (8,), (17,), (3, 17)], ids=str)
@pytest.mark.parametrize("format", ["q4_1", "q6_k", "chatglm-int4", "f16"])
def test_the_sum_in_half_precision_computes_the_formulas(
    format: str, ranks: tuple[int, ...], dtype: torch.dtype, random_packed: MakePacked
) -> None:
    """What a GPU runs in half precision, here with plain torch on the CPU."""
    packed = random_packed(format, 201, 512)
    x_NI, g_NO, bias = torch.randn(100, 512).to(dtype), torch.randn(100, 201).to(dtype), torch.randn(201).to(dtype)
    terms = make_terms(x_NI, 201, ranks)
    y, gx, grads = by_formula(x_NI, g_NO, format_dequantize(packed, torch.float64), bias, terms)
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    got_y, hs = summed_forward(x_NI, Weight(packed, bias, "float32"), terms)
    got_gx, got_grads = summed_backward(g_NO, Weight(packed, None, "float32"), terms, hs)
    assert got_gx is not None and got_y.dtype == got_gx.dtype == dtype
    assert_close(got_y, y, tolerance)
    assert_close(got_gx, gx, tolerance)
    for mine, theirs in zip(got_grads, grads, strict=True):
        assert mine.A.dtype == mine.B.dtype == torch.float32
        for a, b in zip(mine, theirs, strict=True):
            assert_close(a, b, tolerance)


def test_the_sum_keeps_a_delta_that_rounding_would_lose(random_packed: MakePacked) -> None:
    """A thousandth of y: added to a rounded y most of it is gone, in one sum none."""
    packed, x_NI = random_packed("q4_1", 256, 512), torch.randn(200, 512).bfloat16()
    base = x_NI.double() @ format_dequantize(packed, torch.bfloat16).double().T
    term = Term(0, 200, 1.0, torch.randn(8, 512) / 512**0.5, torch.randn(256, 8) * float(base.std()) * 3e-4, x_NI)
    h = (x_NI @ term.A.bfloat16().T).double()
    delta = h @ term.B.bfloat16().double().T

    def kept(y: Tensor, y_base: Tensor) -> float:
        """The share of the delta that is in y - y_base, in the direction of the delta."""
        return float(((y.double() - y_base.double()) * delta).sum() / delta.square().sum())

    y, _ = summed_forward(x_NI, Weight(packed, None, "float32"), [term])
    exact = base + delta
    assert float((y.double() - exact).norm() / exact.norm()) < 2e-3
    assert kept(y, base) == pytest.approx(1.0, abs=0.1)


def test_a_broken_lora_stays_in_its_own_rows_of_the_sum(random_packed: MakePacked) -> None:
    packed, x_NI = random_packed("q4_1", 64, 96), torch.randn(90, 96).bfloat16()
    terms = make_terms(x_NI, 64, (4, 4))
    expected, _ = summed_forward(x_NI, Weight(packed, None, "float32"), terms)
    terms[0].B[3, 1] = torch.nan
    y, _ = summed_forward(x_NI, Weight(packed, None, "float32"), terms)
    assert bool(y[:30].isnan().any()) and torch.equal(y[30:], expected[30:])


def test_casts_are_kept_within_a_block_and_no_longer(random_packed: MakePacked) -> None:
    packed, x_NI = random_packed("q4_1", 64, 96), torch.randn(30, 96).bfloat16()
    (term,), base = make_terms(x_NI, 64, (4,)), Weight(packed, None, "float32")
    first, _ = summed_forward(x_NI, base, [term])
    with casts_kept():
        assert torch.equal(summed_forward(x_NI, base, [term])[0], first)
        term.B.mul_(2)  # what no step of training does between its passes
        assert torch.equal(summed_forward(x_NI, base, [term])[0], first)
    assert not torch.equal(summed_forward(x_NI, base, [term])[0], first)


def test_casts_are_those_of_their_thread_and_of_the_pass_forward(random_packed: MakePacked) -> None:
    """Blocks of two threads that overlap: neither sees what the other keeps, nor does one outlive its block."""
    packed, x_NI = random_packed("q4_1", 64, 96), torch.randn(30, 96).bfloat16()
    (term,), base = make_terms(x_NI, 64, (4,)), Weight(packed, None, "float32")
    with casts_kept():
        summed_forward(x_NI, base, [term])
        here = kept_casts()
        assert here is not None and len(here) == 2
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(kept_casts).result() is None
            thread.submit(casts_kept().__enter__).result()
        assert kept_casts() is here
        with casts_kept(here):  # as a backward pass does in a thread of autograd
            summed_forward(x_NI, base, [term])
        assert len(here) == 2
    assert kept_casts() is None

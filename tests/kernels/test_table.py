"""The table of kernels: every row has a reference, and every kernel of it computes what the reference does."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from qgraft.formats import PackedTensor
from qgraft.kernels import KERNELS_VARIABLE, choose, reference, triton_ops
from qgraft.kernels.experts import ExpertTerm, Projection, Rows
from qgraft.kernels.grouped import Product
from qgraft.kernels.pointwise import ACTIVATIONS
from qgraft.kernels.table import PACKED_OPS, ROWS, Kernel, Row
from qgraft.kernels.terms import Term, Weight

Case = Callable[[Any, PackedTensor], Any]  # (a module with the row's functions, a packed weight) -> what they give
TOKENS, OUTPUTS, INPUTS = 12, 96, 64


def _lora(module: Any, packed: PackedTensor, compute: str = "float32") -> Any:
    """Kernels multiply with the weight in the same call, the reference adds to its product."""
    rounded = "_int8" if compute == "int8" else ""
    product, gradient = (getattr(reference, op + rounded) for op in ("linear", "linear_grad_input"))
    x, g = torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, OUTPUTS)
    term = Term(0, TOKENS, 0.5, torch.randn(4, INPUTS), torch.randn(OUTPUTS, 4), x)
    plain, weight = module is reference, Weight(packed, None, compute)
    y, hs = module.lora_forward(x, product(x, packed) if plain else weight, [term])
    gx, grads = module.lora_backward(g, gradient(g, packed) if plain else weight, [term], hs)
    return y, *hs, gx, *grads[0]


def _norm(module: Any, packed: PackedTensor) -> Any:
    x, weight, g = torch.randn(TOKENS, 33), torch.rand(33) + 0.5, torch.randn(TOKENS, 33)
    y, r = module.norm(x, weight, 1e-6)
    return y, r, module.normalized(x, weight, r), module.norm_backward(g, x, weight, r)


def _gated(module: Any, packed: PackedTensor) -> Any:
    gate, up, g = torch.randn(3, TOKENS, 33)
    for act in ACTIVATIONS:
        yield module.gated(act, gate, up, None, torch.float32)
        yield from module.gated_backward(act, g, gate, up)


def _rotate(module: Any, packed: PackedTensor) -> Any:
    q, k = torch.randn(1, 4, TOKENS, 16), torch.randn(1, 2, TOKENS, 16)
    cos, sin = torch.randn(2, 1, TOKENS, 12)
    return *module.rotate(q, k, cos, sin, False), *module.rotate(q, k, cos, sin, True)


def _attention(module: Any, packed: PackedTensor) -> Any:
    q, k, v = (torch.randn(1, heads, TOKENS, 16, requires_grad=True) for heads in (4, 2, 2))
    out = module.attend(q, k, v, torch.tensor([0, 3, TOKENS]), window=2)
    return out, *torch.autograd.grad(out, (q, k, v), torch.randn(1, TOKENS, 4, 16))


def _cross_entropy(module: Any, packed: PackedTensor) -> Any:
    logits, targets = torch.randn(TOKENS, 33), torch.randint(0, 33, (TOKENS,))
    return module.loss_to_gradient(logits, targets, 0.1), logits


def _descend(module: Any, packed: PackedTensor) -> Any:
    block, rows = 33, 50
    factor = torch.randn(block, block)
    codes, steps = torch.randint(-9, 8, (block, rows)).float(), torch.rand(block, rows).sub_(0.2)
    steps[:, 3] = 0.0
    return module.descend(torch.randn(block, rows), codes, steps, factor @ factor.T / block, -7, 7), codes


def _grouped(module: Any, packed: PackedTensor) -> Any:
    """Three experts of 32 outputs, one of them without rows; each kind of product on few and on many rows."""
    groups = [(0, 0, 3), (2, 3, TOKENS + 15)]
    for compute in ("float32", "int8"):
        for backward, width in ((False, INPUTS), (True, OUTPUTS // 3)):
            xs = [torch.randn(TOKENS + 15, width) for _ in range(2)]
            yield module.grouped_linear(xs, [packed, packed], 3, groups, Product(backward, compute))


def _experts(module: Any, packed: PackedTensor) -> Any:
    """The same experts with LoRAs on all tokens and on some; few rows, and many, in parts of two stacks that alternate."""
    for tokens in (1, 5):
        chosen_TK = torch.arange(2 * tokens).view(-1, 2) % 2 * 2
        rows = Rows(torch.arange(tokens).repeat(2), chosen_TK.flatten().sort(stable=True)[0], 3, tokens)
        weights = Projection(3, (packed, packed), (slice(0, None, 2), slice(1, None, 2)))
        terms = [
            ExpertTerm(start, tokens, 0.5, torch.randn(3, 4, INPUTS), torch.randn(3, weights.width, 4))
            for start in (0, tokens // 2)
        ]
        x, g = torch.randn(2 * tokens, INPUTS), torch.randn(2 * tokens, weights.width)
        for some in ([], terms) if tokens == 1 else (terms,):
            y, hs = module.experts_forward(x, weights, rows, some)
            gx, grads = module.experts_backward(g, weights, rows, some, hs, x, True)
            assert module.experts_backward(g, weights, rows, some, hs, x, False)[0] is None
            yield from (y, gx, *(each for pair in grads for each in pair))


def _product(op: str) -> Case:
    width = OUTPUTS if "grad_input" in op else INPUTS
    return lambda module, packed: getattr(module, op)(torch.randn(20, width), packed)


CASES: dict[str, Case] = {
    **{op: _product(op) for op in PACKED_OPS},
    "dequantize": lambda module, packed: module.dequantize(packed, torch.float32),
    "grouped": _grouped, "experts": _experts,
    "lora": _lora, "lora_bf16": lambda module, packed: _lora(module, packed, "bf16"),
    "lora_int8": lambda module, packed: _lora(module, packed, "int8"),
    "norm": _norm, "gated": _gated, "rotate": _rotate, "varlen_attention": _attention, "cross_entropy": _cross_entropy,
    "descend": _descend,
}  # fmt: skip
JUDGED_ELSEWHERE = {  # module -> (file, test)
    # whose reference is the model's own forward pass, in transformers: tests/passes/test_decoding.py; and in float64
    "cpu.decode": ("cpu/test_decode.py", "test_a_step_is_that_of_the_decoder_in_float64"),
    # likewise, under the interpreter
    "gpu_decode": ("interpreted_triton.py", "test_a_step_is_that_of_the_decoder_in_float64"),
    # which needs a GPU: tests/test_cuda.py; and with a stand-in
    "varlen": ("test_varlen.py", "test_bounds_windows_and_groups_are_those_of_the_reference"),
}


def tensors(results: Any) -> Iterator[torch.Tensor]:
    for result in (results,) if isinstance(results, torch.Tensor) else results:
        yield from (result,) if isinstance(result, torch.Tensor) else tensors(result)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_every_row_has_a_reference_and_every_kernel_its_functions(row: Row) -> None:
    assert row.what and row.kernels
    for function in row.functions:
        if row.name != "decode_step":
            assert callable(getattr(import_module(f"qgraft.kernels.{row.reference}"), function))
        for kernel in row.kernels:
            assert callable(getattr(import_module(f"qgraft.kernels.{kernel.module}"), function))


@pytest.mark.parametrize(
    ("row", "kernel"),
    [
        pytest.param(row, kernel, marks=pytest.mark.triton if kernel.name == "triton" else ())
        for row in ROWS.values()
        for kernel in row.kernels
    ],
    ids=lambda each: each.name,
)
def test_every_kernel_computes_what_the_reference_does(
    row: Row, kernel: Kernel, random_packed: Callable[..., PackedTensor], request: pytest.FixtureRequest
) -> None:
    if kernel.module in JUDGED_ELSEWHERE:
        file, test = JUDGED_ELSEWHERE[kernel.module]
        assert f"def {test}(" in (Path(__file__).parent / file).read_text()
        return
    case = CASES[row.name]  # a row without one fails
    if kernel.name == "triton" and not triton_ops.interpreted():
        pytest.skip("with Triton's interpreter: test_triton.py runs this file so")
    if kernel.name == "native":
        request.getfixturevalue("native_kernels")
        if lacks := kernel.lacks("q4_1" if row.by_format else None, torch.float32):
            pytest.skip(lacks)
        if "int8" in row.name and choose(row.name, "q4_1", "cpu").compute != "int8":
            pytest.skip("this CPU's level computes it in float32")
    module, packed = import_module(f"qgraft.kernels.{kernel.module}"), random_packed("q4_1", OUTPUTS, INPUTS)
    results = []
    for each in (import_module(f"qgraft.kernels.{row.reference}"), module):
        torch.manual_seed(0)
        results.append([result.detach() for result in tensors(case(each, packed))])
    for expected, got in zip(*results, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=0, atol=(2e-2 if "bf16" in row.name else 2e-6) * scale)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_the_reference_is_forced_for_every_row(row: Row, use_kernels: Callable[[str | None], None]) -> None:
    use_kernels("reference")
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            choice = choose(row.name, "q4_1" if row.by_format else None, device, dtype)
            assert (choice.kernel, choice.why) == ("reference", f"{KERNELS_VARIABLE}=reference")
            assert choice.module is import_module(f"qgraft.kernels.{row.reference}")

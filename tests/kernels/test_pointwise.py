"""Norms, gated products and rotations: every level in C and the plain torch, against float64 and torch's autograd."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraft.kernels import choose, native_status, pointwise, reference
from qgraft.kernels.choice import serving
from qgraft.kernels.cpu import pointwise as cpu_pointwise
from qgraft.kernels.cpu.library import loaded
from qgraft.kernels.pointwise import ACTIVATIONS, Activation

SHAPES = [(1, 7), (3, 64), (33, 576), (2, 5, 100), (0, 8)]
BAD = [torch.nan, torch.inf, -torch.inf]
NAMES = [act.name for act in ACTIVATIONS]

needs_native = pytest.mark.skipif(not native_status()[0], reason=f"native kernels are {native_status()[1]}")


@pytest.fixture(params=["C", "torch"])
def way(request: pytest.FixtureRequest, use_kernels: Callable[[str | None], None]) -> str:
    """Both that a float32 tensor on the CPU can go."""
    if request.param == "C" and not native_status()[0]:
        pytest.skip(f"native kernels are {native_status()[1]}")
    use_kernels(None if request.param == "C" else "reference")
    assert (choose("norm", None, "cpu").kernel == "native") == (request.param == "C")
    return request.param


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """In every run."""
    torch.manual_seed(0)


def near(got: Tensor, exact: Tensor, *factors: Tensor) -> None:
    """Within 2e-6 of the largest number of its row, or of the product of the factors' largest, which may cancel."""
    assert got.shape == exact.shape and got.dtype == torch.float32
    if got.numel():
        parts = math.prod(float(factor.abs().max()) for factor in factors) if factors else 0.0
        size = exact.abs().amax(dim=-1, keepdim=True) + parts
        assert bool(((got.double() - exact).abs() <= 2e-6 * size + 1e-30).all())


def gradients(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """What autograd says in float64."""
    leaves = [x.double().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    return torch.autograd.grad(outputs, leaves, tuple(g.double() for g in grads))


def exact_gated(act: Activation, gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate) if act.name == "silu" else F.gelu(gate, approximate=act.approximate)) * up


def check_norm(shape: tuple[int, ...]) -> None:
    x, weight, grad = torch.randn(shape) * 3, torch.randn(shape[-1]), torch.randn(shape)
    y, r = pointwise.norm(x, weight, 1e-5)
    near(y, F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5))
    near(r, (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    assert torch.equal(pointwise.normalized(x, weight, r), y)
    assert torch.equal(y, x * r * weight)
    if x.numel():
        exact = gradients(lambda x: F.rms_norm(x, shape[-1:], weight.double(), 1e-5), (x,), (grad,))[0]
        near(pointwise.norm_backward(grad, x, weight, r), exact, grad, weight, r)


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_its_gradient_agree_with_float64(way: str, shape: tuple[int, ...]) -> None:
    check_norm(shape)


def check_gated(act: Activation, shape: tuple[int, ...]) -> None:
    gate, up, grad = torch.randn(shape) * 4, torch.randn(shape), torch.randn(shape)
    rounded = torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16)
    h = pointwise.gated(act, gate, up, rounded)
    near(h, exact_gated(act, gate.double(), up.double()), up)
    assert torch.equal(rounded[0], gate.bfloat16()) and torch.equal(rounded[1], up.bfloat16())
    assert torch.equal(pointwise.gated(act, gate, up), h)
    for kept in ((gate, up), rounded):
        near(pointwise.gated(act, *kept, dtype=torch.float32), exact_gated(act, kept[0].double(), kept[1].double()), up)
        exact = gradients(lambda gate, up: exact_gated(act, gate, up), kept, (grad,))
        g_gate, g_up = pointwise.gated_backward(act, grad, *kept)
        near(g_gate, exact[0], grad, up)
        near(g_up, exact[1], grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", ACTIVATIONS, ids=NAMES)
def test_gated_product_and_its_gradient_agree_with_float64(way: str, act: Activation, shape: tuple[int, ...]) -> None:
    check_gated(act, shape)


def exact_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By matrices: channels j and j + half of token t are multiplied by [[c1, -s1], [s2, c2]]."""
    half = cos.shape[-1] // 2
    matrix = torch.zeros(cos.shape[1], x.shape[-1], x.shape[-1], dtype=torch.float64)
    matrix[:] = torch.eye(x.shape[-1])
    j = torch.arange(half)
    matrix[:, j, j], matrix[:, j, j + half] = cos[0, :, :half].double(), -sin[0, :, :half].double()
    matrix[:, j + half, j + half], matrix[:, j + half, j] = cos[0, :, half:].double(), sin[0, :, half:].double()
    return torch.einsum("tij,bhtj->bhti", matrix, x)


def check_rotation(heads: int, groups: int, tokens: int, channels: int, width: int) -> None:
    q = torch.randn(1, tokens, heads * channels).view(1, tokens, heads, channels).transpose(1, 2)
    k = torch.randn(1, groups, tokens, channels)  # the other order in memory
    cos, sin = torch.randn(1, tokens, width), torch.randn(1, tokens, width)
    outputs = pointwise.rotate(q, k, cos, sin)
    for mine, x in zip(outputs, (q, k), strict=True):
        near(mine, exact_rotation(x.double(), cos, sin), x)
    grads = torch.randn(1, heads, tokens, channels), torch.randn(1, groups, channels, tokens).transpose(2, 3)
    exact = gradients(lambda q, k: (exact_rotation(q, cos, sin), exact_rotation(k, cos, sin)), (q, k), grads)
    got = pointwise.rotate(*grads, cos, sin, backward=True)
    for mine, theirs, grad in zip(got, exact, grads, strict=True):
        near(mine, theirs, grad)
    if choose("rotate", None, "cpu", q.dtype).kernel == "native":
        assert all(x.transpose(1, 2).is_contiguous() for x in (*outputs, *got))


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 2, 2), (4, 2, 3, 64, 64), (9, 3, 33, 80, 20), (2, 2, 5, 7, 6), (3, 1, 4, 6, 0)]
)
def test_rotation_and_its_gradient_agree_with_float64(way: str, sizes: tuple[int, ...]) -> None:
    """Any cos and sin, other ones for each half; partial rotation; q, k and gradients in any order in memory."""
    check_rotation(*sizes)


def test_every_level_agrees_with_float64(cpu_level: str) -> None:
    for shape in SHAPES:
        check_norm(shape)
        for act in ACTIVATIONS:
            check_gated(act, shape)
    for tokens in (1, 3, 33):
        check_rotation(4, 2, tokens, 64, 64)
        check_rotation(3, 1, tokens, 22, 14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=NAMES)
def test_half_precision_stays_and_is_rounded_once(dtype: torch.dtype, act: Activation) -> None:
    """A float32 result would make everything behind it float32: on a GPU that is ten times slower."""
    x, up, grad, weight = (*torch.randn(4, 9, 256, dtype=dtype).unbind()[:3], torch.rand(256, dtype=dtype) + 0.5)
    wide, step = [t.double() for t in (x, up, grad)], torch.finfo(dtype).eps

    def one_rounding(got: Tensor, exact: Tensor) -> None:
        assert got.dtype == dtype
        assert bool(((got.double() - exact).abs() <= 0.51 * step * exact.abs() + 2e-6 * exact.abs().max()).all())

    h = pointwise.gated(act, x, up)
    one_rounding(h, exact_gated(act, *wide[:2]))
    assert torch.equal(pointwise.gated(act, x, up, dtype=torch.float32).to(dtype), h)
    assert all(g.dtype == dtype for g in pointwise.gated_backward(act, grad, x, up))
    y, r = pointwise.norm(x, weight, 1e-5)
    assert r.dtype == torch.float32 and torch.equal(pointwise.normalized(x, weight, r), y)
    one_rounding(y, F.rms_norm(wide[0], (256,), weight.double(), 1e-5))
    exact = gradients(lambda x: F.rms_norm(x, (256,), weight.double(), 1e-5), (x,), (grad,))[0]
    one_rounding(pointwise.norm_backward(grad, x, weight, r), exact)


@needs_native
@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-90, 90, width=32), min_size=1, max_size=70), st.sampled_from(ACTIVATIONS[:2]))
def test_activation_is_exact_for_gates_of_all_sizes(gates: list[float], act: Activation) -> None:
    """Relative to the result itself, down to where exp is taken for zero (torch's own gelu with erf is not so near)."""
    gate = torch.tensor(gates)
    got, one = pointwise.gated(act, gate, torch.ones_like(gate)).double(), torch.ones(len(gates), dtype=torch.float64)
    exact = exact_gated(act, gate.double(), one)
    tiny = 2e-36 if act.name == "silu" else 1e-7  # gelu's exponent has an x^3, whose rounding exp makes larger
    assert bool(((got - exact).abs() <= 5e-7 * exact.abs() + tiny).all())


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_stays_in_its_row(cpu_level: str, bad: float) -> None:
    x, weight, g = torch.randn(5, 40), torch.randn(40), torch.randn(5, 40)
    clean = pointwise.norm(x, weight, 1e-5)
    clean_gx = pointwise.norm_backward(g, x, weight, clean[1])
    x[2, 17] = bad
    y, r = pointwise.norm(x, weight, 1e-5)
    gx = pointwise.norm_backward(g, x, weight, r)
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean[0][others]) and torch.equal(gx[others], clean_gx[others])
    assert bool(y[2, 17].isnan()) and bool(gx[2, 17].isnan())
    for act in ACTIVATIONS:
        got, expected = pointwise.gated(act, x, weight.expand(5, 40)), exact_gated(act, x, weight.expand(5, 40))
        torch.testing.assert_close(got, expected, equal_nan=True)
        g_gate, g_up = pointwise.gated_backward(act, g, x, g)
        bad_here = ~x.isfinite()
        assert bool(g_gate[~bad_here].isfinite().all() and g_up[~bad_here].isfinite().all())
        assert not bool(g_up[bad_here].isfinite().any())
    rounded = torch.empty(5, 40, dtype=torch.bfloat16), torch.empty(5, 40, dtype=torch.bfloat16)
    pointwise.gated(ACTIVATIONS[0], x, x, rounded)
    assert torch.equal(rounded[0].isnan(), x.isnan()) and torch.equal(rounded[1].isinf(), x.isinf())


def test_a_row_is_the_same_bits_whatever_is_around_it_and_whatever_threads_there_are(
    cpu_level: str, threads: Callable[[int], None]
) -> None:
    """What the cache of frozen layers rests on, see passes/frozen_cache.py."""
    room, weight = torch.randn(90 * 577 + 1), torch.randn(577)
    x, g = room[1:].view(90, 577), torch.randn(90, 577)  # no row is aligned to a vector
    cos, sin = torch.randn(1, 90, 64), torch.randn(1, 90, 64)
    q = torch.randn(1, 8, 90, 64)

    def everything(first: int) -> list[Tensor]:
        mine, mine_g = x[first:].clone(), g[first:].clone()
        y, r = pointwise.norm(mine, weight, 1e-6)
        gate = pointwise.gated(ACTIVATIONS[0], mine, mine_g)
        turned = pointwise.rotate(q[:, :, first:], q[:, :2, first:], cos[:, first:], sin[:, first:])
        back = (
            pointwise.norm_backward(mine_g, mine, weight, r),
            *pointwise.gated_backward(ACTIVATIONS[1], mine, mine, mine_g),
        )
        return [y, r, gate, *back, *(t[0].transpose(0, 1) for t in turned)]

    threads(1)
    expected = everything(0)
    threads(3)
    for first in (0, 1, 50, 89):
        for mine, whole in zip(everything(first), expected, strict=True):
            assert torch.equal(mine, whole[first:])


@needs_native
def test_what_c_does_not_take_goes_to_torch() -> None:
    half, double = torch.randn(3, 8).half(), torch.randn(3, 8).double()
    assert {choose("norm", None, "cpu", x.dtype).kernel for x in (half, double)} == {"reference"}
    assert serving("norm", torch.ones(1), double) is reference
    assert pointwise.gated(ACTIVATIONS[0], half, half).dtype == torch.float16
    assert pointwise.norm(double, double[0], 1e-6)[0].dtype == torch.float64
    with pytest.raises(RuntimeError):  # torch's own message, where C would read past the end
        pointwise.norm(torch.randn(3, 8), torch.randn(7), 1e-6)
    with pytest.raises(RuntimeError):
        pointwise.gated(ACTIVATIONS[0], torch.randn(3, 8), torch.randn(3, 7))
    q, k, angles = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 4, 8)
    with pytest.raises(RuntimeError):
        pointwise.rotate(q, k, angles, angles)


@pytest.mark.usefixtures("native_kernels")
def test_c_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the functions asks for the library; or a mistake in the dispatch would only show as slowness."""
    calls = []
    library = loaded()
    monkeypatch.setattr(cpu_pointwise, "loaded", lambda: calls.append(1) or library)
    x, act = torch.randn(3, 8), ACTIVATIONS[0]
    _, r = pointwise.norm(x, x[0], 1e-6)
    pointwise.normalized(x, x[0], r)
    pointwise.norm_backward(x, x, x[0], r)
    pointwise.gated(act, x.bfloat16(), x.bfloat16())
    pointwise.gated_backward(act, x, x, x)
    pointwise.rotate(x[None, None], x[None, None], x[None], x[None])
    assert len(calls) == 6

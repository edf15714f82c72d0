"""Experts on a GPU, under Triton's interpreter; run by test_triton.py, as interpreted_triton.py is."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pretended_gpu import pretended_gpu
from test_devices import EXPERTS as PARAMETERS
from test_devices import learned, waits_of_a_packed_pass
from torch import Tensor

from qgraft.experts import QuantizedExperts, Routed, Segment, Stack, route
from qgraft.formats import PackedTensor
from qgraft.kernels import choose, dequantize, gpu_experts
from qgraft.kernels.experts import Rows

pytestmark = pytest.mark.triton
MakePacked = Callable[..., PackedTensor]
EPS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
EXPERTS, IN, OUT = 5, 64, 48


def layer_of(
    format: str, random_packed: MakePacked, names: Sequence[str], alternates: bool = False
) -> QuantizedExperts:
    return QuantizedExperts(
        {name: Stack(EXPERTS, random_packed(format, EXPERTS * OUT, IN)) for name in names}, alternates
    )


def matrices(layer: QuantizedExperts) -> Tensor:
    """[E, out, in] in float64."""
    w_EOI = torch.zeros(EXPERTS, layer.out_features, layer.in_features, dtype=torch.float64)
    for name, stack in layer.stacks().items():
        w_EOI[:, layer.outputs()[name]] = dequantize(stack.packed, torch.float64).view(EXPERTS, OUT, IN)
    return w_EOI


def routed_of(tokens: int, each: int = 2) -> Routed:
    """Expert 3 gets none."""
    chosen = torch.stack([torch.randperm(4)[:each] for _ in range(tokens)])
    return route(torch.randn(tokens, IN), torch.where(chosen == 3, 4, chosen), EXPERTS)[0]


def exact(x: Tensor, w_EOI: Tensor, rows: Rows, segments: Sequence[Segment], weights: Sequence[Tensor]) -> Tensor:
    """Row by row."""
    ys = []
    for r, (token, e) in enumerate(zip(rows.tokens.tolist(), rows.experts.tolist(), strict=True)):
        y = w_EOI[e] @ x[r]
        for segment, A, B in zip(segments, weights[::2], weights[1::2], strict=True):
            if segment.start <= token < segment.stop:
                y = y + segment.scaling * (B[e] @ (A[e] @ x[r]))
        ys.append(y)
    return torch.stack(ys)


SEGMENTS = {"none": [], "all": [Segment(0, 20, 0.5)], "some": [Segment(3, 9, 0.5), Segment(9, 20, 2.0)],
            "both": [Segment(0, 20, 1.0), Segment(5, 6, -1.0)]}  # fmt: skip


CASES = {  # format, dtype of x, segments, tokens, whether the outputs of the two stacks alternate
    "many": ("q4_1", torch.bfloat16, "some", 20, False),
    "float32": ("q8_0", torch.float32, "both", 20, True),
    "stored floats": ("bf16", torch.bfloat16, "all", 2, False),
    "few": ("q4_0", torch.bfloat16, "some", 2, True),
    "float16": ("q5_1", torch.float16, "all", 20, False),
    "few in float16": ("iq4_nl", torch.float16, "none", 2, True),
    "stored float32": ("f32", torch.float32, "some", 20, True),
    "few of rows with scales": ("chatglm-int4", torch.bfloat16, "both", 2, False),
    "rows with scales": ("chatglm-int8", torch.bfloat16, "none", 20, False),
}


@pytest.mark.parametrize("case", ["many", *(pytest.param(each, marks=pytest.mark.slow) for each in [*CASES][1:])])
def test_values_and_gradients_are_those_of_float64(
    case: str, random_packed: MakePacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On few rows and many; unpacked two experts at a time; some rows with LoRAs, some without; an expert without rows."""
    format, dtype, segments, tokens, alternates = CASES[case]
    monkeypatch.setattr(gpu_experts, "WORKSPACE", 2 * OUT * IN * dtype.itemsize)
    torch.manual_seed(0)
    assert choose("experts", None, "cpu", dtype).module is gpu_experts
    layer, routed, own = (
        layer_of(format, random_packed, ("gate", "up"), alternates),
        routed_of(tokens),
        SEGMENTS[segments],
    )
    shapes = ((EXPERTS, 3, IN), (EXPERTS, 2 * OUT, 3))
    weights = [torch.randn(shape).mul_(0.3).requires_grad_() for _ in own for shape in shapes]
    x, g = routed.x.to(dtype).requires_grad_(), torch.randn(2 * tokens, 2 * OUT).to(dtype)
    y = layer.with_loras(routed._replace(x=x), own, weights)
    got = [y, *torch.autograd.grad(y, (x, *weights), g)]
    wide = [each.detach().double().requires_grad_() for each in (x, *weights)]
    expected_y = exact(wide[0], matrices(layer), routed.rows, own, wide[1:])
    expected = [expected_y, *torch.autograd.grad(expected_y, wide, g.double(), allow_unused=True)]
    assert y.dtype == dtype and all(each.dtype == torch.float32 for each in got[2:])
    for ours, theirs in zip(got, expected, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs.detach()
        assert float((ours.detach().double() - theirs).norm()) <= 2 * EPS[dtype] * float(theirs.norm()) + 1e-9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy, of NaN and infinity
def test_what_one_adapter_has_stays_in_its_tokens(random_packed: MakePacked) -> None:
    torch.manual_seed(0)
    layer, routed = layer_of("q4_1", random_packed, ("down",)), routed_of(20)
    weights = [torch.randn(EXPERTS, *shape) for _ in range(2) for shape in ((3, IN), (OUT, 3))]
    weights[0][:], weights[1][:] = torch.nan, torch.inf
    segments = [Segment(0, 8, 1.0), Segment(8, 20, 1.0)]
    y, own = layer.with_loras(routed, segments, weights), layer.with_loras(routed, segments[1:], weights[2:])
    others = routed.rows.tokens >= 8
    assert torch.equal(y[others], own[others]) and not bool(y[~others].isfinite().any())


def test_no_rows(random_packed: MakePacked) -> None:
    layer = layer_of("q4_1", random_packed, ("down",))
    routed, _ = route(torch.randn(0, IN), torch.zeros(0, 2, dtype=torch.int64), EXPERTS)
    weights = [torch.randn(EXPERTS, *shape).requires_grad_() for shape in ((3, IN), (OUT, 3))]
    y = layer.with_loras(routed, [Segment(0, 0, 1.0)], weights)
    grads = torch.autograd.grad(y.sum(), weights)
    assert y.shape == (0, OUT) and not any(bool(each.any()) for each in grads)


def test_the_gpu_is_not_waited_for(random_packed: MakePacked) -> None:
    """By few rows and many, with adapters on some of them, forward and backward."""
    with pretended_gpu() as gpu:
        layer = layer_of("q4_0", random_packed, ("down",)).to("cuda")
        A, B = (torch.randn(EXPERTS, *shape, device="cuda").requires_grad_() for shape in ((3, IN), (OUT, 3)))
        for tokens in (1, 6):
            hidden, chosen = torch.randn(tokens, IN).to("cuda"), torch.zeros(tokens, 2, dtype=torch.int64).to("cuda")
            gpu.waits.clear()
            routed, _ = route(hidden.requires_grad_(), chosen, EXPERTS)
            layer.with_loras(routed, [Segment(1, 4, 0.5)], [A, B]).sum().backward()
            assert hidden.grad is not None and not gpu.waits


@pytest.mark.slow
def test_a_step_of_training_there_is_the_cpus(tiny_gguf: Callable[..., Any]) -> None:
    path = tiny_gguf("qwen3moe").path
    loss, gradient = learned(path, "cpu", "float32", False, PARAMETERS)
    with pretended_gpu():
        got_loss, got = learned(path, "cuda", "bfloat16", False, PARAMETERS)
    assert got_loss == pytest.approx(loss, rel=0.03)
    assert float(torch.cosine_similarity(got, gradient, dim=0)) > 0.97


@pytest.mark.slow
def test_a_packed_pass_waits_as_often_as_one_of_a_model_without_experts(tiny_gguf: Callable[..., Any]) -> None:
    path = tiny_gguf("qwen3moe").path
    assert waits_of_a_packed_pass(path, PARAMETERS) == ["transformers", "attention.py"]

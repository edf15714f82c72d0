"""Products of experts in one call: bit for bit those of an expert after the other, on any number of threads; gradients."""

from collections.abc import Callable

import pytest
import torch

from qgraft.experts import QuantizedExperts, Routed, Segment, Stack, route
from qgraft.formats import PackedTensor, hold_floats
from qgraft.kernels import reference
from qgraft.kernels.grouped import Product, grouped_linear

EXPERTS, OUTPUTS, INPUTS = 5, 96, 256
GROUPS = [(0, 0, 1), (1, 1, 12), (3, 12, 76), (4, 76, 79)]  # one without rows; few rows and many


@pytest.mark.parametrize("format", ["q4_0", "q6_k", "chatglm-int4"])
@pytest.mark.parametrize("compute", ["float32", "bf16", "int8"])
def test_all_experts_at_once_are_one_after_the_other(
    format: str, compute: str, random_packed: Callable[..., PackedTensor], restored_threads: None
) -> None:
    stacks = [random_packed(format, EXPERTS * OUTPUTS, INPUTS) for _ in range(2)]
    torch.manual_seed(0)
    for backward, width in ((False, INPUTS), (True, OUTPUTS)):
        xs = [torch.randn(GROUPS[-1][2], width) for _ in stacks]
        product = Product(backward, compute)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            got = grouped_linear(xs, stacks, EXPERTS, GROUPS, backward, compute)
            for one, expected in zip(got, reference.grouped_linear(xs, stacks, EXPERTS, GROUPS, product), strict=True):
                assert torch.equal(one, expected)
    with pytest.raises(ValueError, match=r"got rows \[79, 255\], expected \[rows, 256\]"):
        grouped_linear([xs[0].new_empty(79, 255)], stacks[:1], EXPERTS, GROUPS)


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("alternates", [False, True])
def test_gradients_of_experts_with_loras_on_some_of_the_tokens(alternates: bool) -> None:
    torch.manual_seed(0)
    stacks = {name: Stack(4, hold_floats(torch.randn(4 * 3, 6))) for name in ("gate", "up")}
    layer = QuantizedExperts(stacks, alternates)
    routed, _ = route(torch.randn(5, 6).double(), torch.tensor([[0, 2], [2, 3], [0, 3], [3, 2], [2, 0]]), 4)
    segments = [Segment(0, 5, 0.5), Segment(1, 4, 2.0)]
    weights = [torch.randn(4, *shape).double().requires_grad_() for _ in segments for shape in ((2, 6), (6, 2))]

    def product(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return layer.with_loras(Routed(x, routed.rows), segments, weights)

    assert torch.autograd.gradcheck(product, (routed.x.requires_grad_(), *weights), fast_mode=True)

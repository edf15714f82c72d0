"""What torch's varlen kernel is called with: a stand-in for it that attends in plain torch, with both signatures.

The kernel itself runs on GPUs only: tests/test_cuda.py.
"""

import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qgraft.kernels import reference, varlen

BOUNDS = torch.tensor([0, 17, 18, 60])


def attend_each(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float | None, left: int
) -> Tensor:
    """[T, H, D], each sample by a softmax over the scores written out; heads of keys may be fewer."""
    assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and max_q == max_k == int(cu_q.diff().max())
    outputs = []
    for start, stop in pairwise(cu_q.tolist()):
        i = torch.arange(stop - start)
        distance = i[:, None] - i
        seen = (distance >= 0) & ((left < 0) | (distance <= left))
        keys, values = (t[start:stop].repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[start:stop], keys) * (scale or q.shape[-1] ** -0.5)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, values))
    return torch.cat(outputs)


def with_groups(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """The signature of torch 2.12 and later."""
    assert window_size[1] == 0 and enable_gqa == (q.shape[1] != k.shape[1])
    return attend_each(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0])


def without_groups(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """That of torch 2.11, which takes as many heads of keys as of queries."""
    assert window_size[1] == 0
    if not q.shape[1] == k.shape[1] == v.shape[1]:
        raise RuntimeError("heads")
    return attend_each(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0])


def untold_groups(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """The same, that takes fewer heads of keys as they are."""
    seen.append(k.shape[1])
    return attend_each(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0])


def other_groups(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """The same, but head h reads group h % groups."""
    k, v = (t.repeat(1, q.shape[1] // t.shape[1], 1) for t in (k, v))
    return attend_each(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0])


seen: list[int] = []


@pytest.fixture(params=[with_groups, without_groups, untold_groups, other_groups])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """The stand-in is torch's kernel, and this CPU a GPU."""
    names = frozenset(inspect.signature(request.param).parameters)
    monkeypatch.setattr(varlen, "_function", lambda: (request.param, names))
    monkeypatch.setattr(varlen, "takes", lambda *tensors: True)
    varlen._groups_untold.cache_clear()
    yield request.param
    varlen._groups_untold.cache_clear()


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bounds_windows_and_groups_are_those_of_the_reference(
    kernel: Callable[..., Any], groups: int, window: int | None
) -> None:
    shapes = [(1, n, 60, 8) for n in (4, groups, groups)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    g = torch.randn(1, 60, 4, 8)
    results = []
    seen.clear()
    for attend in (varlen.attend, reference.attend):
        out = attend(*tensors, BOUNDS.clone(), window=window, scale=0.4)
        results.append([out, *torch.autograd.grad(out, tensors, g)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not seen or seen[-1] == groups, "repeated for a kernel that need not have it"


def test_what_the_kernel_does_not_do_never_reaches_it(kernel: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(varlen, "_function", lambda: pytest.fail("reached the kernel"))
    q, k, v = (torch.randn(1, 2, 60, 8) for _ in range(3))
    front = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    for rest in ({"prefix": front}, {"contexts": torch.tensor([1, 1, 4])}, {"dropout": 0.5}):
        assert varlen.attend(q, k, v, BOUNDS, **rest).shape == (1, 60, 2, 8)


def test_float32_and_a_cpu_are_not_served() -> None:
    q = torch.randn(1, 2, 5, 8)
    assert not varlen.takes(q, q, q)
    assert not varlen.takes(q.bfloat16(), q.bfloat16(), q.bfloat16())


def test_the_installed_torch_has_the_arguments_that_are_asked_for() -> None:
    """A release that renames them must be seen here, not as slowness."""
    assert varlen.status()[0], varlen.status()[1]
    _, names = varlen._function()
    assert {"scale", "window_size"} <= names

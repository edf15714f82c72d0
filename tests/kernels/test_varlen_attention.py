"""Attention within samples: the C library at every level against torch's attention in float64, values and gradients."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qgraft.kernels import choose, reference
from qgraft.kernels.cpu.varlen_attention import takes
from qgraft.kernels.varlen_attention import attend

pytestmark = pytest.mark.usefixtures("native_kernels")

LENGTHS = [17, 1, 130, 2, 65]


def bounds_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def inputs(lengths: Sequence[int], heads: int, groups: int, channels: int, prefix: int = 0) -> list[Tensor]:
    """q, k, v as a model's projections leave them, [T, heads * channels] seen by heads, and a prefix's keys and values."""
    torch.manual_seed(channels + heads + prefix)
    rows = [torch.randn(1, sum(lengths), n * channels) for n in (heads, groups, groups)]
    tensors = [x.unflatten(2, (-1, channels)).transpose(1, 2) for x in rows]
    return [*tensors, *(torch.randn(1, groups, prefix, channels) for _ in range(2 if prefix else 0))]


def with_gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor], g: Tensor, **rest: Any) -> list[Tensor]:
    """The result and the gradient of each tensor, for the gradient g of the result."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves[:3], prefix=tuple(leaves[3:]) or None, **rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def same_as_float64(tensors: Sequence[Tensor], lengths: Sequence[int] = LENGTHS, **rest: Any) -> None:
    rest["bounds"] = bounds_of(lengths)
    assert takes(*tensors[:3], rest["bounds"])
    g = torch.randn(1, sum(lengths), tensors[0].shape[1], tensors[0].shape[3])
    got = with_gradients(attend, tensors, g, **rest)
    expected = with_gradients(reference.attend, [x.double() for x in tensors], g.double(), **rest)
    for name, a, b in zip(("out", "gq", "gk", "gv", "front k", "front v"), got, expected, strict=False):
        bound = 6e-6 * (1 + float(b.abs().max()))
        torch.testing.assert_close(a.double(), b, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("channels", [1, 8, 50, 64, 80, 96, 128, 256])
def test_every_level_attends_as_float64_does(cpu_level: str, channels: int, heads: int, groups: int) -> None:
    same_as_float64(inputs(LENGTHS, heads, groups, channels))


@pytest.mark.spread(81)
@pytest.mark.parametrize("prefix", [0, 1, 70])
@pytest.mark.parametrize("contexts", [None, [17, 1, 40, 0, 64], [0, 9, 70, 1, 200]])
@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
def test_windows_contexts_and_prefixes(
    cpu_level: str, window: int | None, contexts: list[int] | None, prefix: int
) -> None:
    rest = {"window": window, "contexts": None if contexts is None else torch.tensor(contexts), "scale": 0.3}
    same_as_float64(inputs(LENGTHS, 6, 2, 24, prefix), **rest)


@pytest.mark.parametrize("window", [None, 90])
def test_long_samples(cpu_level: str, window: int | None) -> None:
    """Many blocks of queries and of keys, and some between the prefix and the window that nobody sees."""
    same_as_float64(
        inputs([1500, 3, 300], 2, 1, 16, 20), [1500, 3, 300], window=window, contexts=torch.tensor([80, 0, 0])
    )


def test_any_layout_of_the_inputs() -> None:
    """Heads first, heads of one projection, every second channel; a gradient that is no block of memory."""
    tensors = inputs(LENGTHS, 4, 2, 32)
    rest: dict[str, Any] = {"bounds": bounds_of(LENGTHS)}
    expected = attend(*tensors, **rest)
    joint = torch.cat(tensors, dim=1).transpose(1, 2).contiguous().transpose(1, 2)
    for layout in (
        [x.contiguous() for x in tensors],
        joint.split([4, 2, 2], dim=1),
        [x.repeat_interleave(2, dim=3)[..., ::2] for x in tensors],
    ):
        assert torch.equal(attend(*layout, **rest), expected)
    g = torch.randn(1, 4, sum(LENGTHS), 32).transpose(1, 2)
    for a, b in zip(*(with_gradients(attend, tensors, x, **rest) for x in (g, g.contiguous())), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("prefix", [0, 5])
def test_a_sample_is_the_same_bits_in_every_pass(cpu_level: str, prefix: int) -> None:
    """What the cache of frozen layers rests on, see passes/frozen_cache.py."""
    tensors = inputs(LENGTHS, 6, 2, 40, prefix)
    g = torch.randn(1, sum(LENGTHS), 6, 40)
    whole = with_gradients(attend, tensors, g, bounds=bounds_of(LENGTHS))[:4]
    for start, stop in pairwise(bounds_of(LENGTHS).tolist()):
        own = [*(x[:, :, start:stop] for x in tensors[:3]), *tensors[3:]]
        alone = with_gradients(attend, own, g[:, start:stop], bounds=torch.tensor([0, stop - start]))[:4]
        assert torch.equal(alone[0], whole[0][:, start:stop])
        assert all(torch.equal(a, b[:, :, start:stop]) for a, b in zip(alone[1:], whole[1:], strict=True))


def test_threads_change_nothing(cpu_level: str, threads: Callable[[int], None]) -> None:
    tensors, g = inputs(LENGTHS, 6, 2, 64, 9), torch.randn(1, sum(LENGTHS), 6, 64)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(with_gradients(attend, tensors, g, bounds=bounds_of(LENGTHS)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_nan_stays_in_its_sample(cpu_level: str) -> None:
    tensors, g = inputs(LENGTHS, 6, 2, 40), torch.randn(1, sum(LENGTHS), 6, 40)
    clean = with_gradients(attend, tensors, g, bounds=bounds_of(LENGTHS))
    start, stop = bounds_of(LENGTHS).tolist()[2:4]
    for index in range(3):
        broken = [x.clone() for x in tensors]
        broken[index][:, :, start + 3] = float("nan")
        got = with_gradients(attend, broken, g, bounds=bounds_of(LENGTHS))
        assert bool(got[0][:, start + 3].isnan().all())
        got[0], expected = got[0].transpose(1, 2), [clean[0].transpose(1, 2), *clean[1:]]
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a[:, :, :start], b[:, :, :start]) and torch.equal(a[:, :, stop:], b[:, :, stop:])


def test_huge_scores_are_no_nan(cpu_level: str) -> None:
    tensors = [x * 300 for x in inputs(LENGTHS, 2, 2, 64)]
    got = with_gradients(attend, tensors, torch.ones(1, sum(LENGTHS), 2, 64), bounds=bounds_of(LENGTHS))
    expected = reference.attend(*(x.double() for x in tensors), bounds_of(LENGTHS))
    assert all(bool(x.isfinite().all()) for x in got)
    torch.testing.assert_close(got[0].double(), expected, rtol=1e-2, atol=2.0)


def test_without_gradients_and_without_tokens_in_a_sample() -> None:
    tensors, bounds = inputs([3, 4], 2, 1, 16), torch.tensor([0, 0, 3, 3, 7], dtype=torch.int32)
    expected = reference.attend(*tensors, torch.tensor([0, 3, 7]))
    torch.testing.assert_close(attend(*tensors, bounds), expected)


def test_what_c_does_not_compute_goes_to_torch() -> None:
    q, k, v = inputs([4], 2, 1, 16)
    bounds = torch.tensor([0, 4])
    assert takes(q, k, v, bounds)
    assert not takes(q, k, v, bounds, dropout=0.1)
    assert not takes(q.bfloat16(), k.bfloat16(), v.bfloat16(), bounds)
    assert not takes(q, k, v[..., :8], bounds)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes(q, k, v, bounds)
        assert attend(q, k, v, bounds).dtype == torch.bfloat16
    assert attend(q, k, v[..., :8], bounds).shape == (1, 4, 2, 8)


def test_the_reference_can_be_asked_for(use_kernels: Callable[[str | None], None]) -> None:
    tensors, bounds = inputs([4], 2, 1, 16), torch.tensor([0, 4])
    expected = attend(*tensors, bounds)
    use_kernels("reference")
    assert choose("varlen_attention", None, "cpu").kernel == "reference"
    torch.testing.assert_close(attend(*tensors, bounds), expected)


@pytest.mark.parametrize("bounds", [[0, 5], [0, 3], [1, 4], [0, 3, 2, 4], [0, -1, 4], [4], []])
def test_bounds_that_do_not_fit_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="got bounds"):
        attend(*inputs([4], 2, 1, 16), torch.tensor(bounds, dtype=torch.int64))

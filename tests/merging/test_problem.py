"""Both forms of a layer's least-squares problem against its definition in float64, and against each other.

E(V) = |X V^T - Y|^2 / T + noise |V - V*|^2        gradient: half of autograd's, curvature: half of the second one
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qgraft.formats import Grid, quantize, unpack
from qgraft.merging.algorithms import descend_codes, descend_integers, feed_errors, fit_reals
from qgraft.merging.problem import Problem, TokenProblem

TOKENS, OUT, SHARE = 90, 12, 0.02
FORMATS = {"chatglm-int4": 200, "q4_1": 256, "q4_k": 512, "q6_k": 256, "act_order": 128}  # inputs; more than tokens
ALGORITHMS = [fit_reals, descend_codes, descend_integers, feed_errors]
COLUMNS = {"block": slice(64, 128), "few": slice(3, 4), "apart": torch.tensor([5, 99, 2, 70]), "all": slice(None)}


class Case(NamedTuple):
    """One problem: by its definition, by its moments and by its tokens."""

    grid: Grid
    X: Tensor
    Y: Tensor
    target: Tensor
    noise: float
    moments: Problem
    tokens: TokenProblem

    def error(self, w_OI: Tensor) -> Tensor:
        """E of each row, [out] float64, by the definition."""
        outputs = (self.X.double() @ w_OI.double().T - self.Y.double()).square().sum(0) / len(self.X)
        return outputs + self.noise * (w_OI.double() - self.target.double()).square().sum(1)

    def slope(self, w_OI: Tensor) -> Tensor:
        """Half the gradient of E, [out, in] float64, by autograd."""
        w_64 = w_OI.detach().double().requires_grad_()
        (gradient,) = torch.autograd.grad(self.error(w_64).sum(), w_64)
        return gradient / 2


def a_grid(kind: str, generator: torch.Generator) -> Grid:
    if kind != "act_order":
        w = torch.randn(OUT, FORMATS[kind], generator=generator) * 0.05
        return unpack(quantize(w, kind))
    width, groups = FORMATS[kind], 4
    codes = torch.randint(0, 16, (OUT, width), generator=generator, dtype=torch.int8)
    d = ((torch.rand(OUT, groups, generator=generator) + 0.5) * 0.01).half().float()
    zeros = torch.randint(5, 11, (OUT, groups), generator=generator, dtype=torch.int8)
    group_of = (torch.arange(width) * groups // width)[torch.randperm(width, generator=generator)]
    return Grid(codes, d, zeros=zeros, low=0, high=15, zero_high=15, group_of=group_of)


def a_case(kind: str, strength: float = 2.0) -> Case:
    """Inputs of uneven energy, a low-rank delta, and wanted outputs that come from somewhat other inputs."""
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    grid = a_grid(kind, generator)
    width = grid.codes.shape[1]
    X = normal(TOKENS, 20) @ (torch.logspace(0, -2, 20)[:, None] * normal(20, width)) + 0.05 * normal(TOKENS, width)
    target = grid.weight() + strength * 3e-4 * normal(OUT, 4) @ normal(4, width)
    Y = (X + 0.02 * normal(TOKENS, width)) @ target.T
    damped = Problem(X.T @ X / TOKENS, Y.T @ X / TOKENS).damped(target, SHARE)
    noise = SHARE * float(X.square().sum() / TOKENS / width)
    tokens = TokenProblem(X / TOKENS**0.5, Y / TOKENS**0.5, target, noise)
    return Case(grid, X, Y, target, noise, damped, tokens)


def close(got: Tensor, expected: Tensor, size: float | None = None) -> None:
    assert got.shape == expected.shape and got.dtype == torch.float32
    size = float(expected.norm()) if size is None else size
    assert float((got.double() - expected).norm()) < 1e-5 * size


@pytest.fixture(scope="module", params=["moments", "tokens"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def case() -> Case:
    return a_case("q4_1")


def test_the_gradient_is_half_of_autograds(case, form):
    problem, w = getattr(case, form), case.grid.weight()
    far = w + 0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    for weight in (w, far):
        kept = weight.clone()
        # of the two products that it is the difference of
        close(problem.gradient(weight), case.slope(weight), float((case.Y.T @ case.X).norm()) / TOKENS)
        assert torch.equal(weight, kept)


@pytest.mark.parametrize("columns", [*COLUMNS])
def test_the_curvature_is_that_of_the_columns(case, form, columns):
    """Row by row what autograd's gradient changes by when the weight of one column does."""
    problem, chosen = getattr(case, form), COLUMNS[columns]
    numbers = torch.arange(case.X.shape[1])[chosen]
    zero = torch.zeros(OUT, case.X.shape[1])
    unit = torch.zeros(len(numbers), case.X.shape[1]).index_put_((torch.arange(len(numbers)), numbers), torch.ones(()))
    at_zero = case.slope(zero)[0]
    expected = torch.stack([(case.slope(zero + each) - at_zero)[0, numbers] for each in unit])
    close(problem.curvature(chosen), expected)
    close(problem.H[chosen][:, chosen], expected)


def test_slope_and_curvature_along_a_direction_are_differences_of_the_error(case, form):
    """Of a parabola the central differences are exact, whatever the step."""
    problem, generator = getattr(case, form), torch.Generator().manual_seed(2)
    directions = 0.05 * torch.randn(case.target.shape, generator=generator)
    scale = 0.5 + torch.rand(OUT, 1, generator=generator)
    w = scale * directions
    at, beyond, before = (case.error((scale.double() + each) * directions.double()) for each in (0, 1, -1))
    slope, curvature = problem.along(w, scale, directions)
    close(slope, (beyond - before) / 4)
    close(curvature, (beyond + before) / 2 - at)
    assert torch.equal(w, scale * directions)


def test_a_residual_is_the_gradient_of_the_weight_that_moves(case, form):
    problem, w, target = getattr(case, form), case.grid.weight(), case.target.clone()
    residual, moved, generator = problem.residual(w), w.clone(), torch.Generator().manual_seed(3)
    size = float((case.Y.T @ case.X).norm()) / TOKENS
    for columns in (*COLUMNS.values(), slice(0, 64), torch.tensor([70, 5])):
        step = 0.02 * torch.randn(moved[:, columns].shape, generator=generator)
        residual.move(columns, step)
        moved[:, columns] += step
        for asked in COLUMNS.values():
            got = residual.at(asked)
            close(got, case.slope(moved)[:, asked], size)
            got.fill_(7.0)  # the caller may change it
    assert torch.equal(w, case.grid.weight()) and torch.equal(case.target, target)


def test_without_noise_unseen_directions_cost_nothing():
    """The tokens span 90 of 256 directions; what lies across them is free."""
    case = a_case("q4_1")
    bare = replace(case.tokens, noise=0.0)
    seen = torch.linalg.svd(case.X.double(), full_matrices=True).Vh
    unseen = seen[TOKENS:][:OUT].float()
    one = torch.ones(OUT, 1)
    energies, reached = (bare.along(each, one, each)[1] for each in (unseen, seen[:OUT].float()))
    assert float(energies.max()) < 1e-6 * float(reached.min())
    _, energies = case.tokens.along(unseen, one, unseen)
    torch.testing.assert_close(energies, torch.full_like(energies, case.noise), rtol=1e-3, atol=0)


# ---------------------------------------------------------------- the same grids by both


def an_exact_case(kind: str) -> Case:
    """Numbers of so few bits that float32 rounds none of the sums: what differs, differs by more than rounding."""
    generator = torch.Generator().manual_seed(8)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    grid = a_grid(kind, generator)
    width, tokens = grid.codes.shape[1], 64
    unit = 2.0 ** (-14 if kind == "q4_k" else -12 if kind == "q6_k" else -7)
    grid = replace(grid, d=integers(1, 2, *grid.d.shape) * unit)
    if grid.m is not None:
        grid = replace(grid, m=-integers(1, 9, *grid.m.shape) * unit)
    if kind == "q6_k":
        assert grid.sub_scales is not None
        grid = replace(grid, sub_scales=integers(-9, 9, *grid.sub_scales.shape).to(torch.int8))
    mixed = torch.randn(tokens, 12, generator=generator) @ torch.randn(12, width, generator=generator)
    X = (mixed * 0.3).round().clamp(-2, 2)
    target = grid.weight() + integers(-3, 3, OUT, 1) * integers(-2, 2, 1, width) * 2.0**-9
    Y, noise = X @ target.T + integers(-1, 1, tokens, OUT) * 2.0**-9, 2.0**-5
    H = X.T @ X / tokens + noise * torch.eye(width)
    moments = Problem(H, Y.T @ X / tokens + noise * target)
    return Case(grid, X, Y, target, noise, moments, TokenProblem(X / 8, Y / 8, target, noise))


@pytest.mark.parametrize("kind", [*FORMATS])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm_gives_the_same_grid_by_both_forms(kind, algorithm):
    case = an_exact_case(kind)
    for problem in (case.moments, case.tokens):
        assert torch.equal(problem.gradient(case.grid.weight()).double(), case.slope(case.grid.weight()))
    by_moments, by_tokens = (algorithm(case.grid, problem) for problem in (case.moments, case.tokens))
    for name in ("codes", "d", "m", "sub_scales", "sub_minimums", "zeros"):
        one, other = (getattr(grid, name) for grid in (by_moments, by_tokens))
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other), name
    if algorithm is descend_integers and kind in ("chatglm-int4", "q4_1"):
        assert by_tokens is case.grid  # nothing to do
    else:
        start, end = (float(case.error(grid.weight()).sum()) for grid in (case.grid, by_tokens))
        assert end < start

"""Each algorithm against float64 and brute force, in every format that has a grid."""

from dataclasses import replace

import pytest
import torch

from qgraft.formats import FORMATS, pack, quantize, unpack
from qgraft.formats.grid import Grid
from qgraft.merging.algorithms import (
    Problem,
    descend_codes,
    descend_integers,
    feed_errors,
    fit_reals,
    nearest_codes,
)

WRITABLE = [name for name, each in FORMATS.items() if each.pack is not None and each.quantize is not None]
SYMMETRIC_TWO = ["q4_0", "q5_0", "q8_0", "chatglm-int4", "chatglm-int8"]


def a_problem(format_: str, out: int = 12, width: int = 512, tokens: int = 900) -> tuple[Grid, Problem, torch.Tensor]:
    """A grid, the problem of a small low-rank delta with inputs of strongly uneven energy, and the delta."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(out, width, generator=generator) * 0.05
    directions = torch.logspace(0, -2, 24)[:, None] * torch.randn(24, width, generator=generator)
    x = torch.randn(tokens, 24, generator=generator) @ directions + 0.01 * torch.randn(
        tokens, width, generator=generator
    )
    delta = torch.randn(out, 4, generator=generator) @ torch.randn(4, width, generator=generator) * 3e-4
    grid = unpack(quantize(w, format_))
    return grid, Problem.of_delta(grid.weight(), delta, x.T @ x / tokens), delta


def energy_of(grid: Grid, start: Grid, delta: torch.Tensor, H: torch.Tensor) -> float:
    """E in float64: the squared output error of the grid against start + delta."""
    error = grid.weight().double() - start.weight().double() - delta.double()
    return float(torch.einsum("oi,ij,oj->", error, H.double(), error))


@pytest.mark.parametrize("format_", WRITABLE)
@pytest.mark.parametrize("algorithm", [fit_reals, descend_codes, descend_integers])
def test_the_error_falls_and_the_result_can_be_packed(format_, algorithm):
    grid, problem, delta = a_problem(format_)
    merged = algorithm(grid, problem)
    packed = pack(merged, format_)
    assert torch.equal(unpack(packed).weight(), merged.weight())
    before, after = energy_of(grid, grid, delta, problem.H), energy_of(merged, grid, delta, problem.H)
    if algorithm is descend_integers and grid.sub_scales is None:
        assert torch.equal(merged.weight(), grid.weight())
    else:
        assert after < 0.97 * before if algorithm is not descend_integers else after <= before * 1.0001


@pytest.mark.parametrize("format_", ["q4_1", "q5_1", "q4_k"])
def test_scales_and_minimums_take_most_of_a_delta(format_):
    grid, problem, delta = a_problem(format_)
    start = energy_of(grid, grid, delta, problem.H)
    merged = fit_reals(grid, problem)
    assert torch.equal(merged.codes, grid.codes)
    if format_ == "q4_k":  # two numbers for 256 weights: integers have to help
        merged = fit_reals(descend_integers(descend_codes(merged, problem), problem), problem)
    assert energy_of(merged, grid, delta, problem.H) < 0.35 * start


@pytest.mark.parametrize("format_", WRITABLE)
def test_fit_reals_is_the_ridge_solution_of_float64(format_, monkeypatch):
    """Without the storage rounding the numbers solve the normal equations built by hand in float64, row by row."""
    monkeypatch.setattr("qgraft.merging.algorithms._round_in_turn", lambda theta, covariance, dtype: theta)
    grid, problem, delta = a_problem(format_, out=3)
    grid = replace(grid, real_dtype=torch.float32)
    merged = fit_reals(grid, problem)
    H, groups, width = problem.H.double(), grid.d.shape[1], grid.codes.shape[1]
    subs = 1 if grid.sub_scales is None else grid.sub_scales.shape[1]
    for row in range(3):
        columns = []
        for kind in ("d", "m") if grid.m is not None else ("d",):
            for g in range(groups):
                v = torch.zeros(width, dtype=torch.float64)
                for i in range(g * width // groups, (g + 1) * width // groups):
                    integers = grid.sub_scales if kind == "d" else grid.sub_minimums
                    factor = 1.0 if integers is None else float(integers[row, i * subs // width])
                    v[i] = factor * (float(grid.codes[row, i]) if kind == "d" else 1.0)
                columns.append(v)
        V = torch.stack(columns, 1)
        N, slope = V.T @ H @ V, V.T @ H @ delta[row].double()
        diagonal = N.diagonal()
        step = torch.linalg.solve(N + torch.diag(1e-3 * diagonal + 1e-6 * diagonal.mean()), slope)
        theta = torch.cat([grid.d[row], grid.m[row]]) if grid.m is not None else grid.d[row]
        got = torch.cat([merged.d[row], merged.m[row]]) if merged.m is not None else merged.d[row]
        wanted = V @ (theta.double() + step)
        error = (V @ got.double() - wanted) @ H @ (V @ got.double() - wanted)
        scale = (V @ step) @ H @ (V @ step)
        assert error < 1e-4 * scale


def test_rounding_in_turn_loses_less_than_rounding_at_once():
    grid, problem, delta = a_problem("q4_1", out=64)
    coarse = replace(grid, real_dtype=torch.bfloat16)  # 8 bits, so that rounding costs something
    in_turn = fit_reals(coarse, problem)
    at_once = fit_reals(replace(grid, real_dtype=torch.float32), problem)
    at_once = replace(at_once, real_dtype=torch.bfloat16).rounded()
    losses = [energy_of(each, grid, delta, problem.H) for each in (in_turn, at_once)]
    assert losses[0] < 0.5 * losses[1]


def test_descent_finds_the_best_step_of_one_code():
    """One column, one row: against every code there is."""
    H = torch.tensor([[2.0]])
    grid = Grid(torch.tensor([[3]], dtype=torch.int8), torch.tensor([[0.1]]), low=-8, high=7)
    for delta in (0.04, 0.06, 0.27, -2.0, 5.0):
        problem = Problem.of_delta(grid.weight(), torch.tensor([[delta]]), H)
        best = min(range(-8, 8), key=lambda code: abs(code * 0.1 - (0.3 + delta)))
        assert int(descend_codes(grid, problem).codes) == best


@pytest.mark.parametrize("format_", SYMMETRIC_TWO)
def test_descent_never_rises_from_codes_below_the_writers_range(format_):
    grid, problem, delta = a_problem(format_)
    codes = grid.codes.clone()
    codes[:, ::7] = grid.low - 1 if format_ in ("q8_0", "chatglm-int4", "chatglm-int8") else grid.low
    start = replace(grid, codes=codes)
    problem = Problem.of_delta(start.weight(), delta, problem.H)
    merged = descend_codes(start, problem)
    assert energy_of(merged, start, delta, problem.H) <= energy_of(start, start, delta, problem.H)
    assert int(merged.codes.min()) >= int(codes.min()) and int(merged.codes.max()) <= grid.high


@pytest.mark.spread(3)
@pytest.mark.parametrize("format_", WRITABLE)
def test_without_a_delta_nothing_moves(format_):
    grid, problem, delta = a_problem(format_)
    problem = Problem.of_delta(grid.weight(), torch.zeros_like(delta), problem.H)
    for algorithm in (descend_codes, descend_integers, feed_errors):
        assert torch.equal(algorithm(grid, problem).weight(), grid.weight())
    assert (fit_reals(grid, problem).weight() - grid.weight()).abs().max() < 1e-4


def test_dead_inputs_and_zero_rows_stay_finite():
    grid, problem, _ = a_problem("q4_1")
    problem.H[:, :40] = 0
    problem.H[:40] = 0
    codes, d = grid.codes.clone(), grid.d.clone()
    codes[0], d[0] = 0, 0
    grid = replace(grid, codes=codes, d=d)
    problem = Problem.of_delta(grid.weight(), torch.full_like(grid.weight(), 1e-3), problem.H)
    for algorithm in (fit_reals, descend_codes, feed_errors):
        assert algorithm(grid, problem).weight().isfinite().all()


@pytest.mark.parametrize("format_", WRITABLE)
def test_nearest_codes_are_nearest(format_):
    grid, _, delta = a_problem(format_, out=2)
    target = grid.weight() + 40 * delta
    merged = nearest_codes(grid, target)
    error = (merged.weight() - target).abs()
    for step in (-1, 1):
        moved = replace(merged, codes=(merged.codes.int() + step).clamp(grid.low, grid.high).to(torch.int8))
        assert ((moved.weight() - target).abs() >= error - 1e-6).all()


def test_error_feedback_beats_rounding_to_the_nearest():
    grid, problem, delta = a_problem("q4_0", out=48)
    delta = 20 * delta
    problem = Problem.of_delta(grid.weight(), delta, problem.H)
    fed, nearest = feed_errors(grid, problem), nearest_codes(grid, grid.weight() + delta)
    assert energy_of(fed, grid, delta, problem.H) < 0.7 * energy_of(nearest, grid, delta, problem.H)

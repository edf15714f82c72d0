"""Each algorithm against float64 and brute force, in every format that has a grid.

And in grids that no format of ours has yet: codebooks, zero points, groups whose columns lie apart, powers of two. Where such
a grid is one of the others in other words (levels that are the integers, a zero point that is the offset, groups put in
order), it must be solved as that one is.
"""

from dataclasses import replace

import pytest
import torch

from qgraft.formats import FORMATS, pack, quantize, unpack
from qgraft.formats.grid import Grid, combine, stored_reals
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
    elif algorithm is not fit_reals or format_ not in ("mxfp4", "nvfp4"):  # whose scales, of few bits, are no fit
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
    monkeypatch.setattr("qgraft.merging.algorithms._round_in_turn", lambda theta, covariance, grid: theta)
    grid, problem, delta = a_problem(format_, out=3)
    grid = replace(grid, real_dtype=torch.float32)
    merged = fit_reals(grid, problem)
    H, groups, width, values = problem.H.double(), grid.d.shape[1], grid.codes.shape[1], grid.values()
    subs = 1 if grid.sub_scales is None else grid.sub_scales.shape[1]
    for row in range(3):
        columns = []
        for kind in ("d", "m") if grid.m is not None else ("d",):
            for g in range(groups):
                v = torch.zeros(width, dtype=torch.float64)
                for i in range(g * width // groups, (g + 1) * width // groups):
                    integers = grid.sub_scales if kind == "d" else grid.sub_minimums
                    factor = 1.0 if integers is None else float(integers[row, i * subs // width])
                    v[i] = factor * (float(values[row, i]) if kind == "d" else 1.0)
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


# ---------------------------------------------------------------- grids of other libraries' formats

NF4 = [-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]  # not in order, 0 twice
IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
WIDTH, GROUPS = 128, 4


def a_grid(kind: str, out: int = 12) -> Grid:
    """A grid of weights of about 0.05."""
    generator = torch.Generator().manual_seed(7)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)

    codes, wide = integers(0, 15, out, WIDTH), torch.rand(out, GROUPS, generator=generator) + 0.5
    if kind == "nf4":
        return Grid(codes, wide * 0.1, levels=torch.tensor(NF4), low=0, high=15, real_dtype=torch.float32)
    if kind == "nf4_dq":  # bitsandbytes: absmax = byte's level * absmax of many + offset
        nested = Grid(integers(-128, 127, out, GROUPS), torch.full((out, GROUPS), 0.05), torch.full((out, GROUPS), 0.1),
                      levels=torch.linspace(-1, 1, 256) ** 3, low=-128, high=127)  # fmt: skip
        levels = torch.tensor(NF4)
        return Grid(codes, nested.weight(), levels=levels, low=0, high=15, real_dtype=torch.float32, d_grid=nested)
    if kind == "mxfp4":
        powers = stored_reals(wide * 0.02, torch.float8_e8m0fnu)
        return Grid(codes, powers, levels=torch.tensor(E2M1), low=0, high=15, real_dtype=torch.float8_e8m0fnu)
    if kind == "iq4_xs":
        sub_scales = integers(-32, 31, out, 4 * GROUPS)
        levels, d = torch.tensor(IQ4).float(), (wide * 1e-5 * 4).half().float()
        return Grid(codes, d, None, sub_scales, levels=levels, low=0, high=15, sub_low=-32, sub_high=31)
    zeros = integers(5, 10, out, GROUPS)
    d = (wide * 0.01).half().float()
    grid = Grid(codes, d, zeros=zeros, low=0, high=15, zero_low=0, zero_high=15)
    if kind == "awq":
        return grid
    group_of = torch.arange(WIDTH) * GROUPS // WIDTH
    if kind == "ragged":
        group_of = torch.tensor([0] * 50 + [1] * 3 + [2] * 40 + [3] * 35)
    return replace(grid, group_of=group_of[torch.randperm(WIDTH, generator=generator)])


OTHERS = ["nf4", "nf4_dq", "mxfp4", "iq4_xs", "awq", "act_order", "ragged"]


def of_grid(grid: Grid, strength: float = 1.0) -> tuple[Problem, torch.Tensor]:
    """(the problem of a low-rank delta with inputs of uneven energy, the delta)."""
    generator = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(600, 20) @ (torch.logspace(0, -2, 20)[:, None] * normal(20, WIDTH)) + 0.01 * normal(600, WIDTH)
    delta = strength * 3e-4 * normal(len(grid.codes), 4) @ normal(4, WIDTH)
    return Problem.of_delta(grid.weight(), delta, x.T @ x / 600), delta


def weight_by_hand(grid: Grid) -> torch.Tensor:
    """The formula at the top of formats/grid.py, number by number in float64."""
    rows, groups = grid.d.shape
    out = torch.empty(rows, WIDTH, dtype=torch.float64)
    for o in range(rows):
        for i in range(WIDTH):
            g = i * groups // WIDTH if grid.group_of is None else int(grid.group_of[i])
            value = float(grid.codes[o, i])
            if grid.levels is not None:
                value = float(grid.levels[int(grid.codes[o, i]) - grid.low])
            if grid.zeros is not None:
                value -= int(grid.zeros[o, g])
            subs = grid.sub_scales
            factor = 1 if subs is None else int(subs[o, i * subs.shape[1] // WIDTH])
            out[o, i] = float(grid.d[o, g]) * factor * value
    return out


@pytest.mark.parametrize("kind", OTHERS)
def test_other_grids_mean_what_the_formula_says(kind):
    grid = a_grid(kind, out=3)
    torch.testing.assert_close(grid.weight().double(), weight_by_hand(grid), rtol=1e-6, atol=0)
    assert torch.equal(grid.rows(1, 3).weight(), grid.weight()[1:])


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("algorithm", [fit_reals, descend_codes, descend_integers, feed_errors])
def test_in_other_grids_the_error_falls_and_the_result_can_be_stored(kind, algorithm):
    grid = a_grid(kind)
    problem, delta = of_grid(grid, strength=4.0)
    merged = algorithm(grid, problem)
    before, after = energy_of(grid, grid, delta, problem.H), energy_of(merged, grid, delta, problem.H)
    if kind == "mxfp4" and algorithm is fit_reals:
        assert torch.equal(merged.d.log2().frac(), torch.zeros_like(merged.d))  # powers of two move by halves: no fit
    elif algorithm is descend_integers and grid.sub_scales is None and grid.zeros is None:
        assert torch.equal(merged.weight(), grid.weight())
    else:
        assert after < (0.9 if algorithm is not descend_integers else 0.999) * before
    assert torch.equal(merged.rounded().weight(), merged.weight())
    assert merged.codes.dtype == torch.int8 and int(merged.codes.min()) >= 0 and int(merged.codes.max()) <= 15
    for integers, low, high in ((merged.zeros, 0, 15), (merged.sub_scales, -32, 31)):
        assert integers is None or (low <= int(integers.min()) and int(integers.max()) <= high)
    kept = ("d_grid", "levels", "group_of", "low", "high", "zero_low", "zero_high", "real_dtype")
    assert all(getattr(merged, name) is getattr(grid, name) for name in kept)


def test_scales_that_are_codes_themselves_stay_on_their_levels():
    """Each is one of the 256 numbers that its byte can stand for, and rounding in turn beats rounding at once."""
    grid = a_grid("nf4_dq")
    problem, delta = of_grid(grid, strength=4.0)
    merged = fit_reals(grid, problem)
    assert grid.d_grid is not None
    possible = grid.d_grid.levels * grid.d_grid.d[..., None] + grid.d_grid.m[..., None]  # [out, G, 256]
    assert bool((possible == merged.d[..., None]).any(-1).all())
    assert not torch.equal(merged.d, grid.d)
    at_once = replace(fit_reals(replace(grid, d_grid=None), problem), d_grid=grid.d_grid).rounded()
    losses = [energy_of(each, grid, delta, problem.H) for each in (merged, at_once)]
    assert losses[0] < losses[1]


def test_zero_points_that_must_not_move_do_not():
    """Readers of symmetric files take the zero point for granted."""
    grid = replace(a_grid("act_order"), zero_low=8, zero_high=8, zeros=torch.full((12, GROUPS), 8, dtype=torch.int8))
    problem, _ = of_grid(grid, strength=4.0)
    assert torch.equal(descend_integers(grid, problem).zeros, grid.zeros)


@pytest.mark.parametrize("kind", OTHERS)
def test_in_other_grids_without_a_delta_nothing_moves(kind):
    grid = a_grid(kind)
    problem = Problem.of_delta(grid.weight(), torch.zeros(12, WIDTH), of_grid(grid)[0].H)
    for algorithm in (descend_codes, descend_integers):
        merged = algorithm(grid, problem)
        assert torch.equal(merged.codes, grid.codes)  # nor 0 to -0
        assert torch.equal(merged.weight(), grid.weight())
    assert torch.equal(feed_errors(grid, problem).weight(), grid.weight())


@pytest.mark.parametrize("kind", OTHERS)
def test_nearest_codes_are_nearest_of_all_codes(kind):
    grid = a_grid(kind, out=3)
    target = grid.weight() + 0.03 * torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
    error = (nearest_codes(grid, target).weight() - target).abs()
    for code in range(16):
        other = replace(grid, codes=torch.full_like(grid.codes, code))
        assert ((other.weight() - target).abs() >= error - 1e-6).all()


@pytest.mark.parametrize("kind", ["nf4", "mxfp4"])
def test_descent_finds_the_best_level_of_one_code(kind):
    """One column, one row: against every code there is."""
    levels, H = a_grid(kind).levels, torch.tensor([[2.0]])
    assert levels is not None
    for start, d, delta in ((3, 0.1, 0.04), (7, 0.1, -0.06), (15, -0.2, 0.27), (0, 0.3, -2.0), (9, 0.05, 5.0)):
        grid = Grid(torch.tensor([[start]], dtype=torch.int8), torch.tensor([[d]]), levels=levels, low=0, high=15)
        wanted = float(grid.weight()) + delta
        merged = descend_codes(grid, Problem.of_delta(grid.weight(), torch.tensor([[delta]]), H))
        assert abs(float(merged.weight()) - wanted) == pytest.approx(float((levels * d - wanted).abs().min()), abs=1e-6)


@pytest.mark.parametrize("algorithm", [fit_reals, descend_codes, feed_errors])
def test_integers_as_levels_are_integers(algorithm):
    plain = replace(a_grid("awq"), zeros=None)
    levels = replace(plain, levels=torch.arange(16.0))
    problem, _ = of_grid(plain, strength=3.0)
    merged, expected = algorithm(levels, problem), algorithm(plain, problem)
    assert torch.equal(merged.codes, expected.codes) and torch.equal(merged.d, expected.d)


@pytest.mark.parametrize("algorithm", [fit_reals, descend_codes, feed_errors])
def test_a_zero_point_is_an_offset_of_the_codes(algorithm):
    grid = replace(a_grid("awq"), zeros=torch.full((12, GROUPS), 8, dtype=torch.int8))
    shifted = replace(grid, codes=grid.codes - 8, zeros=None, low=-8, high=7)
    problem, _ = of_grid(grid, strength=3.0)
    merged, expected = algorithm(grid, problem), algorithm(shifted, problem)
    assert torch.equal(merged.codes - 8, expected.codes) and torch.equal(merged.d, expected.d)


@pytest.mark.parametrize("algorithm", [fit_reals, descend_integers])
def test_groups_whose_columns_lie_apart_are_groups_put_in_order(algorithm):
    grid = a_grid("act_order")
    assert grid.group_of is not None
    order = grid.group_of.argsort(stable=True)
    together = replace(grid, codes=grid.codes[:, order], group_of=None)
    problem, _ = of_grid(grid, strength=3.0)
    sorted_problem = Problem(problem.H[order][:, order], problem.P[:, order])
    merged, expected = algorithm(grid, problem), algorithm(together, sorted_problem)
    torch.testing.assert_close(merged.weight()[:, order], expected.weight(), rtol=2e-3, atol=1e-6)  # float16 steps
    assert torch.equal(merged.zeros, expected.zeros)


def test_combine_takes_one_matrix_of_memory():
    values = torch.randn(4, 8)
    assert combine(values, torch.ones(4, 2), None).data_ptr() == values.data_ptr()

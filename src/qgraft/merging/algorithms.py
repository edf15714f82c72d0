"""How a packed weight takes up a delta: pure functions (grid, problem) -> grid of the same format.

A delta is a few hundredths of a quantization step, so rounding W + delta to the grid returns W. But it is low-rank and
lies in the few directions in which the layer's inputs X have their energy, so it is solved for in that metric: find the
integers and scales for which the layer's *output* is the wanted one,

    minimize  E(V) = |X V^T - Y|^2 / T  =  tr(V H V^T) - 2 tr(V P^T) + const      H = X^T X / T,  P = Y^T X / T

with X [T, in] the inputs of the layer on T calibration tokens and Y [T, out] the outputs it should have (problem.py).
Everything here needs only H and the gradient R = V H - P. A row of the weight is a problem of its own; all rows share H.

    nearest_codes       no metric: the nearest codes of the base's own grid. The honest baseline: it changes nothing.
    fit_reals           codes stay; the real numbers of each row (scales, minimums) in closed form
    descend_codes       scales stay; each code by the best integer step, column after column
    descend_integers    the same for the integers of groups: scales and minimums in K-quants, zero points in GPTQ and AWQ
    feed_errors         codes in GPTQ's order, each rounding error passed on to the columns that follow

fit_reals. With the codes fixed a row is linear in its K numbers theta = (d_1..d_G, m_1..m_G): w = sum_k theta_k v_k,
where v_k are the codes of group k (or ones), zero elsewhere. With V = [v_1 .. v_K] the step from the old numbers is

    (V^T H V + ridge) step = -V^T r        r = the row of R        ridge = RIDGE times the diagonal

Stored numbers are rounded (to float16), so they are rounded one after another, each error made good by those that
follow (the optimal-brain step, as GPTQ takes it over codes). With V^T H V + ridge = M M^T, M upper triangular, what is lost
is |M^T errors|^2, and the number k that makes up for the errors of those before it is theta_k - sum_i<k M_ik error_i / M_kk.

descend_codes. The best integer move of column k is n = -R_k / (H_kk step_k), rounded, and R += n step_k H_k. E never
rises: each move is the exact minimum over its own number. `descend_integers` does that over groups. In a codebook the best
code is the level nearest to where the bottom of the parabola lies.

All of it goes by `Grid`: what a code stands for (`values`, `nearest`) and which columns are a group (`spread`, `group_sums`,
`columns`), so codebooks, zero points and columns in any order need no algorithm of their own.

Sources: GPTQ (arXiv:2210.17323) for the order and the error feedback, QuantEase (arXiv:2309.01885) for coordinate
descent. Not chosen: requantizing W + delta with fresh scales, which adds new rounding noise of a whole step.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qgraft.formats.grid import Grid, stored_reals
from qgraft.kernels.descend import descend
from qgraft.merging.problem import Problem, Residual, TokenProblem

RIDGE = 1e-3  # times the diagonal of the normal equations, and of H where it is inverted
SWEEPS = 2
BLOCK = 64  # columns whose updates are gathered before they reach the rest of R
NORMAL_BYTES = 8 << 20  # of normal equations at a time; so many rows also stay in the cache


AnyProblem = Problem | TokenProblem
Algorithm = Callable[[Grid, AnyProblem], Grid]


def nearest_codes(grid: Grid, w_OI: Tensor) -> Grid:
    """The codes nearest to the weight [out, in] with the scales of `grid`."""
    steps, offsets = grid.spread(grid.steps()), grid.offsets()
    shifted = w_OI if offsets is None else w_OI - grid.spread(offsets)
    values = shifted * _inverse(steps)
    if grid.zeros is not None:
        values += grid.spread(grid.zeros.float())
    return replace(grid, codes=grid.nearest(values).to(torch.int8))


# ---------------------------------------------------------------- real numbers


def fit_reals(grid: Grid, problem: AnyProblem) -> Grid:
    """The scales and minimums that minimize E with the codes as they are, rounded as they are stored."""
    numbers = grid.d.shape[1] * (1 if grid.m is None else 2)
    rows = max(1, NORMAL_BYTES // (4 * numbers * numbers))
    if numbers == 1:
        return replace(grid, d=_fit_scales(grid, problem)).rounded()
    gradient = problem.gradient(grid.weight())
    parts = [
        _fit_rows(grid.rows(start, start + rows), problem.H, gradient[start : start + rows])
        for start in range(0, len(grid.codes), rows)
    ]
    m = None if grid.m is None else torch.cat([part.m for part in parts if part.m is not None])
    return replace(grid, d=torch.cat([part.d for part in parts]), m=m).rounded()


def _fit_rows(grid: Grid, H: Tensor, gradient: Tensor) -> Grid:
    bases, groups = _bases(grid), grid.d.shape[1]
    normal = _normal_equations(bases, H, grid)  # [out, K, K]
    slope = torch.cat([grid.group_sums(gradient * basis) for basis in bases], dim=1)  # [out, K]
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal + 1e-6 * diagonal.mean(dim=1, keepdim=True) + 1e-30
    factor = torch.linalg.cholesky(normal.flip(1, 2))  # of the numbers from the last to the first: M, turned round
    step = torch.cholesky_solve(slope.flip(1)[..., None], factor)[..., 0].flip(1)
    theta = (grid.d if grid.m is None else torch.cat([grid.d, grid.m], dim=1)) - step
    theta = _round_in_turn(theta, factor, grid)
    return replace(grid, d=theta[:, :groups], m=None if grid.m is None else theta[:, groups:])


def _fit_scales(grid: Grid, problem: AnyProblem) -> Tensor:
    """The one scale of each row, [out, 1]: what _fit_rows gives, without H where the problem is kept by its tokens."""
    (basis,) = _bases(grid)
    slope, curvature = problem.along(grid.weight(), grid.d, basis)
    curvature += (RIDGE + 1e-6) * curvature + 1e-30
    return grid.d - (slope / curvature)[:, None]


def _bases(grid: Grid) -> list[Tensor]:
    """The directions that d and m scale, each [out, in] or, where all rows share it, [1, in]."""
    values = grid.values()
    scales = values if grid.sub_scales is None else values * grid.spread(grid.sub_scales.float())
    if grid.m is None:
        return [scales]
    if grid.sub_minimums is None:
        return [scales, values.new_ones(1, values.shape[1])]
    return [scales, grid.spread(grid.sub_minimums.float())]


def _normal_equations(bases: list[Tensor], H: Tensor, grid: Grid) -> Tensor:
    """V^T H V of every row, [out, K, K] with K = groups * len(bases)."""
    rows, groups = grid.d.shape
    normal = H.new_empty(rows, len(bases), groups, len(bases), groups)
    for j, left in enumerate(bases):
        for k, right in enumerate(bases[j:], start=j):
            block = normal[:, j, :, k]  # [rows, groups, groups]
            _pair_sums(left, right, H, grid, block)
            if left is not right:
                normal[:, k, :, j] = block.mT
    return normal.flatten(3).flatten(1, 2)


def _pair_sums(left: Tensor, right: Tensor, H: Tensor, grid: Grid, sums: Tensor) -> None:
    """sums[:, g, h] = left_g^T H right_h for all groups g and h of each row, [rows, G, G]."""
    groups = grid.d.shape[1]
    shared = grid.group_sums(H * right) if len(right) == 1 else None  # [in, G], where all rows have one `right`
    for g in range(groups):
        columns = grid.columns(g, groups)
        if shared is not None:
            sums[:, g] = left[:, columns] @ shared[columns]
        elif left is right and isinstance(columns, slice):  # groups of neighbours: what is before g is known
            later = slice(columns.start, None)
            image = (left[:, columns] @ H[columns, later]).mul_(right[:, later])
            sums[:, g, g:] = image.unflatten(1, (groups - g, -1)).sum(dim=2)
            sums[:, g + 1 :, g] = sums[:, g, g + 1 :]
        else:
            sums[:, g] = grid.group_sums((left[:, columns] @ H[columns]).mul_(right))


def _round_in_turn(theta: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """theta [out, K] as it is stored, number by number, each error made good by the numbers after it.

    Args:
        factor: lower triangular [out, K, K], of the normal equations with the numbers from the last to the first.
    """
    groups, last = grid.d.shape[1], theta.shape[1] - 1
    stored, errors = torch.empty_like(theta), torch.zeros_like(theta)  # errors: from the last to the first
    for k in range(last + 1):
        r = last - k
        owed = (factor[:, r + 1 :, r] * errors[:, r + 1 :]).sum(1) / factor[:, r, r]
        number = (theta[:, k] - owed)[:, None]
        stored[:, k : k + 1] = (
            grid.stored_d(number, k) if k < groups else stored_reals(number, grid.real_dtype, grid.real_unit)
        )
        errors[:, r] = stored[:, k] - theta[:, k]
    return stored


# ---------------------------------------------------------------- integers


def descend_codes(grid: Grid, problem: AnyProblem) -> Grid:
    """Coordinate descent on the codes from those of `grid`, its scales fixed. E never rises."""
    residual, width = problem.residual(grid.weight()), grid.codes.shape[1]
    codes_IO, steps_IO = grid.codes.T.float().contiguous(), grid.spread(grid.steps()).T.contiguous()
    for _ in range(SWEEPS):
        for start in range(0, width, BLOCK):
            block = slice(start, min(start + BLOCK, width))
            R_BO = residual.at(block).T.contiguous()
            moved_BO = _descend_block(R_BO, codes_IO[block], steps_IO[block], problem.curvature(block), grid)
            residual.move(block, moved_BO.T)
    return replace(grid, codes=codes_IO.T.to(torch.int8).contiguous())


def _descend_block(R_BO: Tensor, codes_BO: Tensor, steps_BO: Tensor, H_BB: Tensor, grid: Grid) -> Tensor:
    """Move the codes of a block of columns, in place; returns how far each weight moved, [block, out]."""
    if grid.levels is None:
        return descend(R_BO, codes_BO, steps_BO, H_BB, grid.low, grid.high)
    moved_BO, inverse_BO = torch.zeros_like(R_BO), _inverse(H_BB.diagonal()[:, None] * steps_BO)
    for k in range(len(R_BO)):  # E is a parabola of the value, so of all levels the nearest to its bottom is the best
        value = _levels_of(grid, codes_BO[k])
        best = grid.nearest(value - R_BO[k] * inverse_BO[k])
        best = torch.where(_levels_of(grid, best) == value, codes_BO[k], best)  # 0 and -0 are two codes of a float
        moved_BO[k] = (_levels_of(grid, best) - value) * steps_BO[k]
        codes_BO[k] = best
        R_BO.addr_(H_BB[k], moved_BO[k])
    return moved_BO


def descend_integers(grid: Grid, problem: AnyProblem) -> Grid:
    """Coordinate descent on the integers of groups: scales and minimums of sub-groups, zero points. E never rises."""
    if grid.sub_scales is None and grid.sub_minimums is None and grid.zeros is None:
        return grid
    residual = problem.residual(grid.weight())
    low, high = grid.sub_low, grid.sub_high
    if grid.sub_scales is not None:
        directions = grid.spread(grid.d) * grid.values()
        grid = replace(
            grid, sub_scales=_descend_groups(residual, grid.sub_scales, directions, problem, grid, low, high)
        )
    if grid.sub_minimums is not None and grid.m is not None:
        directions = grid.spread(grid.m).contiguous()
        grid = replace(
            grid, sub_minimums=_descend_groups(residual, grid.sub_minimums, directions, problem, grid, low, high)
        )
    if grid.zeros is not None:
        directions, low, high = -grid.spread(grid.d), grid.zero_low, grid.zero_high
        grid = replace(grid, zeros=_descend_groups(residual, grid.zeros, directions, problem, grid, low, high))
    return grid


def _descend_groups(
    residual: Residual,
    integers_OS: Tensor,
    directions_OI: Tensor,
    problem: AnyProblem,
    grid: Grid,
    low: int,
    high: int,
) -> Tensor:
    """The integers moved within low..high, one group or sub-group after another; the residual follows."""
    moved = integers_OS.float()
    for s in range(integers_OS.shape[1]):
        columns = grid.columns(s, integers_OS.shape[1])
        v_OW = directions_OI[:, columns]
        slope, curvature = (residual.at(columns) * v_OW).sum(1), ((v_OW @ problem.curvature(columns)) * v_OW).sum(1)
        best = (moved[:, s] - (slope * _inverse(curvature)).round_()).clamp_(low, high)
        residual.move(columns, (best - moved[:, s])[:, None] * v_OW)
        moved[:, s] = best
    return moved.to(integers_OS.dtype)


def feed_errors(grid: Grid, problem: AnyProblem) -> Grid:
    """The codes of the weight that solves the problem (with a ridge toward the base), rounded in GPTQ's order."""
    damped = problem.H + RIDGE * torch.diag(problem.H.diagonal().mean().expand(len(problem.H)))
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    base = grid.weight()
    target_OI = base - problem.gradient(base) @ covariance
    U = torch.linalg.cholesky(covariance, upper=True)
    steps_OI, offsets = grid.spread(grid.steps()), grid.offsets()
    offsets_OI = torch.zeros_like(base) if offsets is None else grid.spread(offsets)
    zeros_OI = None if grid.zeros is None else grid.spread(grid.zeros.float())
    codes = torch.empty_like(base)
    for k in range(base.shape[1]):
        value = (target_OI[:, k] - offsets_OI[:, k]) * _inverse(steps_OI[:, k])
        codes[:, k] = grid.nearest(value if zeros_OI is None else value + zeros_OI[:, k])
        value = codes[:, k] if grid.levels is None else _levels_of(grid, codes[:, k])
        value = value if zeros_OI is None else value - zeros_OI[:, k]
        error = (target_OI[:, k] - offsets_OI[:, k] - value * steps_OI[:, k]) / U[k, k]
        target_OI[:, k + 1 :].addr_(error, U[k, k + 1 :], alpha=-1.0)
    return replace(grid, codes=codes.to(torch.int8))


def _levels_of(grid: Grid, codes: Tensor) -> Tensor:
    """What codes (whole float32 numbers) stand for in a codebook."""
    assert grid.levels is not None
    return grid.levels[codes.long() - grid.low]


def _inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 where that is not finite: a number that has no effect is not moved."""
    return torch.where(values.abs() > 1e-30, 1.0 / values, 0.0)
